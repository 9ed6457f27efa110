"""The Slurm script, with an `srun` and a `scontrol` that stand for an allocation on this machine."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.clusters import free_ports, in_session, wait_for

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "cluster" / "slurm" / "lumen-ray.sbatch"
BASH = shutil.which("bash")
SRUN = """#!/usr/bin/env bash
# Runs the command after the options here; to `ray start` it adds what lets several nodes share a machine.
echo "$*" >> "$FAKE_LOG"
while [[ "$1" == --* ]]; do shift; done
case "$1 $2 $3" in
    "ray start --head") exec "$@" $FAKE_HEAD ;;
    "ray start "*) [ -n "$FAKE_WORKER" ] && exec "$@" $FAKE_WORKER; exec sleep 60 ;;
    *) exec "$@" ;;
esac
"""
SCONTROL = """#!/usr/bin/env bash
[ "$1 $2 $3" = "show hostnames node[1-9]" ] && printf '%s\\n' $FAKE_NODES
"""
TRAIN = ["train", "--recipe", "quickstart", "--shards", "nowhere", "--output", "out"]


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.fixture
def allocation(tmp_path) -> Iterator[dict[str, str]]:
    """The environment of a job of one node, whose Ray nodes do not get into the way of others on this machine."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        program(tmp_path / "bin", name, text)
    ports = free_ports()
    names = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export",
             "node-manager", "object-manager")  # fmt: skip

    def options() -> str:
        given = [f"--{name}-port={next(ports)}" for name in names]
        return " ".join([*given, "--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=100000000"])

    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_", "LUMEN_RAY_"))}
    job = 10_000_000 + os.getpid()
    yield kept | {
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NODELIST": "node[1-9]",
        "SLURM_CPUS_ON_NODE": "2",
        "LUMEN_RAY_PORT": str(next(ports)),
        "LUMEN_RAY_HEAD_IP": "127.0.0.1",
        "FAKE_LOG": str(tmp_path / "srun.log"),
        "FAKE_NODES": "node1",
        "FAKE_HEAD": f"{options()} --dashboard-port={next(ports)} --ray-client-server-port={next(ports)}",
        "FAKE_WORKER": options(),
        "OMP_NUM_THREADS": "1",
    }
    shutil.rmtree(f"/tmp/ray-{job}", ignore_errors=True)  # the logs of a Ray whose verb failed


