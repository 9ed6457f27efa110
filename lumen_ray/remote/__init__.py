"""Commands as jobs of a Ray cluster elsewhere: `--address` of the verbs, and `lumen-ray jobs`."""
