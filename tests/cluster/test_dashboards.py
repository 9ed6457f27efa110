"""Dashboards and alerts: what they ask for is exported, by the package or by Ray, and what they say is in the pages."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from support.clusters import wait_for
from support.error_reasons import reasons
from support.prometheus import DASHBOARDS, ROOT, needs, panels

from lumen_ray import ray_metrics
from lumen_ray.label.metrics import METRICS as LABEL
from lumen_ray.serve.metrics import METRICS as SERVE
from lumen_ray.train.metrics.prometheus import METRICS as TRAIN

PROMETHEUS = ROOT / "cluster" / "prometheus"
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
#: labels that Prometheus, its operator or Ray gives to all series
EVERYWHERE = {"instance", "job", "SessionName", "WorkerId"}
ENDINGS = {"counter": "_total", "gauge": "", "histogram": "_bucket"}
#: name at Ray's endpoint -> labels
OWN = {f"ray_{m.base}{ENDINGS[m.kind]}": {*m.labels, *(("le",) if m.kind == "histogram" else ())}
       for m in (*TRAIN, *LABEL, *SERVE)}  # fmt: skip


@cache
def rules() -> list[dict]:
    groups = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> list[tuple[str, str]]:
    found = [
        (f"{path.stem}: {panel['title']}", target["expr"])
        for path in DASHBOARDS
        for panel in panels(path)
        for target in panel["targets"]
    ]
    return found + [(rule["alert"], rule["expr"]) for rule in rules()]


@cache
def of_ray() -> str:
    """What the installed Ray says of its metrics: its own dashboards, and the code of Serve's."""
    import ray

    root = Path(ray.__file__).parent
    files = [*(root / "dashboard/modules/metrics/dashboards").glob("*.py"), *(root / "serve/_private").glob("*.py")]
    return "\n".join(path.read_text() for path in files)


def is_of_ray(name: str) -> bool:
    """Serve's code names metrics without the "ray_"."""
    return re.search(rf"\b{name}\b", of_ray()) is not None or f'"{name.removeprefix("ray_")}"' in of_ray()


def metrics_in(expression: str) -> dict[str, set[str]]:
    """Name of a metric of Ray's endpoint -> labels that it is selected by."""
    text = re.sub(r"\b(by|on) \([^)]*\)", "", re.sub(r'"[^"]*"', '""', expression))
    found: dict[str, set[str]] = {}
    for name, matchers in re.findall(r"\b(ray_\w+)(\{[^}]*\})?", text):
        found.setdefault(name, set()).update(re.findall(r"(\w+)\s*[=!]", matchers))
    return found


def labels_of(name: str, labels: set[str]) -> set[str]:
    """Those of `labels` that a metric can have; Ray's metrics all that Ray has a word of."""
    if name in OWN:
        return labels & (OWN[name] | EVERYWHERE)
    return {label for label in labels if label in EVERYWHERE or re.search(rf"\b{label}\b", of_ray())}


@pytest.mark.parametrize(("where", "expression"), expressions(), ids=[where for where, _ in expressions()])
def test_what_is_asked_for_is_exported(where, expression):
    found = metrics_in(expression)
    assert found or expression.startswith("up{")
    assert [name for name in found if name not in OWN and not is_of_ray(name)] == []
    for name, labels in found.items():
        assert labels - labels_of(name, labels) == set(), name
    grouped = {label for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression) for label in labels.split(", ")}
    assert grouped - set().union(*(labels_of(name, grouped) for name in found)) == set()


