"""lumen_ray: one vision-language generalist, trained, run over corpora and served on Ray.

The public API is the names in `__all__`; everything else may change between versions. They are imported on first use,
so that `import lumen_ray` loads neither torch nor Ray.

>>> import lumen_ray
>>> import numpy as np
>>> image = np.full((128, 128, 3), 200, np.uint8)  # [height, width, RGB]
>>> image[32:96, 32:96] = (220, 30, 30)
>>> engine = lumen_ray.Engine.load("nano")
>>> requests = [lumen_ray.make_request("detect", classes=["red square", "blue circle"])]
>>> answers = engine.run([image], [requests])[0]
>>> [prediction.phrase for prediction in answers[0].predictions]
['red square', 'blue circle']
>>> lumen_ray.draw(image, answers).dtype
dtype('uint8')
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lumen_ray import presets as _presets
from lumen_ray.data import model_cache as _model_cache
from lumen_ray.version import __version__ as __version__

if TYPE_CHECKING:
    from lumen_ray.api import answer_batch, calibrate, evaluate, export_labels, label, prepare, serve, train
    from lumen_ray.exemplars import ClassByExample, Example
    from lumen_ray.inference.engine import Engine
    from lumen_ray.inference.request import make_request
    from lumen_ray.viz import draw

__all__ = [
    "ClassByExample",
    "Engine",
    "Example",
    "answer_batch",
    "calibrate",
    "draw",
    "evaluate",
    "export_labels",
    "label",
    "make_request",
    "prepare",
    "serve",
    "train",
]

_presets.download = _model_cache.download

_MODULES = {
    "ClassByExample": "lumen_ray.exemplars",
    "Example": "lumen_ray.exemplars",
    "Engine": "lumen_ray.inference.engine",
    "draw": "lumen_ray.viz",
    "make_request": "lumen_ray.inference.request",
    "prepare": "lumen_ray.api",
    "answer_batch": "lumen_ray.api",
    "calibrate": "lumen_ray.api",
    "export_labels": "lumen_ray.api",
}
_CALLABLE_PACKAGES = ("evaluate", "label", "serve", "train")  # see `callable_package`


def __getattr__(name: str) -> Any:
    if name in _CALLABLE_PACKAGES:
        return import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
