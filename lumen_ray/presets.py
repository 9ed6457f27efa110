"""Where presets and recipes are found: in `configs/` of a checkout, or the copy inside the installed package."""

from __future__ import annotations

from pathlib import Path

from lumen_ray.errors import UserError, suggest

_HERE = Path(__file__).resolve().parent
#: an installed wheel carries `configs/` as package data; a checkout has it beside the package
ROOTS = (_HERE.parent / "configs", _HERE / "configs")


def find(kind: str, name: str) -> Path:
    """The YAML of a preset: a path to a file, or a name in `configs/<kind>`; `UserError` listing the valid names."""
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
    return find("models", name)


def recipe_path(name: str) -> Path:
    return find("recipes", name)
