"""The classes of a request of another API whose clients expect the model to have its own."""

from __future__ import annotations

from collections.abc import Sequence

from lumen_ray.errors import UserError
from lumen_ray.serve.asking import Backend


async def classes_or_own(backend: Backend, given: Sequence[str] | None, field: str, poses: bool = False) -> list[str]:
    """`given`, or else the classes that the loaded model was trained with, for `poses` those with a skeleton. `field`:
    where a request gives them.

    Raises `UserError` if neither names any.
    """
    if given:
        return list(given)
    info = await backend.info()
    own = list(info["skeletons"]) if poses else list(info["classes"])
    if not own:
        kind = "no class with keypoints" if poses else "no classes"
        raise UserError(f"the model names {kind} of its own; give some in '{field}'", "empty_classes", field)
    return own
