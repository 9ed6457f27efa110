"""Rejected records: each with its rule and how to mend it, and jobs that stop if too many are rejected."""

import pytest
from support.source_fakes import prepare_coco

from lumen_ray.data.command import prepared_line, prepared_lines
from lumen_ray.data.shards.prepare import prepare_source
from lumen_ray.data.sources.scenes import ScenesSource
from lumen_ray.errors import UserError


def test_rejected_records_name_rule_and_mend(tmp_path, small_coco):
    path, images = small_coco
    summary = prepare_coco(tmp_path / "out", [path], images, workers=0)
    rules = {rule["rule"]: rule for rule in summary["rules"]}
    assert {name: rule["records"] for name, rule in rules.items()} == {
        "unknown_image": 1, "empty_box": 1, "broken_image": 1, "image_rejected": 1,
    }  # fmt: skip
    assert rules["unknown_image"]["first"]["origin"] == "instances.json annotation 101"
    assert rules["broken_image"]["mend"] == "replace the image file, or save it again as JPEG or PNG"
    lines = prepared_lines(summary)
    assert lines[0] == prepared_line(summary) and "note: 'instances.json' has annotations of images" in lines[1]
    assert any(line.startswith("rejected 1, broken_image: instances.json image 4: the image cannot") for line in lines)


@pytest.mark.parametrize("limit", ["5%", "5", 5, 9.0])
def test_a_job_of_which_too_much_is_rejected_stops(tmp_path, small_coco, limit):
    path, images = small_coco
    with pytest.raises(
        UserError, match="of 11 annotations are rejected, more than .%: instances.json annotation"
    ) as error:
        prepare_coco(tmp_path / "out", [path], images, rows_per_file=4, workers=0, max_rejected=limit)
    assert error.value.reason == "too_many_rejected" and str(error.value).endswith("nothing was written")
    assert not (tmp_path / "out" / "manifest.json").exists() and not list((tmp_path / "out").glob(".staging*"))
    summary = prepare_coco(tmp_path / "out", [path], images, workers=0, max_rejected="30%")
    assert summary["rejected"] == 4


def test_a_job_stops_before_the_rest_is_read(tmp_path, small_coco):
    path, images = small_coco
    for image in images.glob("[0-3].jpg"):
        image.unlink()
    seen = []
    with pytest.raises(UserError, match="images are rejected, more than 20%: .* is missing .add the image file"):
        prepare_coco(tmp_path / "out", [path], images, rows_per_file=1, workers=0, max_rejected="20%",
                     progress=lambda done, total: seen.append(done))  # fmt: skip
    assert len(seen) < 8


@pytest.mark.parametrize("limit", ["x", "-1%", "101%", True, "nan"])
def test_shares_that_are_none_are_refused(tmp_path, limit):
    with pytest.raises(UserError, match="max_rejected must be a share from 0% to 100%"):
        prepare_source(tmp_path / "out", ScenesSource(1, 0, 128), workers=0, max_rejected=limit)
