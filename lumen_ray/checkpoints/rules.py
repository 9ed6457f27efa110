"""Maps tensor names of published checkpoints to this package's: tables of rules, and a report of what each did.

A table is a list of `Rule`s over the names inside one module, without the module's prefix; the first rule whose pattern
matches the whole name applies. A `ModuleRules` gives the prefixes of the module in the checkpoint and in our model.

    RULES = [
        Rule(r"layers\\.(\\d+)\\.norm1\\.(weight|bias)", r"blocks.\\1.first_norm.\\2"),
        Rule(r"attn\\.in_proj_(weight|bias)", (r"q_proj.\\1", r"k_proj.\\1", r"v_proj.\\1")),  # split in three on dim 0
        Rule(r"backbone\\..*relative_position_index", drop="buffer that the model computes"),
    ]

A name that maps to an existing target is an alias (shared heads are saved once per layer that uses them); its values
must be equal. Everything works on meta tensors, so a layout can be checked without its weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from lumen_ray.errors import UserError

Outcome = Literal["renamed", "split", "merged", "alias", "dropped", "unknown"]


@dataclass(frozen=True)
class Rule:
    """Renames, splits or drops the tensors whose whole name matches `pattern` (a regular expression).

    `to`: the new name, with the pattern's groups as in `re.sub`; with several names the tensor is split into as many
    equal chunks along dim 0. `change`: a function of the tensor, applied first (a transpose, a squeeze). `drop`: the
    reason why the tensor is not needed. A rule has either `to` or `drop`.
    """

    pattern: str
    to: str | tuple[str, ...] = ()
    drop: str = ""
    change: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if bool(self.to) == bool(self.drop):
            raise ValueError(f"the rule for {self.pattern!r} needs either 'to' or 'drop'")

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        return re.compile(self.pattern)

    def match(self, name: str) -> re.Match[str] | None:
        return self._regex.fullmatch(name)

    def targets(self, match: re.Match[str]) -> tuple[str, ...]:
        """The new names; empty for a rule that drops."""
        return tuple(match.expand(name) for name in ((self.to,) if isinstance(self.to, str) else self.to))

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The tensors for the names in `targets`."""
        tensor = tensor if self.change is None else self.change(tensor)
        return (tensor,) if isinstance(self.to, str) else tensor.chunk(len(self.to))


@dataclass(frozen=True)
class ModuleRules:
    """The rules of one module of a checkpoint: `rules` map all names that start with `source` to names below `target`.

    Both prefixes end with a dot, or are empty.
    """

    source: str
    target: str
    rules: tuple[Rule, ...]

    def __init__(self, source: str, target: str, rules: Iterable[Rule]):
        for name, value in (("source", source), ("target", target), ("rules", tuple(rules))):
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class ReleasedModule:
    """The module of one decoder in the released VisionLLM v2 checkpoint.

    `module`: its name there. `parts`: (prefix of our decoder, of its link head, of the module) -> the rules for its
    tensors; all prefixes end with a dot. `fresh`: prefixes of our decoder's tensors that the released one lacks.
    """

    module: str
    parts: Callable[[str, str, str], list[ModuleRules]]
    fresh: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorOutcome:
    """The outcome for one tensor of the checkpoint. `to`: our names; for an alias the existing ones, for an adapter
    those of the weight it was added to."""

    name: str
    shape: tuple[int, ...]
    outcome: Outcome
    to: tuple[str, ...] = ()
    why: str = ""


@dataclass
class Report:
    """The outcome for every tensor of a checkpoint, in checkpoint order."""

    entries: list[TensorOutcome] = field(default_factory=list)

    def of(self, outcome: Outcome) -> list[TensorOutcome]:
        return [entry for entry in self.entries if entry.outcome == outcome]

    def refuse(self, what: str) -> None:
        """Raises `UserError` if a tensor matched no rule; `what` names the checkpoint."""
        if unknown := self.of("unknown"):
            names = ", ".join(f"'{entry.name}'" for entry in unknown[:3])
            raise UserError(
                f"{what}: {len(unknown)} tensors are not of a known layout: {names}; give the checkpoint as published",
                "unknown_layout",
            )

    def counts(self) -> dict[str, int]:
        """Outcome -> number of tensors."""
        return dict(Counter(entry.outcome for entry in self.entries))


def find_rule(name: str, modules: Iterable[ModuleRules]) -> tuple[Rule, tuple[str, ...]] | None:
    """The rule for a tensor of the checkpoint and our full names for it; None if no rule matches."""
    for module in modules:
        if name.startswith(module.source):
            inner = name.removeprefix(module.source)
            for rule in module.rules:
                if (match := rule.match(inner)) is not None:
                    return rule, tuple(module.target + target for target in rule.targets(match))
    return None


def apply(tensors: Mapping[str, Tensor], modules: Iterable[ModuleRules]) -> tuple[dict[str, Tensor], Report]:
    """Returns {our name: tensor} and the report of a checkpoint's tensors, which may be on the meta device.

    Raises `UserError` if aliases of one tensor differ.
    """
    modules, report = tuple(modules), Report()
    out: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        shape, match = tuple(tensor.shape), find_rule(name, modules)
        if match is None:
            report.entries.append(TensorOutcome(name, shape, "unknown"))
            continue
        rule, targets = match
        if rule.drop:
            report.entries.append(TensorOutcome(name, shape, "dropped", why=rule.drop))
            continue
        outcome: Outcome = "renamed" if len(targets) == 1 else "split"
        for target, value in zip(targets, rule.split(tensor), strict=True):
            if target in out:
                _check_same(origin[target], out[target], name, value)
                outcome = "alias"
            else:
                out[target], origin[target] = value, name
        report.entries.append(
            TensorOutcome(name, shape, outcome, targets, f"same as {origin[targets[0]]}" * (outcome == "alias"))
        )
    return out, report


def check_fits(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Raises `UserError` unless `state` has exactly the names and shapes of `expected`; `what` names the checkpoint."""
    for name in expected:
        if name not in state:
            raise UserError(f"{what} has no tensor for '{name}'; give a complete checkpoint", "incomplete_checkpoint")
    for name, tensor in state.items():
        if name not in expected:
            raise UserError(f"{what} has a tensor for '{name}', which the model lacks", "unknown_layout")
        if tensor.shape != expected[name].shape:
            theirs, ours = (list(t.shape) for t in (tensor, expected[name]))
            raise UserError(
                f"{what}: the tensor for '{name}' has shape {theirs}, the settings need {ours}; give a checkpoint of "
                "that size",
                "wrong_size",
            )


def _check_same(first: str, kept: Tensor, name: str, tensor: Tensor) -> None:
    same = kept.shape == tensor.shape and (tensor.is_meta or torch.equal(kept, tensor))
    if not same:
        raise UserError(
            f"'{name}' should be another name of '{first}' but holds other values; give an unchanged checkpoint",
            "damaged_checkpoint",
        )
