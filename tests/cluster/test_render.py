"""`lumen-ray cluster render`: sizes that follow from the preset, places and names as asked, and what is refused."""

import shlex
import subprocess
from functools import cache

import pytest
import yaml

from lumen_ray import cli, config
from lumen_ray.cluster.manifests import container, group, job_of, quantity, ray_cluster_of, templates
from lumen_ray.cluster.needs import GIB, STORE_SHARE, Needs
from lumen_ray.cluster.render import command_of, render
from lumen_ray.cluster.request import VERBS, RenderRequest
from lumen_ray.cluster.yaml_text import Figure, dump
from lumen_ray.errors import UserError
from lumen_ray.footprint import FP32, combined
from lumen_ray.plan.gpus import GPUS, Gpu
from lumen_ray.presets import find

LARGE = ("prepare", "train", "label", "serve")  # to count what a 7B model needs takes seconds
#: one of each place and size: the 7B model on a bucket, a small one on the volume, and a laptop
REQUESTS = {
    "7b": RenderRequest(
        "7b", 32, "s3://bucket/path", LARGE, "h100", overlay="eks", history=True, secret="keys", namespace="team"
    ),
    "small": RenderRequest("small", 4, "/data/set", VERBS, "l4", 2, overlay="gke", queue="gpus", cpu_workers=3),
    "nano": RenderRequest("nano", 0, "/data", VERBS, overlay="kind"),
}
every_request = pytest.mark.parametrize("name", REQUESTS)


@cache
def rendered(request):
    return render(request)


@cache
def needs_of(name):
    return Needs(REQUESTS[name], "7b")


def documents(name):
    """(kind, name) -> document, as kubectl reads the files."""
    texts = rendered(REQUESTS[name]).values()
    found = [document for text in texts for document in yaml.safe_load_all(text)]
    return {(document["kind"], document["metadata"]["name"]): document for document in found}


def cluster(name, part):
    [found] = [d for (kind, n), d in documents(name).items() if n == part and kind.startswith("Ray")]
    return ray_cluster_of(found)


def job(name, part):
    [found] = [job_of(d) for (_, n), d in documents(name).items() if n == part and job_of(d)]
    return found


def limits(workers):
    return container(workers["template"])["resources"]["limits"]


# What is rendered ----------------------------------------------------------------------------------------------------


@every_request
def test_commands_are_of_lumen_ray_and_read_and_write_the_storage(name):
    request, found = REQUESTS[name], {}
    for part in set(request.verbs) - {"serve", "interactive"}:
        words = found[part] = shlex.split(job(name, part)["entrypoint"])
        args = cli.build_parser().parse_args(words[1:])
        if part == "train":
            assert config.load_yaml(find("recipes", args.recipe))["model"] == request.preset
            assert args.output.startswith("/data/")  # a run needs a file system
        places = [word for word in words if "/" in word and not word.startswith(("/models/", request.shared))]
        assert all(place.startswith(request.storage.rstrip("/")) for place in places), places
    assert found["prepare"][-1] == found["train"][found["train"].index("--shards") + 1]
    run = found["train"][found["train"].index("--output") + 1]
    model = "nano" if name == "nano" else f"{run}/model"
    assert model in found["label"] and model in found.get("evaluate", found["label"])
    assert [word for word in found.get("nightly", found["label"]) if word != "--refresh"] == found["label"]


def test_a_store_that_asks_for_quotes_and_a_port_gets_them():
    options = "?endpoint_override=minio:9000&scheme=http"
    files = rendered(RenderRequest("nano", 2, f"s3://b/x{options}", ("prepare", "train")))
    words = shlex.split(yaml.safe_load(files["train.yaml"])["spec"]["entrypoint"])
    assert words[words.index("--shards") + 1] == f"s3://b/x/shards/coco{options}"
    policy = next(d for d in yaml.safe_load_all(files["common.yaml"]) if d["kind"] == "NetworkPolicy")
    assert {"port": 9000, "protocol": "TCP"} in policy["spec"]["egress"][-1]["ports"]


def test_training_pods_are_nodes():
    recipe, workers = needs_of("7b").recipe, group(cluster("7b", "train"), "gpu")
    assert workers["replicas"] * int(limits(workers)["nvidia.com/gpu"]) == recipe.workers == REQUESTS["7b"].gpus
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 4
    assert int(limits(workers)["cpu"]) >= 8 * (recipe.readers + 1)
    rows = recipe.batch_size // recipe.workers // max(s.accumulate for s in recipe.stages)
    assert f"--rows-per-group {rows} " in job("7b", "prepare")["entrypoint"]


