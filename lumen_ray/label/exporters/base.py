"""What an exporter is. To add a format:

1. Write a module in this package with a class derived from `Exporter`.
2. Add a line to `EXPORTERS` in `registry.py`: name, one-line description, ``"module:Class"``.
3. Add a row to the table in ``docs/labelling.md``.

Command line, API, checks and the atomic writing of the folder follow from it. `voc.py` is a short one to copy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lumen_ray.label.exporters.labels import Labels
from lumen_ray.tasks import Task


@dataclass(frozen=True)
class ExportSettings:
    """`max_images_per_file`: images in one JSON, XML, CSV or tar file, None: all (tars: 1000); `copy_images`: copy
    image files instead of linking them; `image_url`: prefix of image addresses in Label Studio, None: local files;
    `review_budget`: images that `review` chooses; `near_distance`: bits in which the perceptual hashes of near
    duplicates differ at most; `gallery_images`: images that `gallery` shows, None: all."""

    max_images_per_file: int | None = None
    copy_images: bool = False
    image_url: str | None = None
    review_budget: int = 100
    near_distance: int = 6
    gallery_images: int | None = 1000


class Exporter(ABC):
    """Writes the labels of a finished folder in one format."""

    #: file that the export consists of, in the output folder itself; None: a folder with the format's name
    single_file: ClassVar[str | None] = None
    #: page that opens the folder, copied beside it once the folder is complete, with which it is the export
    front_page: ClassVar[Path | None] = None

    def holds(self, task: Task) -> bool:
        """Whether the format has a place for the answers of a task; by default those that are instances."""
        return not task.is_text

    @abstractmethod
    def write(self, labels: Labels, target: Path, settings: ExportSettings) -> None:
        """Writes the export of ``labels.tasks``, all of which it `holds`.

        target: a new, empty folder, or the path of the `single_file`; renamed to its final name once this returns.
        Iterate over ``labels.images()`` or, if the format has image files, ``labels.pictures()``, and keep nothing per
        image. Tasks label the same objects, so put several into one file only where a reader can tell them apart.
        """
