"""Errors that a user can cause. Any other exception is a bug and keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """An error with one sentence that says what to change: the CLI prints it and exits with 2, the server answers 4xx.

    `reason` is its machine-readable form, e.g. ``"unknown_task"``; `field`: the place of the wrong value in a request
    or a settings file, where it has one, e.g. ``"messages.0.content"``.
    """

    def __init__(self, message: str, reason: str = "invalid_request", field: str | None = None):
        super().__init__(message)
        self.reason = reason
        self.field = field

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str | None]]:  # keeps all when Ray pickles the error
        return type(self), (str(self), self.reason, self.field)


def suggest(word: str, valid: Iterable[str]) -> str:
    """`" did you mean 'detect'?"` if a valid word is similar, else the empty string. The name of a family, such as
    ``yolo`` of ``yolo-detect`` and ``yolo-pose``, suggests all its words."""
    valid = list(valid)
    family = [name for name in valid if name.startswith(f"{word}-")]
    if len(family) > 1:
        return f" did you mean one of {', '.join(family)}?"
    near = difflib.get_close_matches(word, valid, n=1, cutoff=0.6)
    return f" did you mean '{near[0]}'?" if near else ""


def unknown(kind: str, word: str, valid: Iterable[str], plural: str | None = None) -> UserError:
    """The error for a word that is not one of `valid`; it names the nearest one and lists all."""
    valid = sorted(valid)
    hint = suggest(word, valid)
    message = f"unknown {kind} '{word}';{hint} {plural or kind + 's'}: {', '.join(valid)}"
    return UserError(message, reason=f"unknown_{kind.replace(' ', '_')}")