def test_training_pods_hold_the_model_and_a_checkpoint():
    needs, workers = needs_of("small"), group(cluster("small", "train"), "gpu")
    held = needs.footprint.model.parameters * FP32 + needs.footprint.memory(1)
    assert needs.training().counted >= held
    memory = quantity(limits(workers)["memory"])
    assert needs.training().processes <= memory * (1 - STORE_SHARE)
    assert int(workers["rayStartParams"]["object-store-memory"]) == pytest.approx(memory * STORE_SHARE)


def test_a_larger_preset_gets_larger_pods():
    memory = [quantity(limits(group(cluster(name, "train"), "gpu"))["memory"]) for name in ("small", "7b")]
    assert memory[0] < memory[1]
    needs = needs_of("small")
    assert combined(needs.roles).parameters * FP32 < memory[0]
    assert limits(group(cluster("small", "train"), "gpu"))["nvidia.com/gpu"] == "1"  # the recipe has one worker


@pytest.mark.parametrize(("name", "gpus"), [("7b", 32), ("small", 4)])
def test_actors_and_replicas_are_at_most_as_many_as_gpus(name, gpus):
    assert f"--actors 1:{gpus}" in job(name, "label")["entrypoint"]
    labelling = group(cluster(name, "label"), "gpu")
    assert (labelling["minReplicas"], labelling["maxReplicas"]) == (1, gpus)
    service = documents(name)["RayService", "serve"]["spec"]
    args = yaml.safe_load(service["serveConfigV2"])["applications"][0]["args"]
    sections = [args["trunk"], *args["decoders"].values()]
    most = sum(s["num_gpus"] * s["autoscaling"]["max_replicas"] for s in sections)
    serving = group(cluster(name, "serve"), "gpu")
    assert most <= serving["maxReplicas"] <= gpus / 1.25  # an upgrade takes a quarter more
    assert sum(s["num_gpus"] for s in sections) <= serving["minReplicas"]
    assert sum(s["num_cpus"] for s in sections) < int(limits(serving)["cpu"])


def test_an_evaluation_leaves_a_cpu_to_ray():
    assert job("small", "evaluate")["entrypointNumCpus"] < int(
        limits(group(cluster("small", "evaluate"), "gpu"))["cpu"]
    )


@every_request
def test_the_served_decoders_are_those_of_the_preset(name):
    from lumen_ray.serve.config_file import check_serve_file

    served = yaml.safe_load(documents(name)["RayService", "serve"]["spec"]["serveConfigV2"])
    check_serve_file(served, name)
    args = served["applications"][0]["args"]
    assert tuple(args["decoders"]) == needs_of(name).settings.decoder_names
    assert args["model"] == ("nano" if name == "nano" else f"/models/lumen-{REQUESTS[name].preset}")


@every_request
def test_every_document_fits_the_schemas(name, check, check_kubernetes):
    for document in documents(name).values():
        assert (check if document["apiVersion"].startswith("ray.io/") else check_kubernetes)(document) == []
        for _, template in templates(document):
            pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "a"}, "template": template}
            assert check_kubernetes(pod) == []


@every_request
def test_names_images_and_nodes_are_as_asked(name):
    request = REQUESTS[name]
    for (kind, _), document in documents(name).items():
        if kind not in ("Namespace", "ClusterRole", "ClusterRoleBinding"):
            assert document["metadata"]["namespace"] == request.namespace
        for group_name, template in templates(document):
            images = {each["image"] for each in template["spec"]["containers"]} - {
                "quay.io/kuberay/historyserver:v1.7.0"
            }
            [image] = images
            assert image == f"lumen-ray:0.1.0-{'cuda' if group_name == 'gpu' and request.gpus else 'cpu'}"
            asks = "nvidia.com/gpu" in container(template)["resources"]["limits"]
            assert asks == (group_name == "gpu" and request.gpus > 0)
            if asks:
                label = {"7b": "h100", "small": "nvidia-l4"}[name]
                assert label in template["spec"]["nodeSelector"].values()
    secrets = {s["secretRef"]["name"] for _, t in templates(documents(name)["RayJob", "train"])
               for s in container(t).get("envFrom", [])}  # fmt: skip
    assert secrets == {request.secret or "lumen-env"}
    queue = documents(name)["RayJob", "train"]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert queue == request.queue
    if request.cpu_workers:
        assert group(cluster(name, "prepare"), "cpu")["maxReplicas"] == request.cpu_workers


