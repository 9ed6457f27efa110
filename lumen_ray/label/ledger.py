"""Records which fragments of the input are done. A job killed anywhere resumes without duplicates or gaps.

The input is cut into fragments of a fixed number of images, listed once in ``ledger/inputs.parquet``. A fragment's
labels are written to ``labels/part-N.parquet``, then its entry to ``ledger/N.json``, both by atomic rename: only the
entry marks the fragment as done. A file of labels without an entry is overwritten by the next run; readers take the
valid files from the ledger.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lumen_ray.data.files import make_folder, write_atomically
from lumen_ray.data.pictures import unique_id
from lumen_ray.errors import UserError
from lumen_ray.inference.records import ERROR_SCHEMA, LABEL_SCHEMA
from lumen_ray.label.inputs import Item

_INPUT_SCHEMA = pa.schema(
    [
        ("fragment", pa.int64()),
        ("image_id", pa.string()),
        ("path", pa.string()),
        ("row_group", pa.int32()),
        ("row", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Fragment:
    """`index`: its number in the job; `items`: its images."""

    index: int
    items: tuple[Item, ...]


def _write_json(path: Path, data: Any) -> None:
    write_atomically(path, lambda p: p.write_text(json.dumps(data, indent=1, sort_keys=True)))


class Ledger:
    """The ledger of one output folder."""

    def __init__(self, output: str | Path):
        self.output = Path(output)
        self._folder = self.output / "ledger"
        self._inputs = self._folder / "inputs.parquet"

    def open(self, settings: dict[str, Any]) -> None:
        """Claims the folder for a job with `settings` (JSON types).

        Raises `UserError` if it holds labels made with other settings, naming the difference. The settings of a job
        that finished no fragment are replaced.
        """
        settings = json.loads(json.dumps(settings))
        path = self.output / "job.json"
        make_folder(self.output)
        if not path.is_file() or not self.entries():
            self._inputs.unlink(missing_ok=True)
            _write_json(path, settings)
            return
        before = json.loads(path.read_text())
        changed = [key for key in sorted({*before, *settings}) if before.get(key) != settings.get(key)]
        if changed:
            key = changed[0]
            more = f", and {', '.join(changed[1:])}" if changed[1:] else ""
            raise UserError(
                f"output '{self.output}' holds labels made with other settings ({key} was {_short(before.get(key))}, "
                f"now {_short(settings.get(key))}{more}); give a new output folder, or the same settings to resume",
                "other_settings",
            )

    def plan(self, items: Sequence[Item], fragment_size: int) -> list[Fragment]:
        """The fragments still to do, in order.

        Fragments keep their images of the first run; images added since then form further fragments. An image whose id
        another one has already, as in shard files of different sets, gets a number after it.
        """
        known = self._planned()
        seen = {item.place for fragment in known for item in fragment.items}
        times = Counter(item.image_id for fragment in known for item in fragment.items)
        new = [replace(i, image_id=unique_id(i.image_id, times)) for i in items if i.place not in seen]
        for start in range(0, len(new), fragment_size):
            known.append(Fragment(len(known), tuple(new[start : start + fragment_size])))
        if new:
            rows = [{"fragment": f.index, **asdict(item)} for f in known for item in f.items]
            table = pa.Table.from_pylist(rows, schema=_INPUT_SCHEMA)
            write_atomically(self._inputs, lambda p: pq.write_table(table, p))
        done = self.entries()
        return [fragment for fragment in known if fragment.index not in done]

    def _planned(self) -> list[Fragment]:
        """The fragments of ``inputs.parquet``."""
        if not self._inputs.is_file():
            return []
        fragments: dict[int, list[Item]] = {}
        for row in pq.read_table(self._inputs).to_pylist():
            fragments.setdefault(row.pop("fragment"), []).append(Item(**row))
        return [Fragment(index, tuple(items)) for index, items in sorted(fragments.items())]

    def publish(self, fragment: Fragment, records: Sequence[dict[str, Any]], errors: Sequence[dict[str, str]]) -> None:
        """Marks `fragment` done with its label rows and its failed images (rows of `ERROR_SCHEMA`)."""
        table = pa.Table.from_pylist(list(records), schema=LABEL_SCHEMA)
        path = self._labels(fragment.index)
        write_atomically(path, lambda p: pq.write_table(table, p, compression="zstd"))
        entry = {
            "part": path.name,
            "images": len(fragment.items),
            "labelled": len(fragment.items) - len(errors),
            "errors": list(errors),
            "rows": len(records),
        }
        _write_json(self._entry(fragment.index), entry)

    def entries(self) -> dict[int, dict[str, Any]]:
        """The finished fragments: number -> entry."""
        paths = sorted(self._folder.glob("[0-9]*.json"))
        return {int(path.stem): json.loads(path.read_text()) for path in paths}

    def write_errors(self) -> Path:
        """Gathers the failed images of all finished fragments in ``errors.parquet``."""
        errors = [error for entry in self.entries().values() for error in entry["errors"]]
        path = self.output / "errors.parquet"
        table = pa.Table.from_pylist(errors, schema=ERROR_SCHEMA)
        write_atomically(path, lambda p: pq.write_table(table, p))
        return path

    def tables(self) -> Iterator[pa.Table]:
        """The label table of each finished fragment, in order."""
        for index in self.entries():
            yield pq.read_table(self._labels(index))

    def items(self) -> Iterator[Item]:
        """The images of all finished fragments, failed ones included, in order."""
        done = self.entries()
        for fragment in self._planned():
            if fragment.index in done:
                yield from fragment.items

    def _labels(self, index: int) -> Path:
        return self.output / "labels" / f"part-{index:06d}.parquet"

    def _entry(self, index: int) -> Path:
        return self._folder / f"{index:06d}.json"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def open_finished(output: str | Path) -> Ledger:
    """The ledger of a labelled folder; raises `UserError` if `output` is not one."""
    ledger = Ledger(output)
    if not (ledger.output / "job.json").is_file():
        raise UserError(f"'{output}' is not an output folder of `lumen-ray label`; give one", "not_labelled")
    return ledger
