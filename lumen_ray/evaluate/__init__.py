"""Evaluation: the metrics of a model on a split of shards. Called as a function it is `lumen_ray.api.evaluate`."""

from lumen_ray.callable_package import make_callable

make_callable(__name__)