def test_the_history_server_and_its_collectors_have_the_bucket():
    found = documents("7b")
    [server, dashboard] = found["Deployment", "history-server"]["spec"]["template"]["spec"]["containers"]
    wanted = {"STORAGE_BACKEND": "s3", "S3_BUCKET": "bucket", "STORAGE_ROOT_DIR": "path/history"}
    environments = [server["env"]]
    for document in found.values():
        if spec := ray_cluster_of(document):
            environments.append(spec["historyServerOptions"]["collectorOptions"]["env"])
    assert len(environments) == 1 + len(LARGE)
    for environment in environments:
        assert {item["name"]: item["value"] for item in environment if "value" in item} == wanted
        keys = [item["valueFrom"]["secretKeyRef"]["name"] for item in environment if "valueFrom" in item]
        assert keys == ["keys", "keys"]
    assert dashboard["command"][:2] == ["ray", "start"]
    [subject] = found["ClusterRoleBinding", "lumen-ray-history-server"]["subjects"]
    assert subject["namespace"] == "team"
    assert not any("historyServerOptions" in text for text in rendered(REQUESTS["small"]).values())


def test_the_dashboards_options_are_of_ray():
    from ray.scripts.scripts import start

    command = [d for d in documents("7b").values() if d["kind"] == "Deployment"][0]
    words = command["spec"]["template"]["spec"]["containers"][1]["command"][2:]
    assert not start.make_context("start", list(words), resilient_parsing=False).args


# Text ----------------------------------------------------------------------------------------------------------------


def test_the_same_request_gives_the_same_bytes_and_says_which_it_was():
    request = REQUESTS["nano"]
    assert render(request) == rendered(request)
    line = rendered(request)["train.yaml"].splitlines()[1].removeprefix("#   ")
    assert line == command_of(request)
    args = cli.build_parser().parse_args([*shlex.split(line)[1:], "--output", "x"])
    assert (args.preset, args.gpus, args.overlay, tuple(args.verbs)) == ("nano", 0, "kind", VERBS)


def test_a_figure_has_its_reason_behind_or_above():
    text = dump({"a": {"short": Figure("8", "GPUs"), "long": Figure(3, "word " * 40)}, "b": "x y " * 40})
    assert "short: '8'  # GPUs\n" in text
    assert text.index("# word") < text.index("  long: 3\n")
    assert yaml.safe_load(text) == {"a": {"short": "8", "long": 3}, "b": "x y " * 40}
    sized = [line for line in rendered(REQUESTS["7b"])["train.yaml"].splitlines() if "# " in line]
    assert any("32 workers of recipe '7b'" in line for line in sized)


# The command ---------------------------------------------------------------------------------------------------------


def run(capsys, *words):
    status = cli.main(["cluster", "render", *words])
    return status, capsys.readouterr()


def test_files_are_written_and_can_be_rendered_again(tmp_path, capsys):
    words = ("--preset", "nano", "--gpus", "0", "--storage", "/data", "--overlay", "kind", "--for", "train,label")
    for _ in range(2):
        status, said = run(capsys, *words, "--output", str(tmp_path / "out"))
        assert status == 0, said.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"common.yaml", "train.yaml", "label.yaml"}
    (tmp_path / "out" / "train.yaml").write_text("mine")
    status, said = run(capsys, *words, "--output", str(tmp_path / "out"))
    assert status == 2 and "was not rendered by lumen-ray" in said.err
    assert (tmp_path / "out" / "train.yaml").read_text() == "mine"


def test_changes_come_last_and_may_be_kubectl_kustomizations(tmp_path):
    (tmp_path / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1alpha1\nkind: Component\npatches:\n"
        "- target: {kind: RayJob, name: train}\n  patch: |-\n    - {op: replace, path: /spec/backoffLimit, value: 9}\n"
    )
    files = render(RenderRequest("nano", 0, "/data", ("train",), overlay="kind", changes=tmp_path))
    assert yaml.safe_load(files["train.yaml"])["spec"]["backoffLimit"] == 9


@pytest.mark.parametrize(
    ("patch", "sentence"),
    [
        ("add, path: /spec/backofLimit, value: 1", "RayJob 'train': spec has no field 'backofLimit'; did you mean"),
        ("add, path: /spec/rayClusterSpec/headGroupSpec/template/spec/nodeSelectr, value: {}", "mean 'nodeSelector'?"),
        ("add, path: /spec/backoffLimit, value: many", "spec.backoffLimit: 'many' is not of type 'integer'"),
        ("replace, path: /spec/trian, value: 1", "RayJob train has no /spec/trian"),
    ],
)
def test_changes_with_an_unknown_field_are_refused(tmp_path, crds, patch, sentence):
    (tmp_path / "kustomization.yaml").write_text(
        f"patches:\n- target: {{kind: RayJob, name: train}}\n  patch: |-\n    - {{op: {patch}}}\n"
    )
    with pytest.raises(UserError) as caught:
        render(RenderRequest("nano", 0, "/data", ("train",), overlay="kind", changes=tmp_path, crds=crds))
    assert sentence in str(caught.value)


