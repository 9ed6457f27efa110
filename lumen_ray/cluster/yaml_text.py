"""YAML with comments behind the values that have one."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from typing import Any

import yaml

_WIDTH = 110
_SIGN = "\N{SECTION SIGN}"
_MARKED = re.compile(f"^( *)(.*){_SIGN}(\\d+){_SIGN}$", re.MULTILINE)


@dataclass(frozen=True)
class Figure:
    """A number or a quantity, and where it comes from."""

    value: Any
    why: str


def plain(value: Any) -> Any:
    """The same without comments."""
    if isinstance(value, Figure):
        return value.value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def dump(value: Any) -> str:
    """YAML in block style, keys in their order; a figure has its `why` behind it as a comment, or above."""
    figures: list[Figure] = []

    def marked(item: Any) -> Any:
        if isinstance(item, Figure):
            figures.append(item)
            return f"{_SIGN}{len(figures) - 1}{_SIGN}"
        if isinstance(item, dict):
            return {key: marked(each) for key, each in item.items()}
        return [marked(each) for each in item] if isinstance(item, list) else item

    text = yaml.dump(marked(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_WIDTH)
    return _MARKED.sub(lambda match: _with_comment(match[1], match[2], figures[int(match[3])]), text)


def _with_comment(indent: str, key: str, figure: Figure) -> str:
    scalar = yaml.safe_dump(figure.value).removesuffix("...\n").strip()
    line = f"{indent}{key}{scalar}  # {figure.why}"
    if len(line) <= _WIDTH:
        return line
    above = [f"{indent}# {part}\n" for part in textwrap.wrap(figure.why, _WIDTH - len(indent) - 2)]
    return "".join([*above, f"{indent}{key}{scalar}"])


class _Dumper(yaml.SafeDumper):
    """Writes long texts as blocks, and equal values twice in place of an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else ">" if len(text) > _WIDTH // 2 and " " in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
