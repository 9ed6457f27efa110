"""Paths of presets, recipes and bundled weights.

YAML files lie in `configs/` of a checkout or in its copy inside the installed package, weights in `lumen_ray/weights`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lumen_ray.errors import UserError, suggest


def config_roots(package: Path) -> tuple[Path, ...]:
    """The `configs/` folders of the package that lies in the folder `package`.

    A checkout has it beside the package, together with pyproject.toml; a `configs` beside an installed package belongs
    to another project. A wheel has it as package data.
    """
    checkout = (package.parent / "configs",) if (package.parent / "pyproject.toml").is_file() else ()
    packaged = (package / "configs",) if (package / "configs").is_dir() else ()
    return checkout + packaged


ROOTS = config_roots(Path(__file__).resolve().parent)
WEIGHTS = Path(__file__).resolve().parent / "weights"
#: the bundled model that `label`, `evaluate` and `serve` use by default
DEFAULT_MODEL = "nano"
#: copies the model folder at a URL to this machine; `lumen_ray` sets it, since stores are a layer above this one
download: Callable[[str], Path] | None = None


def find(kind: str, name: str) -> Path:
    """The YAML file of a path, or of a name in `configs/<kind>`. Raises `UserError` with the valid names."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"config file '{name}' does not exist", "missing_config")
        return path
    for root in ROOTS:
        if (root / kind / f"{name}.yaml").is_file():
            return root / kind / f"{name}.yaml"
    names = sorted({p.stem for root in ROOTS for p in (root / kind).glob("*.yaml")})
    raise UserError(
        f"unknown {kind.rstrip('s')} '{name}';{suggest(name, names)} {kind}: {', '.join(names)} (or a path to a .yaml)",
        "unknown_preset",
    )


def model_path(name: str) -> Path:
    """The YAML file of a model preset. Raises `UserError`."""
    return find("models", name)


def bundled_models() -> list[str]:
    """Names of the models whose weights are part of the package."""
    return sorted(weights.parent.name for weights in WEIGHTS.glob("*/model.safetensors"))


def model_folder(model: str | Path) -> Path:
    """The model folder at a path, or that of bundled weights of this name if there is no such path; of a URL a local
    copy of its present version.

    Raises `UserError` (`missing_model`) if there is neither.
    """
    if "://" in str(model) and download is not None:
        return download(str(model))
    if Path(model).is_dir():
        return Path(model)
    names = bundled_models()
    if str(model) in names:
        return WEIGHTS / str(model)
    raise UserError(
        f"model folder '{model}' does not exist;{suggest(str(model), names)} give the 'model' folder that a training "
        f"run wrote, or the name of bundled weights: {', '.join(names)}",
        "missing_model",
    )


def recipe_path(name: str) -> Path:
    """The YAML file of a recipe. Raises `UserError`."""
    return find("recipes", name)
