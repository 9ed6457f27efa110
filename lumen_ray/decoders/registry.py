"""The decoders there are: those of this package, and those that other packages register.

A decoder of another package is an entry point of the group `lumen_ray.decoders` that names a `DecoderSpec`:

    [project.entry-points."lumen_ray.decoders"]
    my_decoder = "my_package:SPEC"

One that cannot be registered is left out, with a sentence in `problems()` that names its package; the others work on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING

from lumen_ray.decoders import diffusion, grounding_dino, lumen, unipose
from lumen_ray.decoders.spec import TRUNK_PARTS, DecoderSettings, DecoderSpec, check
from lumen_ray.errors import UserError, unknown

if TYPE_CHECKING:
    from lumen_ray.decoders.base import Decoder, ImageDecoder

GROUP = "lumen_ray.decoders"
#: in the order in which they are asked: the first that a model has serves a task, unless its settings say otherwise
_BUILT_IN = (lumen.SPEC, grounding_dino.SPEC, unipose.SPEC, diffusion.STABLE_DIFFUSION, diffusion.INSTRUCT_PIX2PIX)


def _registered(points: Iterable[EntryPoint]) -> tuple[dict[str, DecoderSpec], list[str]]:
    """The built-in specs and those of entry points, by name; and why others were left out."""
    specs, problems = {spec.name: spec for spec in _BUILT_IN}, []
    for point in sorted(points, key=lambda point: point.name):
        package = point.dist.name if point.dist else point.value
        try:
            spec = point.load()
            fault = check(spec, specs)
        except (Exception, SystemExit) as error:  # a package's own code: whatever it raises, the others must work on
            fault = f"{point.value} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())})"
        if fault:
            problems.append(f"decoder '{point.name}' of package '{package}' is left out: {fault}")
        else:
            specs[spec.name] = replace(spec, package=package)
    return specs, problems


_SPECS, _PROBLEMS = _registered(entry_points(group=GROUP))
#: name -> spec, in the order in which decoders are asked
DECODERS: Mapping[str, DecoderSpec] = MappingProxyType(_SPECS)
#: names a stage of a recipe may list under `trainable`: each is a part of the model
PARTS = (*TRUNK_PARTS, *DECODERS)
#: every loss that a model can have, which recipes weigh
LOSSES = ("lm", *(loss for spec in DECODERS.values() for loss in spec.losses))


def problems() -> tuple[str, ...]:
    """One sentence for each registered decoder that was left out."""
    return tuple(_PROBLEMS)


def get(name: str) -> DecoderSpec:
    """The spec of a decoder; `UserError` that lists the valid names otherwise."""
    if name not in DECODERS:
        raise unknown("decoder", name, DECODERS)
    return DECODERS[name]


def decoder_class(name: str) -> type[Decoder] | type[ImageDecoder]:
    """The class of a decoder, imported now. Raises `UserError` if a package registers a class that is none, or that has
    another spec than the registered one."""
    spec = get(name)
    cls = spec.resolve("decoder")
    if spec.package and getattr(cls, "spec", None) != spec:
        raise UserError(
            f"decoder '{name}' of package '{spec.package}' cannot be used: {spec.decoder} has no 'spec', or one that "
            "the entry point does not name; derive it from Decoder or ImageDecoder and set spec to the registered one",
            "broken_decoder",
        )
    return cls


def check_usable(name: str) -> None:
    """Imports all that the spec of another package's decoder names. Raises `UserError` where that fails."""
    if DECODERS[name].package:
        decoder_class(name)
        for field in ("link_head", "flops"):
            DECODERS[name].resolve(field)


def decoders_for(task: str) -> tuple[str, ...]:
    """Names of the decoders that can serve a task, those asked first in front."""
    return tuple(name for name, spec in DECODERS.items() if task in spec.tasks)


def serves(decoder: str, task: str) -> bool:
    """Whether a decoder can serve a task."""
    return task in DECODERS[decoder].tasks


def choice_example() -> str:
    """A choice of decoders as the command line takes it, e.g. ``detect=grounding_dino,pose=unipose``."""
    return ",".join(f"{task}={decoders_for(task)[-1]}" for task in ("detect", "pose"))


def dense_readers(sections: Mapping[str, DecoderSettings]) -> frozenset[str]:
    """The decoders, of those with these settings by name, that read the trunk's dense features."""
    return frozenset(name for name, section in sections.items() if section.source(DECODERS[name].reads) == "dense")
