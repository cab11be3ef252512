"""The application over a backend that draws, in this process and on a real socket."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from fakes.backends import DrawingBackend
from servers.served import Served, local_client
from serving.settings import ServingSettings


def png(size: tuple[int, int] = (64, 48), colour: str = "teal", kind: str = "PNG") -> bytes:
    """A picture as a file."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def picture() -> bytes:
    return png()


@pytest.fixture
def encoded(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


@pytest.fixture
def backend() -> DrawingBackend:
    return DrawingBackend()


@pytest.fixture
def settings() -> ServingSettings:
    return ServingSettings(adapters=("pixelsmile@prod",), port=0, grace_seconds=5)


@pytest.fixture
def app(backend: DrawingBackend, settings: ServingSettings, tmp_path: Path) -> FastAPI:
    from serving.http.app import service_app

    return service_app(backend, settings, home=tmp_path)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with local_client(app) as made:
        yield made


@pytest.fixture
def served(app: FastAPI, settings: ServingSettings) -> Iterator[Served]:
    with Served(app, settings) as made:
        yield made
