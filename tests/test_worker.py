"""The worker's command: what is imported before its processes are forked, and what is not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lifelogger.settings import Settings
from tests.processes import ROOT

REPORT = """
import gc, json, sys
import dramatiq.cli
from lifelogger.__main__ import main

def forked(*_):
    there = set(sys.modules)
    import actors, scheduler
    told = {"arguments": sys.argv, "there": sorted(there), "later": sorted(set(sys.modules) - there)}
    print(json.dumps({**told, "frozen": gc.get_freeze_count(), "collects": gc.isenabled()}))

dramatiq.cli.main = forked
sys.argv = ["lifelogger", *sys.argv[1:]]
main()
"""


def lifelogger(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, up to where `dramatiq` would fork."""
    command = [sys.executable, "-c", REPORT, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)


def test_all_that_actors_import_is_there_before_the_fork_and_little_else(
    settings_env: Callable[..., Settings],
) -> None:
    settings_env(redis={"url": "redis://127.0.0.1:1"}, worker={"processes": 3, "threads": 5})

    done = lifelogger("worker")

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["later"] == ["actors", "actors.notify", "actors.sync", "scheduler"]
    assert not {"lifelogger.cli", "typer", "rich", "alembic", "fastapi", "mcp"} & set(told["there"])
    assert told["arguments"][:3] == ["dramatiq", "actors", "scheduler"]
    assert " ".join(told["arguments"]).endswith("--processes 3 --threads 5")
    assert told["collects"]
    assert told["frozen"] > 100_000


@pytest.mark.parametrize("arguments", [["worker"], ["periodiq"]])
def test_wrong_settings_are_told_in_the_same_words_as_by_any_command(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "settings.toml").write_text("[worker]\nthreads = 0\n")
    monkeypatch.setenv("LIFELOGGER_SETTINGS", str(tmp_path / "settings.toml"))

    done = lifelogger(*arguments)

    assert done.returncode == 2
    assert done.stderr.startswith("The settings are wrong:\n  worker.threads = 0 (")
    assert not done.stdout


def test_its_help_is_that_of_the_command_line() -> None:
    done = lifelogger("worker", "--help")

    assert done.returncode == 0
    assert "Run a worker, which runs the syncs." in done.stdout
