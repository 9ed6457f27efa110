"""Labels scored against shards: what is right, and what tells right from wrong."""

import json

import numpy as np
import pytest
from support.evaluate_fakes import write_split
from support.label_fakes import FakeListing

from lumen_ray.data.scenes.render import scene_row
from lumen_ray.errors import UserError
from lumen_ray.evaluate import labelled
from lumen_ray.inference.records import LABEL_SCHEMA
from lumen_ray.label.inputs import Item
from lumen_ray.label.ledger import Ledger


@pytest.fixture
def folders(tmp_path):
    """Labels with each object, and one wrong box an image; right ones are verified with 0.9, wrong ones with 0.1."""
    rows = [scene_row(4, n) for n in range(5)]
    shards = write_split(tmp_path / "shards", rows)
    ledger = Ledger(tmp_path / "labels")
    ledger.open({"tasks": ["detect"], "input": str(shards)})
    by_id = {row["image_id"]: row for row in rows}
    for fragment in ledger.plan(2).fragments(
        FakeListing([Item(row["image_id"], f"{shards}/{row['image_id']}") for row in rows])
    ):
        records = []
        for item in fragment.items:
            row = by_id[item.image_id]
            base = dict.fromkeys(LABEL_SCHEMA.names) | {"image_id": item.image_id, "path": item.path, "task": "detect"}
            base |= {"height": 128, "width": 128}
            for instance in row["instances"]:
                box = [float(v) for v in instance["box"]]
                found = {"phrase": instance["phrase"], "box": box, "score": 0.5, "verified": 0.9}
                records.append(base | found)
            wrong = {"phrase": "unicorn", "box": [0.0, 0.0, 9.0, 9.0], "score": 0.5, "verified": 0.1}
            records.append(base | wrong)
        ledger.publish(fragment.index, len(fragment.items), records, [])
    return tmp_path / "labels", shards, sum(len(row["instances"]) for row in rows)


def test_right_and_wrong_instances_are_told_apart(folders, capsys):
    labels, shards, objects = folders
    assert labelled.main([str(labels), "--shards", str(shards)]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["images"], values["objects"], values["instances"]) == (5, objects, objects + 5)
    assert values["right"] == objects and values["recall"] == 1 and values["AP50"] == pytest.approx(1)
    assert values["auc"] == {"score": 0.5, "verified": 1.0}


def test_the_auc_is_the_share_of_pairs_in_order():
    right = np.array([True, True, False, False])
    numbers = {"score": np.array([0.9, 0.2, 0.5, 0.1]), "verified": np.full(4, np.nan)}
    assert labelled._aucs(right, numbers) == {"score": 0.75}


def test_folders_without_labels_of_the_images_are_refused(folders, tmp_path, capsys):
    labels, shards, _ = folders
    with pytest.raises(UserError, match="holds no pose labels of the images"):
        labelled.score(labels, shards, "pose")
    with pytest.raises(UserError, match="give an output folder of `lumen-ray label`"):
        labelled.score(tmp_path, shards)
    assert labelled.main([str(labels), "--shards", str(shards), "--task", "detct"]) == 2
    assert "did you mean 'detect'" in capsys.readouterr().out
