"""Recorded stage times of `lumen-ray plan --calibrate`: a JSON file that `--recorded` replays."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lumen_ray.errors import UserError
from lumen_ray.plan.times import Stage, StageTimes
from lumen_ray.plan.work import ModelWork
from lumen_ray.version import __version__

#: of the file's fields; files of other versions are refused, since their stages are other ones
VERSION = 1


@dataclass(frozen=True)
class Recording:
    """Stage times of one machine.

    samples: seconds by stage, of `StageTimes` but for its model. model_wall, model_cpu: of a batch, seconds and CPU
    seconds by the number of threads (as text). model: folder or name; image_bytes, megapixels: mean of the images read;
    longest_side: pixels to which they were decoded at least. work: what the model asks of a GPU, a `ModelWork`.
    facts: of the machine, for readers.
    """

    model: str
    preset: str
    device: str
    dtype: str
    tasks: list[str]
    num_classes: int
    batch_size: int
    images: int
    image_bytes: float
    megapixels: float
    longest_side: int
    cores: int
    machine: str
    samples: dict[str, list[float]]
    model_wall: dict[str, list[float]]
    model_cpu: dict[str, list[float]]
    ray_start_s: float
    work: dict[str, Any]
    package: str = __version__
    version: int = VERSION
    facts: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Raises `UserError` for a file that is none, or of another version."""
        if not os.path.isfile(path):
            raise UserError(
                f"recording '{path}' does not exist; make one with 'lumen-ray plan --calibrate FOLDER'",
                "missing_recording",
            )
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            version = data["version"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"'{path}' is not a recording; give a file that 'lumen-ray plan --calibrate FOLDER' wrote",
                "invalid_recording",
            ) from None
        if version != VERSION:
            raise UserError(
                f"recording '{path}' is of version {version} and this lumen-ray reads version {VERSION}; record again "
                "with 'lumen-ray plan --calibrate FOLDER'",
                "other_version",
            )
        try:
            recording = cls(**data)
            recording.times(1)
            recording.model_work()
        except (TypeError, KeyError, ValueError, AttributeError):
            raise UserError(
                f"recording '{path}' is damaged; record again with 'lumen-ray plan --calibrate FOLDER'",
                "invalid_recording",
            ) from None
        return recording

    def model_work(self) -> ModelWork:
        return ModelWork(**{**self.work, "decoders": tuple(self.work["decoders"])})

    def times(self, threads: int) -> StageTimes:
        """The recorded stages for actors of that many threads; of the model those of the nearest recorded number."""
        number = min(self.model_wall, key=lambda n: abs(int(n) - threads))
        wall, cpu = self.model_wall[number], self.model_cpu[number]
        cores = 1.0
        if self.device == "cpu":
            cores = min(float(number), max(1.0, sum(cpu) / sum(wall)))
        note = f"{self.preset} on {self.device}"
        model = Stage(tuple(cpu if self.device == "cpu" else wall), "measured", note)
        stages = {name: Stage(tuple(samples), "measured") for name, samples in self.samples.items()}
        return StageTimes(
            **stages,  # type: ignore[arg-type]
            model=model,
            batch_size=self.batch_size,
            model_cores=cores,
            ray_start_s=self.ray_start_s,
        )
