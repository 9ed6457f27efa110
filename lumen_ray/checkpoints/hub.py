"""Published checkpoints: a folder or hub id with `config.json` and weights in one file or in indexed shards. Tensors
are read lazily, one by one."""

from __future__ import annotations

import json
import pickle as pickles
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lumen_ray.errors import UserError

SAFE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
PICKLED = ("pytorch_model.bin", "diffusion_pytorch_model.bin")
PICKLE_FLAG = "--allow-pickle"


def fetch(source: str | Path, pickle: bool = False) -> Path:
    """Resolves a path or a hub id to a local folder, downloading the repository if needed. Raises `UserError` if it is
    neither."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    parts = str(source).split("/")
    if folder.exists() or len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise UserError(
            f"checkpoint '{source}' is not a folder; give a folder with config.json and weights, or a hub id such as "
            "openai/clip-vit-large-patch14-336",
            "missing_checkpoint",
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", *(["*.bin"] if pickle else [])]
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except Exception as error:  # no connection, repository or access; reported in the hub's words
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"checkpoint '{source}' is not a folder and cannot be downloaded: {reason}", "missing_checkpoint"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file. Raises `UserError` if it is damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"'{path}' cannot be read: {error}", "damaged_checkpoint") from None
    if not isinstance(data, dict):
        raise UserError(f"'{path}' must hold a JSON object", "damaged_checkpoint")
    return data


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a published checkpoint by name, and its `config.json`.

    `pickle`: also read pickled weights, restricted to tensors (`weights_only`).
    """

    def __init__(self, source: str | Path, pickle: bool = False):
        self.folder = fetch(source, pickle)
        self.config = self.read_config(self.folder)
        self._files = self._find(pickle)
        self._open: dict[Path, Any] = {}
        self._shard = {name: path for path in self._files for name in self._handle(path).keys()}  # noqa: SIM118

    @staticmethod
    def read_config(folder: Path) -> dict[str, Any]:
        """Reads a checkpoint's config.json. Raises `UserError` if it is missing or damaged."""
        if not (path := folder / "config.json").is_file():
            raise UserError(
                f"'{folder}' is not a published checkpoint: config.json is missing; give the folder that holds it",
                "not_a_checkpoint",
            )
        return read_json(path)

    def _find(self, pickle: bool) -> list[Path]:
        """The weight files. Raises `UserError` if there are none, or only pickled ones that may not be read."""
        for names, allowed in ((SAFE, True), (PICKLED, pickle)):
            found = [path for name in names if (path := self.folder / f"{name}.index.json").is_file()]
            if found and allowed:
                return self._shards(found[0])
            found = [path for name in names if (path := self.folder / name).is_file()]
            if found and allowed:
                return found[:1]
        if any((self.folder / name).is_file() for plain in PICKLED for name in (plain, f"{plain}.index.json")):
            raise UserError(
                f"the weights in '{self.folder}' are pickled, which can run code when read; give safetensors, or add "
                f"{PICKLE_FLAG} if you trust their source",
                "pickled_weights",
            )
        raise UserError(
            f"'{self.folder}' holds no weights: expected {SAFE[0]} or {SAFE[0]}.index.json", "not_a_checkpoint"
        )

    def _shards(self, index: Path) -> list[Path]:
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing or not names:
            what = f"shard '{missing[0]}' is missing" if names else "it lists no shards"
            raise UserError(
                f"'{index}': {what}; download the checkpoint again, all {len(names)} shards", "missing_shard"
            )
        return [self.folder / name for name in names]

    def _handle(self, path: Path) -> Any:
        """An open safetensors file, or the dictionary of a pickled one (its tensors stay on disk until used)."""
        if path not in self._open:
            try:
                if path.suffix == ".safetensors":
                    self._open[path] = safe_open(path, framework="pt")
                else:
                    self._open[path] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except (SafetensorError, OSError, RuntimeError, EOFError, pickles.UnpicklingError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UserError(f"'{path}' is damaged or incomplete: {reason}", "damaged_checkpoint") from None
        return self._open[path]

    def __getitem__(self, name: str) -> Tensor:
        handle = self._handle(self._shard[name])
        return handle[name] if isinstance(handle, dict) else handle.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard)

    def __len__(self) -> int:
        return len(self._shard)
