"""The synthetic scenes of `data.scenes` as a source of shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lumen_ray.data.scenes import edits as scenes_edits
from lumen_ray.data.scenes import render as scenes
from lumen_ray.data.sources.base import Listing, Outcome, Source
from lumen_ray.errors import UserError
from lumen_ray.keypoints import FIGURE_EDGES


@dataclass
class ScenesSource(Source):
    """`num` scenes of the set `seed`, `side` pixels high and wide. Independent draws: no need to shuffle them.

    `edits`: rows also have an instruction (task `edit`) and the edited scene as `target_image`; the rest of a row is
    the same as without. `grounded_captions`: rows also have a chat that describes the scene, with a link for each group
    of equal objects; `region_questions`: chats that ask whether a box shows a class, to be answered with yes or no.
    """

    num: int
    seed: int = 0
    side: int = 128
    edits: bool = False
    grounded_captions: bool = False
    region_questions: bool = False
    kind = "scenes"

    def read_listing(self) -> Listing:
        if self.num < 1:
            raise UserError(f"the number of scenes must be at least 1, got {self.num}", "invalid_config")
        if self.side < 64:
            raise UserError(f"scenes need a side of at least 64 pixels, got {self.side}", "invalid_config")
        if self.seed < 0:
            raise UserError(f"the seed must not be negative, got {self.seed}", "invalid_config")
        categories = [
            {
                "name": name,
                "keypoints": list(scenes.SKELETONS.get(name, ())),
                "skeleton": [list(edge) for edge in FIGURE_EDGES] if name in scenes.SKELETONS else [],
            }
            for name in scenes.CLASSES
        ]
        return Listing(range(self.num), {"images": self.num}, categories, shuffle=False)

    def rows(self, record: int, shared: Any) -> Iterator[Outcome]:
        row = scenes.scene_row(self.seed, record, self.side, self.grounded_captions, self.region_questions)
        if self.edits:
            row = scenes_edits.with_edit(row, scenes_edits.scene_edit(self.seed, record, self.side))
        yield Outcome(row)
