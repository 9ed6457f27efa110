"""Runs whose folder is in a bucket, on the `moto` library's S3 server."""

import json
import os
import signal
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from support.ranks import CONTEXT, run_ranks
from support.s3_server import CREDENTIALS, s3_server
from support.tiny_models import CLIP, DINOV2, llm
from support.train_fakes import in_group, log_of, make_job, make_shards

from lumen_ray.data import files, urls
from lumen_ray.data.output_folder import OutputFolder
from lumen_ray.errors import UserError
from lumen_ray.train.launch import PreparedRun, train_local
from lumen_ray.train.metrics.metrics import MetricsWatcher
from lumen_ray.train.run import checkpoint

pytest.importorskip("moto", reason="needs moto[server]")

#: checkpoints after steps 2, 4, 5 (end of the first stage) and 6 (end); one stays, beside the newest of each stage
OPTIONS = {
    "stages": ((5, None), (1, ["lumen"])),
    "checkpoint_every": 2,
    "keep_checkpoints": 1,
    "log_samples": True,
}
ONE_LAYER = {"num_hidden_layers": 1}


@pytest.fixture(scope="module")
def bucket():
    with s3_server("runs") as url:
        yield url


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    vision = {"clip": CLIP | ONE_LAYER, "dinov2": DINOV2 | ONE_LAYER, "mlp_ratio": 2}
    return make_shards(tmp_path_factory.mktemp("bucket"), vision=vision, llm=llm() | ONE_LAYER)


def train_rank(prepared: PreparedRun, publishes: int) -> None:
    """Trains, and dies as of `kill -9` before it publishes a checkpoint for the time `publishes`, counted from 1."""
    os.environ.update(CREDENTIALS)
    publish, left = checkpoint._publish, publishes

    def dies(*args) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        publish(*args)

    checkpoint._publish = dies
    train_local(prepared)


def exit_codes(ranks: int, prepared: PreparedRun, folder: Path, publishes: int = 0) -> list[int | None]:
    """Of the processes of a try."""
    args = (str(folder / f"store{publishes}"), train_rank, (prepared, publishes))
    group = [CONTEXT.Process(target=in_group, args=(rank, *args)) for rank in range(ranks)]
    if ranks == 1:
        group = [CONTEXT.Process(target=train_rank, args=(prepared, publishes))]
    for process in group:
        process.start()
    for process in group:
        process.join(300)
        process.kill()
    return [process.exitcode for process in group]


def lines(location) -> list[dict]:
    return [json.loads(line) for line in files.read_text(location).splitlines()]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_between_shards_and_position_a_run_ends_with_the_bits_of_one_in_a_folder(data, bucket, tmp_path, ranks):
    whole, run, options = tmp_path / "whole", bucket(f"of-{ranks}"), OPTIONS | {"workers": ranks}
    if ranks == 1:
        train_local(make_job(data, whole, **options))
    else:
        assert run_ranks(make_job(data, whole, **options), ranks) == [0] * ranks
    first, *others = exit_codes(ranks, make_job(data, run, **options), tmp_path, publishes=2)
    assert first == -signal.SIGKILL and all(others)
    assert [checkpoint.position(path)["step"] for path in checkpoint.complete(run)] == [2]
    shards = [name for name in files.sizes(urls.join(run, "checkpoints")) if name.endswith(".distcp")]
    assert len(shards) == 2 * ranks  # half of them of the save that was interrupted, which does not count
    assert exit_codes(ranks, make_job(data, run, **options), tmp_path) == [0] * ranks
    name = "model/model.safetensors"
    assert files.read_bytes(urls.join(run, name)) == (whole / name).read_bytes()
    ours, theirs = lines(urls.join(run, "metrics.jsonl")), log_of(whole)
    assert [(line["step"], line["loss"]) for line in ours] == [(line["step"], line["loss"]) for line in theirs]
    for rank in range(ranks):
        ids = {line["step"]: line["image_ids"] for line in lines(whole / "samples" / f"{rank}.jsonl")}
        found = lines(urls.join(run, "samples", f"{rank}.jsonl"))
        assert {line["step"] for line in found} == ids.keys()
        assert all(line["image_ids"] == ids[line["step"]] for line in found)
    names = [[urls.base_name(path) for path in checkpoint.complete(each)] for each in (run, whole)]
    assert names[0] == names[1] == ["0000005-s0", "0000006-s1"]
    kept = {name.split("/")[0] for name in files.sizes(urls.join(run, "checkpoints"))}
    assert kept == set(names[0])
    assert not [name for name in files.sizes(run) if name.endswith("lock")]
    with pytest.raises(UserError, match="holds a run of another recipe") as error:
        make_job(data, run, **options, seed=5)
    assert error.value.reason == "run_exists"


