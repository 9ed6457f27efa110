"""What the default distance of near duplicates tells apart on photographs: the figures of docs/labelling.md."""

import io

import numpy as np
import pytest
from PIL import Image

from lumen_ray.data.images import decode_reduced
from lumen_ray.label.perceptual_hash import perceptual_hash


def changed(data):
    """Kind of change -> the photograph with it, encoded."""
    image = Image.open(io.BytesIO(data)).convert("RGB")

    def jpeg(image, quality=92):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return buffer.getvalue()

    w, h = image.size
    return {
        "quality 50": jpeg(image, 50),
        "half size": jpeg(image.resize((w // 2, h // 2))),
        "brighter by 20 %": jpeg(image.point(lambda value: min(255, int(value * 1.2)))),
        "darker by 20 %": jpeg(image.point(lambda value: int(value * 0.8))),
        "5 % cut off": jpeg(image.crop((w // 40, h // 40, w - w // 40, h - h // 40))),
    }


@pytest.mark.parametrize(
    ("folder", "different_pairs", "within_4", "cut"),
    [("coco_photos", 0, 0.95, 0.77), ("bccd", 1, 1.0, 0.73)],
)
def test_near_duplicates_of_photographs(test_data, folder, different_pairs, within_4, cut):
    """Pairs of different photographs within 6 bits, and the share of changed ones within 4 and 6 bits."""
    photos = sorted((test_data / folder / "images").iterdir())
    data = [path.read_bytes() for path in photos]

    def hashes(images):
        return np.array([int(perceptual_hash(decode_reduced(image, 256).pixels), 16) for image in images], np.uint64)

    own = hashes(data)
    apart = np.bitwise_count(own[:, None] ^ own)[np.triu_indices(len(own), 1)]
    assert (apart <= 6).sum() == different_pairs
    versions = [changed(image) for image in data]
    for kind in versions[0]:
        bits = np.bitwise_count(own ^ hashes([version[kind] for version in versions]))
        if kind == "5 % cut off":
            assert (bits <= 6).mean() == pytest.approx(cut, abs=0.02)
        else:
            assert (bits <= 6).all() and (bits <= 4).mean() >= within_4, kind
