"""The gallery as an export: see `label.gallery`."""

from __future__ import annotations

from pathlib import Path

from lumen_ray.label.exporters.base import Exporter, ExportSettings
from lumen_ray.label.exporters.labels import Labels
from lumen_ray.label.gallery import write_gallery
from lumen_ray.tasks import Task


class Gallery(Exporter):
    """``gallery.html``, with all tasks of the folder."""

    single_file = "gallery.html"

    def holds(self, task: Task) -> bool:
        return True

    def write(self, labels: Labels, target: Path, settings: ExportSettings) -> None:
        write_gallery(labels.ledger.output, path=target)
