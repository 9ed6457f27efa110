"""Labelling: a model over a corpus of images on Ray Data. Called as a function it is `lumen_ray.api.label`."""

from lumen_ray.callable_package import make_callable

make_callable(__name__)
