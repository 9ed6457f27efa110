"""Helpers of the tests: fakes, tiny models, process groups."""
