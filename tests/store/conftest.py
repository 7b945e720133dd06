"""The store is where databases differ: its tests run on both every time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import BOTH, database


@pytest.fixture(params=BOTH)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return database(request.param, request, tmp_path)
