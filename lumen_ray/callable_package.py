"""Makes the packages `train`, `label`, `evaluate` and `serve` callable as the API functions of the same name.

`lumen_ray.train` is then one object, whichever of its modules were imported before: a package whose modules import as
usual, and a function that forwards to `lumen_ray.api.train`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from lumen_ray import api


class CallablePackage(ModuleType):
    """A package that is called like the function of its name in `lumen_ray.api`."""

    __signature__: inspect.Signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return api_function(self.__name__)(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[[str], ModuleType], tuple[str]]:
        return import_module, (self.__name__,)


def api_function(package: str) -> Callable[..., Any]:
    """The function of `lumen_ray.api` that the package `lumen_ray.<name>` stands for."""
    return getattr(api, package.rpartition(".")[2])


def make_callable(package: str) -> None:
    """Makes an imported package callable, with the docstring and the signature of its API function.

    package: its full name, `__name__` in its `__init__.py`.
    """
    module, function = sys.modules[package], api_function(package)
    module.__class__ = CallablePackage
    module.__doc__ = inspect.getdoc(function)
    module.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]  # of the class just given
