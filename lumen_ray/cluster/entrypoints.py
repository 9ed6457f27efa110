"""The commands of the jobs, with the preset, the storage and the numbers of a request."""

from __future__ import annotations

import shlex
from pathlib import PurePosixPath

from lumen_ray.cluster.needs import Needs
from lumen_ray.cluster.request import VOLUME, RenderRequest
from lumen_ray.presets import bundled_models

#: verbs whose output must be on a file system
_ON_VOLUME = ("train", "evaluate")


def entrypoint(text: str, request: RenderRequest, needs: Needs) -> str:
    """The command of a job in the manifests, as of the request."""
    words = shlex.split(text)
    verb = words[1]
    words = [_moved(words, n, request, needs) for n in range(len(words))]
    if verb == "prepare" and words[2] != "scenes":
        _set(words, "--rows-per-group", str(needs.rows_per_group))
    if verb == "train":
        _set(words, "--recipe", _recipe(request, needs))
        if request.workers is not None:
            _set(words, "--workers", str(request.workers))
        _set(words, "--init-from", _start(words, needs))
    if verb == "label" and request.gpus:
        # a pool, which starts with the first GPU that the cluster gets
        _set(words, "--actors", f"1:{request.gpus}" if request.gpus > 1 else "1")
    return shlex.join(words)


def run_folder(request: RenderRequest, needs: Needs) -> str:
    return f"{request.shared}/runs/{PurePosixPath(needs.recipe_name).stem}"


def trained_model(request: RenderRequest, needs: Needs) -> str:
    """The model that `train` writes; for a preset without a recipe the one that is served."""
    return f"{run_folder(request, needs)}/model" if needs.has_recipe else served_model(needs)


def served_model(needs: Needs) -> str:
    return f"/models/lumen-{needs.settings.name}"


def _moved(words: list[str], n: int, request: RenderRequest, needs: Needs) -> str:
    """Word `n`, with a path of the manifests turned into that of the request."""
    word, option = words[n], words[n - 1]
    if option == "--model":
        bundled = word == needs.settings.name and word in bundled_models()
        return word if bundled else trained_model(request, needs)
    if not word.startswith(f"{VOLUME}/"):
        return word
    first, *rest = word.removeprefix(f"{VOLUME}/").split("/")
    if first == "runs":
        return "/".join([run_folder(request, needs), *rest[1:]])
    if option == "--output" and words[1] in _ON_VOLUME:
        return "/".join([request.shared, first, *rest])
    return request.stored("/".join([first, *rest]))


def _recipe(request: RenderRequest, needs: Needs) -> str:
    """The name of the recipe; a file of the user is expected on the volume."""
    name = needs.recipe_name
    is_file = name.endswith((".yaml", ".yml"))
    return f"{request.shared}/recipes/{PurePosixPath(name).name}" if is_file else name


def _start(words: list[str], needs: Needs) -> str | None:
    """The model folder that training starts from, where the recipe names none and the preset has published weights."""
    if needs.recipe.init_from is not None or not needs.settings.published_weights:
        return None
    if needs.is_own and "--init-from" in words:
        return words[words.index("--init-from") + 1]
    return f"/models/published-{needs.settings.name}"


def _set(words: list[str], option: str, value: str | None) -> None:
    """Gives an option a value, in its place or before `--output`; None takes it out."""
    if option in words:
        place = words.index(option)
        words[place : place + 2] = [] if value is None else [option, value]
    elif value is not None:
        place = words.index("--output")
        words[place:place] = [option, value]
