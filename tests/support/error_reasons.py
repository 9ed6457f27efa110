"""The reasons of the package's errors, collected from its code: what `UserError` and its like are raised with."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / "lumen_ray"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Place:
    """A node of the code, the functions around it (innermost last) and its file."""

    node: ast.AST
    functions: tuple[ast.FunctionDef | ast.AsyncFunctionDef, ...]
    file: Path

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}: {ast.unparse(self.node)}"


@cache
def places() -> list[Place]:
    """All calls, classes, functions and assignments of the package."""
    found: list[Place] = []

    def walk(node: ast.AST, functions: tuple, file: Path) -> None:
        if isinstance(node, (ast.Call, ast.ClassDef, ast.Assign, *FUNCTIONS)):
            found.append(Place(node, functions, file))
        inside = (*functions, node) if isinstance(node, FUNCTIONS) else functions
        for child in ast.iter_child_nodes(node):
            walk(child, inside, file)

    for file in sorted(ROOT.rglob("*.py")):
        walk(ast.parse(file.read_text(encoding="utf-8")), (), file)
    return found


@cache
def calls() -> dict[str, list[Place]]:
    """Name of a function or class -> its calls."""
    found: dict[str, list[Place]] = defaultdict(list)
    for place in places():
        if isinstance(place.node, ast.Call):
            function = place.node.func
            found[function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")].append(place)
    return dict(found)


def argument(call: ast.Call, position: int, name: str) -> ast.expr | None:
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    return named.get(name) or (call.args[position] if len(call.args) > position else None)


def texts(place: Place) -> set[str]:
    """The values that the expression can have: of constants, choices between them, f-strings of both, and parameters,
    by the calls of their function. Empty for the reason of another error that is passed on."""
    node = place.node

    def inner(node: ast.AST) -> set[str]:
        return texts(Place(node, place.functions, place.file))

    match node:
        case ast.Constant(value=None):
            return set()
        case ast.Constant(value=str(text)):
            return {text}
        case ast.IfExp(body=one, orelse=other):
            return inner(one) | inner(other)
        case ast.JoinedStr(values=parts):
            return {"".join(pieces) for pieces in product(*map(inner, parts))}
        case ast.FormattedValue(value=value) | ast.Call(func=ast.Name(id="getattr"), args=[_, _, value]):
            return inner(value)
        case ast.Name(id=name) if any(name in parameters(f) for f in place.functions):
            function = next(f for f in reversed(place.functions) if name in parameters(f))
            return set().union(*(texts(given) for given in given_as(name, function)))
        case ast.Name() | ast.Attribute() | ast.Subscript() | ast.Call() | ast.Starred():
            return set()
    raise AssertionError(f"cannot be followed: {place}")


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    names = [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]
    return names[1:] if names[:1] == ["self"] else names


def given_as(parameter: str, function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[Place]:
    """What the calls of a function give for a parameter."""
    for place in calls().get(function.name, ()):
        assert isinstance(place.node, ast.Call)
        found = argument(place.node, parameters(function).index(parameter), parameter)
        if found is not None:
            yield Place(found, place.functions, place.file)


def error_classes() -> set[str]:
    """`UserError` and the classes derived from it."""
    classes = [place.node for place in places() if isinstance(place.node, ast.ClassDef)]
    bases = {c.name: {base.id for base in c.bases if isinstance(base, ast.Name)} for c in classes}
    return {"UserError"} | {name for name, found in bases.items() if "UserError" in found}


def reasons() -> set[str]:
    """Of errors in all places: raised, answered by the server, or noted beside an image or a record."""
    from lumen_ray.serve.batches.runner import _STOPPED
    from lumen_ray.wire.errors import STATUS

    found = set(STATUS) | set(_STOPPED)
    classes = error_classes()
    for name, of_name in calls().items():
        for place in of_name:
            assert isinstance(place.node, ast.Call)
            given = argument(place.node, 1 if name in classes else 99, "reason")
            if given is not None:
                found |= texts(Place(given, place.functions, place.file))
            elif name == "unknown":
                kinds = texts(Place(place.node.args[0], place.functions, place.file))
                found |= {f"unknown_{kind.replace(' ', '_')}" for kind in kinds}
    for place in places():
        found |= assigned(place.node) | defaults(place.node)
    return found - {""}


def assigned(node: ast.AST) -> set[str]:
    """The constants that are assigned to something called `reason`."""
    match node:
        case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
            pairs = list(zip(targets, values, strict=True))
        case ast.Assign(targets=[target], value=value):
            pairs = [(target, value)]
        case _:
            return set()
    named = [value for target, value in pairs if getattr(target, "id", getattr(target, "attr", "")) == "reason"]
    return {value.value for value in named if isinstance(value, ast.Constant)}


def defaults(node: ast.AST) -> set[str]:
    """The defaults of parameters called `reason`."""
    if not isinstance(node, FUNCTIONS):
        return set()
    args = node.args
    pairs = [*zip(args.args[len(args.args) - len(args.defaults) :], args.defaults, strict=True)]
    pairs += zip(args.kwonlyargs, args.kw_defaults, strict=True)
    return {value.value for arg, value in pairs if arg.arg == "reason" and isinstance(value, ast.Constant)}
