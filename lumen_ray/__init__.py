"""lumen_ray: one vision-language generalist, trained, run over corpora and served on Ray."""

__version__ = "0.1.0"