def submit(environment: dict[str, str], *arguments: str, seconds: float = 240) -> tuple[int, str]:
    """(exit code, output) of the script; nothing that it started is left."""
    with in_session(
        [BASH, str(SCRIPT), *arguments], environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def fake_ray(folder: Path, start: str, health: str = "exit 0") -> None:
    program(folder / "bin", "ray", f'#!/usr/bin/env bash\nif [ "$1" = start ]; then {start}; else {health}; fi\n')


def test_the_script_is_bash():
    assert subprocess.run(["bash", "-n", SCRIPT], capture_output=True).stderr == b""
    text = SCRIPT.read_text()
    assert "ray stop" not in re.sub(r"#.*", "", text)  # it would end the Ray of other jobs on the node
    directives = re.findall(r"^#SBATCH (\S+)", text, flags=re.MULTILINE)
    assert len(directives) == len(set(directives))
    first_command = text.index("set -uo pipefail")
    assert text.rindex("#SBATCH") < first_command  # Slurm reads none behind it


@pytest.mark.parametrize(
    ("arguments", "changes", "sentence"),
    [
        ([], {}, "name a verb of lumen-ray and its arguments"),
        (["trian"], {}, "invalid choice: 'trian'"),
        (["train", "--recipe", "nano"], {}, "the following arguments are required: --shards, --output"),
        ([*TRAIN, "--wrokers", "2"], {}, "--wrokers"),
        (TRAIN, {"SLURM_JOB_ID": ""}, "no Slurm allocation; submit the script with sbatch"),
        (TRAIN, {"PATH": "/nowhere"}, "'srun' is not in PATH"),
        (TRAIN, {"LUMEN_RAY_PORT": "auto"}, "LUMEN_RAY_PORT must be a whole number, not 'auto'"),
        (TRAIN, {"LUMEN_RAY_JOIN_S": "5m"}, "LUMEN_RAY_JOIN_S must be a whole number, not '5m'"),
    ],
)
def test_mistakes_are_one_sentence_and_start_nothing(arguments, changes, sentence, allocation):
    code, output = submit(allocation | changes, *arguments)
    assert code == 2 and sentence in output
    assert output.startswith("lumen-ray.sbatch: ") and output.count("\n") == 1, output
    assert not Path(allocation["FAKE_LOG"]).exists()


@pytest.mark.parametrize(
    ("start", "health", "sentence"),
    [
        ("echo no room; exit 1", "exit 1", "Ray's head on node1 ended; its lines are above"),
        ("exec sleep 60", "exit 1", "Ray's head on node1 does not answer at 127.0.0.1:"),
    ],
)
def test_a_head_that_does_not_start_is_an_error(start, health, sentence, allocation, tmp_path):
    fake_ray(tmp_path, start, health)
    code, output = submit(allocation | {"LUMEN_RAY_JOIN_S": "2"}, *TRAIN, seconds=60)
    assert code == 1 and sentence in output


@pytest.mark.ray
def test_a_verb_runs_on_all_nodes_behind_a_token(allocation, tmp_path):
    environment = allocation | {"FAKE_NODES": "node1 node2"}
    code, output = submit(environment, "prepare", "scenes", "--num", "8", "--output", str(tmp_path / "shards"))
    assert code == 0, output
    assert "Ray on 2 node(s), head node1 at 127.0.0.1:" in output and "2 node(s) joined" in output
    assert (tmp_path / "shards" / "manifest.json").is_file()
    head, worker, cleaning = Path(allocation["FAKE_LOG"]).read_text().splitlines()
    assert "--nodes=1 --ntasks=1 " in head and " --nodelist=node1 ray start --head " in head
    assert (
        "--nodes=1 --ntasks=1 " in worker
        and f" --exclude=node1 ray start --address=127.0.0.1:{port(environment)} " in worker
    )
    assert "--cpus-per-task=2" in head and "--num-cpus=2" in worker and "--block" in head and "--block" in worker
    session = Path(f"/tmp/ray-{allocation['SLURM_JOB_ID']}")
    assert cleaning.endswith(f"rm -rf {session}") and not session.exists()
    assert not is_open(port(environment))


def port(environment: dict[str, str]) -> int:
    return int(environment["LUMEN_RAY_PORT"])


def is_open(number: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", number)) == 0


@pytest.mark.ray
def test_the_exit_code_is_the_verbs_and_a_signal_reaches_it(allocation, tmp_path):
    program(
        tmp_path / "bin",
        "lumen-ray",
        "#!/usr/bin/env bash\ntrap 'echo saved; exit 7' TERM\necho token ${#RAY_AUTH_TOKEN} $RAY_AUTH_MODE $*\n"
        "for _ in $(seq 600); do sleep 0.1; done\n",
    )
    log = tmp_path / "job.log"
    with (
        open(log, "w") as out,
        in_session([BASH, str(SCRIPT), *TRAIN], allocation, stdout=out, stderr=subprocess.STDOUT) as process,
    ):
        wait_for(lambda: "token 64 token train" in log.read_text(), "the verb's start", 120, process)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=120) == 7
        time.sleep(0.5)
        ours = [p for p in psutil.process_iter(["cmdline"]) if "raylet" in " ".join(p.info["cmdline"] or [])]
        assert not [p for p in ours if allocation["SLURM_JOB_ID"] in " ".join(p.info["cmdline"])]
    said = log.read_text()
    assert "saved" in said and "lumen-ray ended with exit code 7; Ray's logs are in /tmp/ray-" in said


@pytest.mark.ray
@pytest.mark.slow
def test_nodes_that_do_not_join_are_counted(allocation):
    environment = allocation | {"FAKE_NODES": "node1 node2 node3", "FAKE_WORKER": "", "LUMEN_RAY_JOIN_S": "40"}
    code, output = submit(environment, *TRAIN)
    assert code == 1
    assert "1 of 3 nodes joined: " in output and "not all nodes joined Ray within 40 s" in output