def test_a_bucket_that_is_not_there_is_one_sentence(data, bucket):
    with pytest.raises(UserError, match="'s3://nowhere/one.*cannot be reached; check the bucket's name") as error:
        make_job(data, bucket("one").replace("s3://runs", "s3://nowhere"))
    assert error.value.reason == "store_unreachable" and "\n" not in str(error.value)


@pytest.fixture
def refusing(request):
    """Address of a server that answers every request with a status and the code of an S3 error."""
    status, code = request.param

    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self):
            body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            self.send_response(status)
            self.send_header("x-amz-bucket-region", "eu-west-1")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "refusing", [(403, "AccessDenied"), (301, "PermanentRedirect")], indirect=True, ids=["denied", "wrong region"]
)
def test_a_bucket_that_refuses_is_one_sentence(data, refusing, monkeypatch):
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="cannot be reached; check the bucket's name and region") as error:
        make_job(data, f"s3://runs/one?region=us-east-1&endpoint_override={refusing}&scheme=http")
    assert error.value.reason == "store_unreachable" and "\n" not in str(error.value)


def test_one_process_at_a_time_starts_a_run(data, bucket):
    run = bucket("busy")
    files.write_bytes(
        urls.join(run, "start.lock"),
        json.dumps({"host": "elsewhere", "pid": 1, "token": "x", "started": 0, "renewed": 9e9, "state": {}}).encode(),
    )
    with pytest.raises(UserError, match="being written by process 1 on elsewhere") as error:
        make_job(data, run)
    assert error.value.reason == "run_busy" and not files.exists(urls.join(run, "recipe.json"))


def test_files_are_copied_when_they_change_and_weights_last(bucket, monkeypatch):
    run, copied, copy = bucket("files"), [], files.copy
    monkeypatch.setattr(
        files, "copy", lambda source, target: (copied.append(urls.base_name(target)), copy(source, target))
    )
    with OutputFolder(run) as opened:
        for name in ("model/meta.json", "model/model.safetensors", "model/z.json", "model/.partial/x", "log.jsonl"):
            (opened.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (opened.folder / name).write_text(name)
        opened.upload()
        assert copied == ["log.jsonl", "meta.json", "z.json", "model.safetensors"]
        opened.upload()
        assert len(copied) == 4
        (opened.folder / "log.jsonl").write_text("more")
    assert copied[4:] == ["log.jsonl"] and not opened.folder.exists()
    with OutputFolder(run) as again:
        again.fetch()
        assert [path.name for path in again.folder.iterdir()] == ["log.jsonl"]
        assert (again.folder / "log.jsonl").read_text() == "more"
    assert copied[5:] == ["log.jsonl"]  # fetched, and not copied back


def test_the_watcher_reads_metrics_that_are_replaced(bucket):
    path, steps = bucket("watched/metrics.jsonl"), []
    line = lambda step: json.dumps({"step": step}).encode() + b"\n"  # noqa: E731
    watcher = MetricsWatcher(path, 1, lambda entry: steps.append(entry["step"]))
    watcher._read()
    for content in (line(0) + line(1), line(0) + line(1) + line(2) + b'{"st', line(0) + line(1)[:-2]):
        files.write_bytes(path, content)
        watcher._read()
    files.write_bytes(path, b"".join(map(line, range(5))))
    watcher._read()
    assert steps == [1, 2, 3, 4]
