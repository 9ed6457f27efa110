"""Images that are missing, cannot be decoded, or are of another size than their row says."""

from __future__ import annotations

from lumen_ray.data.images import decode
from lumen_ray.data.lint.check import Check
from lumen_ray.data.lint.findings import Rule
from lumen_ray.data.lint.rows import LintRow
from lumen_ray.errors import UserError


class Images(Check):
    """The encoded images; decoded only if the settings say so."""

    missing = Rule(
        "image-missing", "problem", "images",
        "rows have a height and width but no image, so their boxes train nothing; prepare them again with the image",
    )  # fmt: skip
    broken = Rule(
        "image-broken", "problem", "images",
        "images cannot be decoded, so training skips them; replace the files",
    )  # fmt: skip
    resized = Rule(
        "image-size", "problem", "images",
        "images are of another size than their row says, so boxes and masks are misplaced; prepare them again",
    )  # fmt: skip
    rules = (missing, broken, resized)

    def row(self, row: LintRow) -> None:
        if not row.row["image"]:
            if row.has_size:
                self.add(self.missing, row, f"{row.width}x{row.height} pixels, {len(row.instances)} objects")
        elif self.settings.decode:
            self._decode(row)

    def _decode(self, row: LintRow) -> None:
        first = {"image": row.row["image"], "height": row.height, "width": row.width}
        for number, image in enumerate([first, *row.row["further_images"]], start=1):
            what = f"image {number}: " if number > 1 else ""
            try:
                height, width = decode(image["image"] or b"").shape[:2]
            except UserError as error:
                self.add(self.broken, row, f"{what}{error}")
                continue
            if (height, width) != (image["height"], image["width"]):
                said = f"the row says {image['width']}x{image['height']}, the image has {width}x{height} pixels"
                self.add(self.resized, row, f"{what}{said}")
        if row.row["target_image"] is not None:
            try:
                decode(row.row["target_image"])
            except UserError as error:
                self.add(self.broken, row, str(error))
