"""Predicts time, cost and bottleneck of a job on a cluster before it is run: `lumen-ray plan`."""
