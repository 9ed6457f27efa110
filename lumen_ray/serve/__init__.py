"""Serving: a model over HTTP on Ray Serve. Called as a function it is `lumen_ray.api.serve`."""

from lumen_ray.callable_package import make_callable

make_callable(__name__)
