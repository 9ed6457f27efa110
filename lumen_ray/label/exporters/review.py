"""The images most worth a person's look, for Label Studio and as a gallery: see `statistics.choose_for_review`."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path

from lumen_ray.label.exporters.base import Exporter, ExportSettings
from lumen_ray.label.exporters.labels import Labels
from lumen_ray.label.exporters.labelstudio import LabelStudio
from lumen_ray.label.gallery.layout import FRONT_PAGE
from lumen_ray.label.gallery.write import write_gallery
from lumen_ray.label.statistics import choose_for_review


class Review(Exporter):
    """``tasks.json`` and ``labeling_config.xml`` for Label Studio, ``gallery.html``, and ``review.csv`` with the
    reasons for which each image was chosen."""

    def write(self, labels: Labels, target: Path, settings: ExportSettings) -> None:
        chosen = choose_for_review(labels, settings.review_budget)
        with (target / "review.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image_id", "score", "reasons"])
            for choice in chosen:
                reasons = " ".join(f"{reason}={value:.3f}" for reason, value in choice.reasons.items())
                writer.writerow([choice.image_id, f"{choice.score:.4f}", reasons])
        labels.written = len(chosen)
        some = replace(labels, only=frozenset(choice.number for choice in chosen))
        LabelStudio().write(some, target, settings)
        (target / "gallery").mkdir()
        write_gallery(some, target / "gallery", order=[choice.number for choice in chosen])
        shutil.copyfile(FRONT_PAGE, target / FRONT_PAGE.name)
