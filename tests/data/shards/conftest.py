"""Fixtures of the tests of shard folders."""

import json

import numpy as np
import pytest

from lumen_ray.data.scenes.render import encode_jpeg


@pytest.fixture
def small_coco(tmp_path):
    """Nine photos, one of them truncated, with an object each and one degenerate box."""
    images = tmp_path / "images"
    images.mkdir()
    listed, annotations = [], []
    for number in range(9):
        data = encode_jpeg(np.full((32, 48, 3), number * 20, np.uint8))
        (images / f"{number}.jpg").write_bytes(data[:200] if number == 4 else data)
        listed.append({"id": number, "file_name": f"{number}.jpg", "height": 32, "width": 48})
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": [number, 2, 10, 10]})
    annotations.append({"id": 100, "image_id": 0, "category_id": 1, "bbox": [1, 2, 0, 10]})
    annotations.append({"id": 101, "image_id": 77, "category_id": 1, "bbox": [1, 2, 3, 10]})
    path = tmp_path / "instances.json"
    categories = [{"id": 1, "name": "cell"}]
    path.write_text(json.dumps({"images": listed, "annotations": annotations, "categories": categories}))
    return path, images
