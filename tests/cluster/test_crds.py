"""Schemas that are read from a cluster's CRDs."""

import pytest
import yaml

from lumen_ray.cluster.render import render
from lumen_ray.cluster.request import RenderRequest
from lumen_ray.cluster.schemas import Schemas, strict
from lumen_ray.errors import UserError


def test_what_is_rendered_fits_the_crds(crds):
    verbs = ("prepare", "train", "evaluate", "label", "nightly", "serve", "interactive")
    files = render(RenderRequest("7b", 32, "s3://b/x", verbs, crds=crds))
    assert {f"{verb}.yaml" for verb in verbs} <= files.keys()


def test_fields_that_are_not_named_are_refused_at_all_depths():
    crd = {
        "type": "object",
        "properties": {
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "port": {"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}]},
            "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True, "properties": {"a": {}}},
            "list": {"type": "array", "items": {"type": "object", "properties": {"properties": {"type": "string"}}}},
        },
    }
    made = strict(crd)
    assert made["additionalProperties"] is False
    assert made["properties"]["labels"] == crd["properties"]["labels"]
    assert made["properties"]["port"] == {"type": ["integer", "string"]}
    assert "additionalProperties" not in made["properties"]["free"]
    assert made["properties"]["list"]["items"]["additionalProperties"] is False
    assert made["properties"]["list"]["items"]["properties"] == {"properties": {"type": "string"}}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("kind: List\nitems: []\n", "no kind of ray.io/v1 is in it"),
        ("just text", "no kind of ray.io/v1 is in it"),
        ("a: [", "expected the node content"),
        (None, "No such file"),
    ],
)
def test_a_file_without_crds(tmp_path, text, sentence):
    path = tmp_path / "crds.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match="write it with: kubectl get crd") as caught:
        Schemas(path)
    assert caught.value.reason == "invalid_crds" and "\n" not in str(caught.value)
    assert sentence in str(caught.value) or text == "a: ["


def test_a_kind_that_the_cluster_does_not_have(tmp_path, crds):
    listed = yaml.safe_load(crds.read_text())
    listed["items"] = [item for item in listed["items"] if item["spec"]["names"]["kind"] != "RayCronJob"]
    path = tmp_path / "crds.yaml"
    path.write_text(yaml.safe_dump(listed))
    with pytest.raises(UserError, match="it has no RayCronJob"):
        render(RenderRequest("nano", 0, "/data", ("nightly",), overlay="kind", crds=path))
