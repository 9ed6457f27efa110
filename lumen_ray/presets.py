"""Where presets and recipes are found: in `configs/` of a checkout, or the copy inside the installed package."""

from __future__ import annotations

from pathlib import Path

from lumen_ray.errors import UserError, suggest


def config_roots(package: Path) -> tuple[Path, ...]:
    """The `configs/` folders of the package in the folder `package`.

    A checkout has it beside the package, together with pyproject.toml; a `configs` beside an installed package belongs
    to somebody else. A wheel carries it as package data.
    """
    checkout = (package.parent / "configs",) if (package.parent / "pyproject.toml").is_file() else ()
    packaged = (package / "configs",) if (package / "configs").is_dir() else ()
    return checkout + packaged


ROOTS = config_roots(Path(__file__).resolve().parent)


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
