"""Training: a recipe over shards on Ray Train. Called as a function it is `lumen_ray.api.train`."""

from lumen_ray.callable_package import make_callable

make_callable(__name__)
