"""The world in which providers are tested: it has people at both ends, and a short past."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lifelogger.sandbox.server import Sandbox
from tests.conftest import world

pytest.register_assert_rewrite("tests.providers.contract")
from tests.providers.contract import LIFE_DAYS  # noqa: E402


@pytest.fixture(scope="session")
def sandbox_server() -> Iterator[Sandbox]:
    with world(people=21, history_days=LIFE_DAYS) as server:
        yield server
