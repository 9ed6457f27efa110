"""Clients of the HTTP API over a fake backend."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from support.serve_fakes import FakeBackend, save_random_model

from lumen_ray.serve.access import logger
from lumen_ray.serve.api import create_api
from lumen_ray.serve.settings import ServeSettings
from lumen_ray.wire.settings import Limits


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def settings() -> ServeSettings:
    limits = Limits(
        max_body_bytes=200_000,
        max_pixels=10_000,
        max_classes=5,
        max_requests=3,
        max_text_chars=100,
        max_history_chars=150,
    )
    return ServeSettings(model="unused", limits=limits)


@pytest.fixture
def client(backend: FakeBackend, settings: ServeSettings) -> TestClient:
    return TestClient(create_api(backend, settings))


@pytest.fixture
def access_lines() -> Iterator[list[logging.LogRecord]]:
    """The lines of the access log. Ray Serve's import keeps lines of its loggers from pytest's own handler."""
    lines: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = lines.append
    logger.addHandler(handler)
    level = logger.level
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A nano model with random weights."""
    return save_random_model(tmp_path_factory.mktemp("serve") / "model")
