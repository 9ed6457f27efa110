"""The released VisionLLM v2 checkpoint in this package's layout: one table of rules for each of its modules."""
