"""The renderer of the tests: mistakes are errors, never something else than what kubectl renders."""

import pytest

from lumen_ray.cluster.kustomize import render
from lumen_ray.errors import UserError

CONFIG_MAP = """
apiVersion: v1
kind: ConfigMap
metadata: {name: one}
data: &data {a: "1"}
other: *data
groups:
- {name: x, containers: [{image: app}]}
- {name: y, containers: [{image: other}]}
"""


@pytest.fixture
def write(tmp_path):
    def write(kustomization: str) -> list:
        (tmp_path / "one.yaml").write_text(CONFIG_MAP)
        (tmp_path / "two.yaml").write_text(CONFIG_MAP.replace("name: one", "name: two"))
        (tmp_path / "kustomization.yaml").write_text("resources: [one.yaml, two.yaml]\n" + kustomization)
        return render(tmp_path)

    return write


def test_patches_change_one_document_and_not_what_an_alias_stands_for(write):
    one, two = write(
        "patches:\n- target: {kind: ConfigMap, name: one}\n  patch: |-\n"
        "    - {op: replace, path: /data/a, value: '2'}\n    - {op: add, path: /metadata/labels, value: {a~b: c}}\n"
        "    - {op: remove, path: /groups/1}\n"
    )
    assert (one["data"], one["other"], len(one["groups"])) == ({"a": "2"}, {"a": "1"}, 1)
    assert (two["data"], len(two["groups"])) == ({"a": "1"}, 2)


def test_images_and_namespace(write):
    one, _ = write("namespace: ns\nimages: [{name: app, newName: host/app, newTag: '3'}]\n")
    assert [g["containers"][0]["image"] for g in one["groups"]] == ["host/app:3", "other"]
    assert one["metadata"]["namespace"] == "ns"


def test_replacements_copy_behind_patches(write):
    one, two = write(
        "patches:\n- target: {name: one}\n  patch: |-\n    - {op: replace, path: /groups/0/containers, value: []}\n"
        "replacements:\n- source: {kind: ConfigMap, name: one, fieldPath: 'groups.[name=x].containers'}\n  targets:\n"
        "  - {select: {kind: ConfigMap}, reject: [{name: one}], fieldPaths: ['groups.[name=y].containers'], "
        "options: {create: true}}\n"
    )
    assert two["groups"][1]["containers"] == [] and one["groups"][1]["containers"] != []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("commonLabels: {a: b}\n", "unknown key 'commonLabels'"),
        ("patches: [{target: {name: three}, patch: '[]'}]\n", "no document matches"),
        ("patches: [{target: {name: o.*}, patch: '[]'}]\n", "'patches.0.target.name' is invalid"),
        ("patches: [{target: {name: one}}]\n", "either 'patch' or 'path'"),
        ("patches: [{target: {name: one}, path: nowhere.yaml}]\n", "not a file that can be read"),
        ("patches: [{target: {name: one}, patch: 'data: {b: 1}'}]\n", "a list of operations"),
        ("patches: [{target: {name: one}, patch: '[{op: replace, path: /b, value: 1}]'}]\n", "one has no /b"),
        ("patches: [{target: {name: one}, patch: '[{op: add, path: /groups/a/b, value: 1}]'}]\n", "has no /groups/a/b"),
        (
            "patches: [{target: {name: one}, patch: '[{op: move, path: /data, from: /b}]'}]\n",
            "patch: .*'op' is invalid",
        ),
        ("patches: [{target: {name: one}, patch: '[{op: add, path: /groups/0, value: 1}]'}]\n", "add in a list"),
        ("replacements: [{source: {kind: ConfigMap, fieldPath: data}, targets: []}]\n", "2 documents match"),
        ("replacements: [{source: {name: one, fieldPath: 'groups.[name=z]'}, targets: []}]\n", r"no \[name=z\]"),
        ("components: [nowhere]\n", "does not exist"),
        ("patches: [\n", "is not valid YAML"),
    ],
)
def test_mistakes_are_named(write, text, message):
    with pytest.raises(UserError, match=message):
        write(text)
