"""Requests and answers as JSON, which HTTP bodies and batch files share: no HTTP, no Ray."""
