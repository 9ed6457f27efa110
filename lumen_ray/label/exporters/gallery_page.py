"""The gallery as an export: see `label.gallery`."""

from __future__ import annotations

from pathlib import Path

from lumen_ray.label.exporters.base import Exporter, ExportSettings
from lumen_ray.label.exporters.labels import Labels
from lumen_ray.label.gallery.layout import FRONT_PAGE
from lumen_ray.label.gallery.write import write_gallery
from lumen_ray.tasks import Task


class Gallery(Exporter):
    """``gallery.html`` and its folder, with all tasks."""

    front_page = FRONT_PAGE

    def holds(self, task: Task) -> bool:
        return True

    def write(self, labels: Labels, target: Path, settings: ExportSettings) -> None:
        write_gallery(labels, target, most=settings.gallery_images)
