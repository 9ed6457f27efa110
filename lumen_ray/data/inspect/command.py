"""`data inspect`: the contents of a shard folder as tables, as JSON, and as a page of samples.

The page shows rows drawn evenly from the whole folder, each as stored and as in a training step: the batch comes from
the reader used in training, with the recipe's augmentation, prompts and tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from lumen_ray import config
from lumen_ray.data import files, urls
from lumen_ray.data.inspect.view import Sampler, Section, sample_places, shown
from lumen_ray.data.shards import shards
from lumen_ray.data.shards.shards import read_manifest
from lumen_ray.data.shards.statistics import Statistics, gather
from lumen_ray.errors import UserError
from lumen_ray.presets import recipe_path
from lumen_ray.recipe import Recipe, Stage, TaskGroup
from lumen_ray.tasks import TRAINABLE_TASKS

#: number of classes and reasons listed; the others share a line
TOP = 30


def sections(s: Statistics, top: int = TOP) -> list[Section]:
    """The statistics as tables, without empty ones; lists of more than `top` entries end in one line for the others."""
    tasks = [(task, rows, s.items.get(task, "")) for task, rows in s.tasks.items()]
    rest = [(name, "", n) for name, n in s.items.items() if name not in s.tasks]
    found = [
        Section("tasks", ("task", "rows", "items"), tasks + rest),
        Section(f"classes: {_classes(s)}", ("class", "objects", "images", "images without"), _class_rows(s, top)),
        Section("images by longer side, pixels", ("pixels", "images"), list(s.image_side_histogram().items())),
        Section("objects by area", ("size", "objects", "share"), _size_rows(s)),
        Section(
            f"objects per image: median {s.median_per_image():g}, most {max(s.per_image, default=0)}",
            ("objects", "images"),
            list(s.per_image_histogram().items()),
        ),
        Section("records", ("kind", "in", "written", "rejected"),
                [(kind, c["in"], c["written"], c["rejected"]) for kind, c in s.counts.items()]),
        Section("records changed", ("change", "number"), list(s.changed.items())),
        Section("notes of prepare", ("note",), [(note,) for note in s.notes]),
        Section("rejected because", ("reason", "for example", "records"), _reason_rows(s, top), first_number=2),
    ]  # fmt: skip
    return [section for section in found if section.rows]


def _classes(s: Statistics) -> str:
    names = set(s.class_instances) | set(s.class_absent)
    empty = len(names) - len(s.class_instances)
    return f"{len(names):,}" + (f", {empty:,} of them without an object" if empty else "")


def _class_rows(s: Statistics, top: int) -> list[tuple[Any, ...]]:
    names = sorted(set(s.class_instances) | set(s.class_absent), key=lambda n: (-s.class_instances[n], n))
    counts = (s.class_instances, s.class_images, s.class_absent)
    rows = [(name, *(count[name] for count in counts)) for name in names[:top]]
    if others := names[top:]:
        rows.append((f"{len(others):,} others", sum(s.class_instances[name] for name in others), "", ""))
    return rows


def _size_rows(s: Statistics) -> list[tuple[Any, ...]]:
    if not s.instances:
        return []
    limits = {"small": "small, under 32²", "medium": "medium, 32² to 96²", "large": "large, over 96²"}
    counts = {limits[name]: n for name, n in s.object_sizes.items()}
    counts |= {"with a mask": s.masks, "with keypoints": s.keypoints, "crowds": s.crowds}
    return [(name, n, f"{s.share(n):.1%}") for name, n in counts.items()]


def _reason_rows(s: Statistics, top: int) -> list[tuple[Any, ...]]:
    ranked = s.reasons.most_common()
    rows = [(reason, s.examples[reason], n) for reason, n in ranked[:top]]
    if ranked[top:]:
        rows.append((f"{len(ranked) - top:,} other reasons", "", sum(n for _, n in ranked[top:])))
    return rows


def print_sections(found: list[Section], console: Console) -> None:
    """Prints tables on a terminal; plain aligned lines, never truncated, in a pipe or log file."""
    for section in found:
        if console.is_terminal:
            table = Table(title=section.title, title_justify="left", title_style="bold", header_style="dim")
            for i, name in enumerate(section.columns):
                table.add_column(name, justify="right" if i >= section.first_number else "left", overflow="fold")
            for row in section.rows:
                table.add_row(*map(shown, row))
            console.print(table)
        else:
            console.print("\n".join(_lines(section)) + "\n", soft_wrap=True, markup=False)


def _lines(section: Section) -> Iterator[str]:
    yield section.title
    table = [section.columns, *(tuple(map(shown, row)) for row in section.rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(section.columns))]
    for row in table:
        cells = [c.rjust(w) if i >= section.first_number else c.ljust(w)
                 for i, (c, w) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        yield "  " + "  ".join(cells).rstrip()


def load_recipe(name: str | None, edits: bool = False) -> Recipe:
    """A recipe by name or file; without a name, the default settings with all tasks about images, and with `edits` that
    task too, with a model that has a decoder for it."""
    if name is None:
        tasks = (*TRAINABLE_TASKS, "edit") if edits else TRAINABLE_TASKS
        stage = Stage(name="all tasks", steps=1, groups=(TaskGroup(tasks=tasks),))
        return Recipe(name="defaults", model="nano-experts" if edits else "nano", stages=(stage,))
    return config.load(Recipe, recipe_path(name))


def inspect(
    folder: urls.Location,
    output: urls.Location,
    *,
    samples: int = 24,
    recipe: str | None = None,
    stage: str | None = None,
    top: int = TOP,
    seed: int = 0,
    verify: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Statistics, str]:
    """Counts a shard folder and writes ``index.html`` and ``statistics.json`` into `output`.

    samples: rows on the page, drawn evenly from the folder by `seed`; 0 for tables only. recipe: name or YAML file of
    the recipe whose prompts and augmentation are shown. stage: of the recipe, by default the one with the most tasks.
    top: number of classes listed. verify: first check every file against the manifest. progress: called with (rows
    counted, total rows). Keeps only the rows shown in memory.

    Returns the statistics and the page's location. Raises `UserError` for a folder without shards, shards of another
    schema version, damaged shards, an output that cannot be created, and invalid settings.
    """
    from lumen_ray.data.inspect.page import page

    for name, value, least in (("samples", samples, 0), ("top", top, 1), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"{name} is {value}; give {least} or more", "invalid_setting")
    manifest = read_manifest(folder)
    sampler = Sampler(folder, manifest, load_recipe(recipe, "edit" in manifest["tasks"]), stage)
    output = urls.absolute(output)
    files.make_folder(output)
    if verify and (problems := shards.verify(folder)):
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        raise UserError(
            f"the shards '{urls.shown(folder)}' are damaged: {problems[0]}{more}; run `lumen-ray prepare` again",
            "broken_shards",
        )
    statistics = gather(folder, progress)
    rng = np.random.default_rng((seed, 5))
    views = (sampler.view(*place, rng) for place in sample_places(manifest, samples, seed))
    text = page(str(folder), manifest, sections(statistics, top), statistics, sampler, views)
    files.write_bytes(urls.join(output, "statistics.json"), json.dumps(statistics.to_dict(), indent=1).encode())
    location = urls.join(output, "index.html")
    files.write_bytes(location, text.encode())
    return statistics, location
