"""How the tensors of a published checkpoint become ours: tables of rules, and what each did.

A table is a list of `Rule`s over the names inside one module, without the module's prefix; the first rule whose pattern
is the whole name wins. A `Part` says where the module stands in the checkpoint and in our model.

    RULES = [
        Rule(r"layers\\.(\\d+)\\.norm1\\.(weight|bias)", r"blocks.\\1.first_norm.\\2"),
        Rule(r"attn\\.in_proj_(weight|bias)", (r"q_proj.\\1", r"k_proj.\\1", r"v_proj.\\1")),  # split in three on dim 0
        Rule(r"backbone\\..*relative_position_index", drop="buffer that the model computes"),
    ]

Names that lead to a tensor which is there already are its aliases: shared heads are saved once for every layer that
uses them. Their values must agree. Everything works on meta tensors, so a layout can be checked without its weights.
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
    """What becomes of the names that `pattern` (a regular expression) matches as a whole.

    `to`: the new name, with the pattern's groups as in `re.sub`; or several: the tensor is then cut into as many equal
    parts along dim 0. `change`: a function of the tensor, applied first (a transpose, a squeeze). `drop`: why the
    tensor is not needed; a rule has either this or `to`.
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
        """The new names; none for a rule that drops."""
        return tuple(match.expand(name) for name in ((self.to,) if isinstance(self.to, str) else self.to))

    def parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The tensors that go by the names of `targets`."""
        tensor = tensor if self.change is None else self.change(tensor)
        return (tensor,) if isinstance(self.to, str) else tensor.chunk(len(self.to))


@dataclass(frozen=True)
class Part:
    """One module of a checkpoint: all names that start with `source`, ruled by `rules`, go below `target`.

    Both end with a dot, or are empty.
    """

    source: str
    target: str
    rules: tuple[Rule, ...]

    def __init__(self, source: str, target: str, rules: Iterable[Rule]):
        for name, value in (("source", source), ("target", target), ("rules", tuple(rules))):
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class ReleasedModule:
    """The part of the released VisionLLM v2 checkpoint that one decoder of it is.

    `module`: its name there. `parts`: (prefix of our decoder, of its link head, of the module) -> where its tensors go;
    all prefixes end with a dot. `fresh`: prefixes of what our decoder has and the released one has not.
    """

    module: str
    parts: Callable[[str, str, str], list[Part]]
    fresh: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """What happened to one tensor of the checkpoint. `to`: our names; of an alias those that were there already, of an
    adapter those of the weight it was added to."""

    name: str
    shape: tuple[int, ...]
    outcome: Outcome
    to: tuple[str, ...] = ()
    why: str = ""


@dataclass
class Report:
    """Where every tensor of a checkpoint went, in its order."""

    entries: list[Entry] = field(default_factory=list)

    def of(self, outcome: Outcome) -> list[Entry]:
        return [entry for entry in self.entries if entry.outcome == outcome]

    def refuse(self, what: str) -> None:
        """`UserError` where a tensor was not understood; `what` is the checkpoint's path."""
        if unknown := self.of("unknown"):
            names = ", ".join(f"'{entry.name}'" for entry in unknown[:3])
            raise UserError(
                f"{what}: {len(unknown)} tensors are not of a known layout: {names}; give a checkpoint as published",
                "unknown_layout",
            )

    def counts(self) -> dict[str, int]:
        """Outcome -> number of tensors."""
        return dict(Counter(entry.outcome for entry in self.entries))


def find_rule(name: str, parts: Iterable[Part]) -> tuple[Rule, tuple[str, ...]] | None:
    """The rule for a tensor of the checkpoint and our full names for it; None where no rule fits."""
    for part in parts:
        if name.startswith(part.source):
            inner = name.removeprefix(part.source)
            for rule in part.rules:
                if (match := rule.match(inner)) is not None:
                    return rule, tuple(part.target + target for target in rule.targets(match))
    return None


def apply(tensors: Mapping[str, Tensor], parts: Iterable[Part]) -> tuple[dict[str, Tensor], Report]:
    """{our name: tensor} and what happened to each tensor of the checkpoint; tensors may be on the meta device.

    Raises `UserError` where two tensors that should be one differ.
    """
    parts, out, origin, report = tuple(parts), {}, {}, Report()
    for name, tensor in tensors.items():
        shape, found = tuple(tensor.shape), find_rule(name, parts)
        if found is None:
            report.entries.append(Entry(name, shape, "unknown"))
            continue
        rule, targets = found
        if rule.drop:
            report.entries.append(Entry(name, shape, "dropped", why=rule.drop))
            continue
        outcome: Outcome = "renamed" if len(targets) == 1 else "split"
        for target, piece in zip(targets, rule.parts(tensor), strict=True):
            if target in out:
                _check_same(origin[target], out[target], name, piece)
                outcome = "alias"
            else:
                out[target], origin[target] = piece, name
        report.entries.append(
            Entry(name, shape, outcome, targets, f"same as {origin[targets[0]]}" * (outcome == "alias"))
        )
    return out, report


def check_fits(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """`UserError` unless `state` has the names and shapes of `expected`, no more and no less."""
    for name in expected:
        if name not in state:
            raise UserError(f"{what} has no tensor for '{name}'; give a complete checkpoint", "incomplete_checkpoint")
    for name, tensor in state.items():
        if name not in expected:
            raise UserError(f"{what} has a tensor for '{name}', which the model lacks", "unknown_layout")
        if tensor.shape != expected[name].shape:
            theirs, ours = (list(t.shape) for t in (tensor, expected[name]))
            raise UserError(
                f"{what}: the tensor for '{name}' is {theirs}, by the settings {ours}; give a checkpoint of that size",
                "wrong_size",
            )


def _check_same(first: str, kept: Tensor, name: str, tensor: Tensor) -> None:
    same = kept.shape == tensor.shape and (tensor.is_meta or torch.equal(kept, tensor))
    if not same:
        raise UserError(
            f"'{name}' should be another name of '{first}' but holds other values; give an unchanged checkpoint",
            "damaged_checkpoint",
        )
