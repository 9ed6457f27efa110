"""Manifests for clusters, with sizes from what a preset needs."""