def test_all_own_metrics_are_shown():
    shown = {name for _, expression in expressions() for name in re.findall(r"\bray_\w+", expression)}
    assert OWN.keys() - shown == set()


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_can_be_imported_and_read(path):
    board = json.loads(path.read_text())
    assert board["uid"] == f"lumen-ray-{path.stem}" and board["schemaVersion"] >= 39 and "__inputs" not in board
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"] | {"type": "datasource", "query": "prometheus"} == variables["datasource"]
    source = {"type": "prometheus", "uid": "${datasource}"}
    for variable in list(variables.values())[1:]:
        assert variable["datasource"] == source and variable["query"]["query"] == variable["definition"]
        metric, label = re.fullmatch(r"label_values\((ray_\w+)(?:\{.*\})?, (\w+)\)", variable["definition"]).groups()
        assert label in OWN[metric] | EVERYWHERE
    every = board["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    assert every[0]["title"] == "Look here first" and [p["type"] for p in every[1:7]] == ["stat"] * 6
    for panel in panels(path):
        field = panel["fieldConfig"]["defaults"]
        assert panel["title"] and panel["datasource"] == source and field["unit"], panel["title"]
        assert field["thresholds"]["steps"][0]["value"] is None
        values = [step["value"] for step in field["thresholds"]["steps"][1:]]
        assert values == sorted(values)
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEF"[: len(panel["targets"])])
        assert all(target["legendFormat"] for target in panel["targets"])
        used = set(re.findall(r"\$(\w+)", " ".join(t["expr"] for t in panel["targets"]))) - {"__rate_interval"}
        assert used <= variables.keys()
    for one, other in combinations([panel["gridPos"] for panel in every], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert one["x"] + one["w"] <= 24


def headings(page: str) -> set[str]:
    return {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", page, re.MULTILINE)}


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_every_alert_says_what_to_do(rule):
    notes = rule["annotations"]
    assert set(notes) == {"summary", "action", "runbook_url"} and len(notes["action"]) > 40
    assert rule["labels"]["severity"] in ("info", "warning", "critical")
    page, _, anchor = notes["runbook_url"].partition("#")
    assert page.endswith("/lumen-ray/lumen-ray/blob/main/docs/operations.md")
    assert anchor == rule["alert"].lower() and anchor in headings(OPERATIONS)


def test_the_page_has_a_section_for_every_alert_in_their_order():
    section = OPERATIONS[OPERATIONS.index("## What to do when") : OPERATIONS.index("## A week-long")]
    assert re.findall(r"^### (.*)$", section, re.MULTILINE) == [rule["alert"] for rule in rules()]


def test_the_page_names_what_is_exported():
    rows = re.findall(r"^\| `(lumen_\w+)` \| (.*?) \|", OPERATIONS, re.MULTILINE)
    named = {name: re.findall(r"`(\w+)`", labels) for name, labels in rows}
    assert named == {metric.name: list(metric.labels) for metric in (*TRAIN, *LABEL)}


def test_the_page_of_errors_has_every_reason_once():
    page = (ROOT / "docs" / "errors.md").read_text()
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| \S", page, re.MULTILINE)
    named = [reason for row in rows for reason in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(reasons())


def test_the_alerts_for_the_operator_are_the_same():
    document = yaml.safe_load((ROOT / "cluster/kuberay/monitoring/rules.yaml").read_text())
    assert document["spec"]["groups"] == yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_the_component_renders():
    command = ["kubectl", "kustomize", ROOT / "cluster/kuberay/monitoring"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    documents = list(yaml.safe_load_all(text))
    boards = {d["metadata"]["name"]: d["data"] for d in documents if d["kind"] == "ConfigMap"}
    assert boards == {f"lumen-ray-{p.stem}": {p.name: p.read_text()} for p in DASHBOARDS}
    assert sorted(d["kind"] for d in documents) == [*["ConfigMap"] * 3, "PodMonitor", "PrometheusRule"]
    assert {d["metadata"]["namespace"] for d in documents} == {"lumen-ray"}


def test_the_pods_that_prometheus_looks_for_are_those_of_the_cluster():
    monitor = yaml.safe_load((ROOT / "cluster/kuberay/monitoring/pods.yaml").read_text())["spec"]
    cluster = yaml.safe_load((ROOT / "cluster/kuberay/base/cluster.yaml").read_text())["spec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        labels = group["template"]["metadata"]["labels"]
        assert monitor["selector"]["matchLabels"].items() <= labels.items()
    ports = {port["name"] for port in groups[0]["template"]["spec"]["containers"][0]["ports"]}
    assert {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]} <= ports


@needs("promtool")
@pytest.mark.parametrize("what", ["check config prometheus.yml", "test rules rules_test.yml"])
def test_promtool_accepts_them(what):
    *command, file = what.split()
    done = subprocess.run(["promtool", *command, PROMETHEUS / file], capture_output=True, text=True)
    assert done.returncode == 0 and "SUCCESS" in done.stdout, done.stdout + done.stderr


def test_every_alert_is_tried():
    tried = (PROMETHEUS / "rules_test.yml").read_text()
    assert [rule["alert"] for rule in rules() if f'alertname="{rule["alert"]}"' not in tried] == []


def test_a_metric_that_ray_does_not_take_is_given_up(monkeypatch):
    from ray.util import metrics

    metric = ray_metrics.Metric("gauge", "lumen_test_value", "", ("run",))
    metric.record(1, run="a")  # before `export_to_ray` it counts nothing

    class Refused:
        def __init__(self, *_):
            pass

        def set(self, value, labels):
            raise ValueError("no")

    monkeypatch.setattr(metrics, "Gauge", Refused)
    metric.export_to_ray()
    with pytest.warns(UserWarning, match="lumen_test_value is no longer exported: no"):
        metric.record(1, run="a")
    metric.record(1, run="a")


def test_names_that_are_no_unicode_are_labels_too(monkeypatch):
    from ray.util import metrics

    seen = []
    monkeypatch.setattr(metrics.Gauge, "set", lambda self, value, labels: seen.append(labels))
    metric = ray_metrics.Metric("gauge", "lumen_test_name", "", ("run",))
    metric.export_to_ray()
    metric.record(1, run="/data/caf\udce9")
    assert seen == [{"run": "/data/caf\\udce9"}]


def test_gauges_are_sent_again_until_they_are_forgotten(monkeypatch):
    """Ray sends each value once."""
    from ray.util import metrics

    seen: list = []
    monkeypatch.setattr(metrics.Gauge, "set", lambda self, value, labels: seen.append((value, labels["run"])))
    monkeypatch.setattr(ray_metrics, "REPEAT_S", 0.01)
    monkeypatch.setattr(ray_metrics, "in_ray", lambda: True)
    monkeypatch.setattr(ray_metrics, "_repeater", ray_metrics._Repeater())
    metric = ray_metrics.Metric("gauge", "lumen_test_repeated", "", ("run",))
    metric.export_to_ray()
    metric.record(1, run="one")
    metric.record(2, run="two")
    metric.record(3, run="one")
    wait_for(lambda: seen[-4:].count((3, "one")) == seen[-4:].count((2, "two")) == 2, "repetitions", 60)
    metric.forget(run="one")
    wait_for(lambda: seen[-2:] == [(2, "two")] * 2, "repetitions of the other", 60)