NANO = "--preset nano --gpus 2 --storage s3://b/x"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--preset nanno --gpus 8 --storage /data", "unknown model 'nanno'; did you mean 'nano'?"),
        ("--preset mine.yaml --gpus 8 --storage /data", "is a file, which the image does not have"),
        ("--preset visionllm-v2 --gpus 8 --storage /data", "has no recipe of its name"),
        (
            "--preset 7b --gpus 16 --storage /data --for train",
            "recipe '7b' trains on 32 GPUs and --gpus is 16; give --gpus 32, or --workers 16",
        ),
        ("--preset 7b --gpus 1 --storage /data --for serve --gpu l4", "takes 2 GPUs"),
        ("--preset small --gpus 0 --storage /data --overlay kind --for train", "trains in bf16, which needs GPUs"),
        (f"{NANO} --storage /home/me", "the pods cannot see '/home/me'"),
        (f"{NANO} --storage /database", "the pods cannot see '/database'"),
        (f"{NANO} --storage https://b/x", "is no bucket that can be written"),
        (f"{NANO} --storage s3://", "names no bucket"),
        (f"{NANO} --storage s3://key:secret@b/x", "put them into a Secret and give --secret"),
        (f"{NANO} --storage s3://b/x?access_key=k&secret_key=s", "put them into a Secret and give --secret"),
        ("--preset 7b --gpus 0 --storage /data --overlay kind --for label", "GiB, and the pods of kind have 6Gi"),
        (f"{NANO} --gpus 0", "only --overlay kind is rendered"),
        (f"{NANO} --overlay kind", "kind's node has none; give --gpus 0"),
        (f"{NANO} --gpus 3 --gpus-per-node 2", "give --gpus 4"),
        (f"{NANO} --gpus-per-node 0", "--gpus-per-node is 0; give 1 or more"),
        (f"{NANO} --overlay ekz", "unknown overlay 'ekz'; did you mean 'eks'?"),
        (f"{NANO} --overlay eks --gpu rtx-4090", "overlay 'eks' knows no nodes with 'rtx-4090'"),
        (f"{NANO} --gpu h101", "unknown gpu 'h101'"),
        (f"{NANO} --for train,sreve", "unknown part 'sreve'; did you mean 'serve'?"),
        (f"{NANO} --recipe quickstartt", "unknown recipe 'quickstartt'"),
        (f"{NANO} --recipe 7b", "recipe '7b' trains '7b' and not 'nano'"),
        (f"{NANO} --gpus 3 --gpus-per-node 3 --workers 3", "cannot split a batch of 16 evenly over 3 workers"),
        (f"{NANO} --namespace My_Team", "--namespace 'My_Team' is no name in Kubernetes"),
        (f"{NANO} --image a$b", "--image 'a$b' is no image"),
        (f"{NANO} --history --storage /data", "keeps logs in a bucket"),
        (f"{NANO} --changes nowhere", "kustomization 'nowhere/kustomization.yaml' does not exist"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_writes_nothing(words, sentence, tmp_path, capsys):
    status, said = run(capsys, *words.split(), "--output", str(tmp_path / "out"))
    assert status == 2 and sentence in said.err, said.err
    assert said.err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ("train", "recipe 'nano' needs more than 0 GB on each of 2 GPUs, and a toy has 0 GB; give another --gpu"),
        ("label", "preset 'nano' needs about 1."),
        ("serve", "trunk of 'nano' takes 1 GB in bfloat16, and a toy has 0 GB; give a GPU with more memory"),
    ],
)
def test_a_model_that_does_not_fit_on_the_gpu_is_refused(part, sentence, monkeypatch):
    monkeypatch.setitem(GPUS, "toy", Gpu("toy", "L4", 1e6, 1e9))
    with pytest.raises(UserError) as caught:
        render(RenderRequest("nano", 2, "/data", (part,), "toy"))
    assert sentence in str(caught.value)


def test_kubectl_takes_the_files(tmp_path):
    """Without a server, kubectl's kustomize at least reads them."""
    import shutil

    if (kubectl := shutil.which("kubectl")) is None:
        pytest.skip("kubectl is not installed")
    for name, text in rendered(REQUESTS["7b"]).items():
        (tmp_path / name).write_text(text)
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump({"resources": sorted(rendered(REQUESTS["7b"]))}))
    done = subprocess.run([kubectl, "kustomize", tmp_path], capture_output=True, text=True, timeout=60)
    if "unknown command" in done.stderr:
        pytest.skip("this kubectl has no kustomize")
    assert done.returncode == 0, done.stderr
    assert len(list(yaml.safe_load_all(done.stdout))) == len(documents("7b"))
    assert quantity("1Gi") == GIB
