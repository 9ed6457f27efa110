"""WebDataset tars: per sample an image and a JSON, in tars of 1000 samples.

Keys have no dots, at the first of which a reader ends them, and the members of a sample lie together. The JSON is an
object, since Ray's reader unwraps lists of one element at its top. The bytes of JPEG and PNG files are kept, others
become PNG. Ray and `datasets` want the same members in every sample, so all images have the extension of the first, in
a corpus of both kinds too: readers decode by content.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from lumen_ray.label.exporters.base import Exporter, ExportSettings
from lumen_ray.label.exporters.labels import Labels
from lumen_ray.label.exporters.sample_json import sample
from lumen_ray.tasks import Task

SAMPLES_PER_TAR = 1000
_KEPT = ("JPEG", "MPO", "PNG")  # Pillow's names of formats


class WebDataset(Exporter):
    """``labels-00001.tar``, ...; all tasks in the JSON of a sample."""

    def holds(self, task: Task) -> bool:
        return True

    def write(self, labels: Labels, target: Path, settings: ExportSettings) -> None:
        size = settings.max_images_per_file or SAMPLES_PER_TAR
        extension = ""
        for ending, pairs in labels.picture_parts(size, _KEPT):
            with tarfile.open(target / f"labels{ending or '-00001'}.tar", "w") as tar:
                for image, picture in pairs:
                    extension = extension or (".png" if picture.suffix == ".png" else ".jpg")
                    _add(tar, f"{image.name}{extension}", picture.read())
                    _add(tar, f"{image.name}.json", json.dumps(sample(image, labels)).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
