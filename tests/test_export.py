"""An export has everything of one user and nothing else, and is there whole or not at all."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lifelogger import cli, export, sync
from lifelogger.connections import add_user
from lifelogger.errors import LifeloggerError
from lifelogger.runtime import Runtime
from lifelogger.store.models import Base, Connection, Quarantined, Record, Stream, SyncRun
from tests.live import (
    connect,
    connection,
    rows,
)
from tests.sandbox.control import Control

KINDS = {"stream": Stream, "record": Record, "quarantined": Quarantined, "sync_run": SyncRun}
ONCE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
INNER = {"id", "connection_id", "digest", "change"}


@pytest.fixture
def rt(live: Runtime, sandbox: Control) -> Runtime:
    """Alice and another, both synced; one item of each is bad, one of Alice's was deleted."""
    doomed = sandbox.add("alice")
    for person in ("alice", sandbox.people()[1]["user_id"]):
        sandbox.add(person, raw={"id": 7, "start_date": "2026-11-24T10:00:00Z", "elapsed_time": "long"})
        connect(live, sandbox, person)
        sync.run(person, runtime=live)
    sandbox.delete(doomed)
    sandbox.step(60)
    sync.run("alice", runtime=live)
    return live


def test_everything_of_the_user(rt: Runtime) -> None:
    found = list(export.objects(rt, "alice"))

    assert found[0]["object"] == "user"
    assert found[0]["id"] == "alice"
    assert [each["object"] for each in found].count("connection") == 1
    for kind, model in KINDS.items():
        mine = [each for each in found if each["object"] == kind]
        stored = rows(rt, model.__table__, "alice")
        assert len(mine) == len(stored) > 0, kind
        columns = {column.name for column in model.__table__.columns} - INNER
        assert all(set(each) == columns | {"object", "provider"} for each in mine)
    keys = [each["external_id"] for each in found if each["object"] == "record"]
    assert keys == [row.external_id for row in rows(rt, Record.__table__, "alice")]
    assert export.size(rt, "alice") == len(found)
    json.dumps(found)


def test_every_table_of_a_user_is_in_it() -> None:
    """A new table that hangs on a connection or a user has to be exported, too."""
    theirs = {
        table.name
        for table in Base.metadata.tables.values()
        if any(key.column.table.name in ("users", "connections") for key in table.foreign_keys)
    } - {"api_keys"}  # the application's, even if one is for a user

    assert theirs == {"connections"} | {table.name for table in export._TABLES.values()}


def test_nothing_of_others_and_no_token(rt: Runtime, sandbox: Control) -> None:
    other = sandbox.people()[1]["user_id"]
    text = "\n".join(json.dumps(each) for each in export.objects(rt, "alice"))

    theirs = {row.external_id for row in rows(rt, Record.__table__, other)} - {"7"}
    mine = {each["external_id"] for each in export.objects(rt, "alice") if each["object"] == "record"}
    assert theirs
    assert not theirs & mine
    assert f'"{other}"' not in text
    row = connection(rt, "alice")
    for sealed in (row.access_token, row.refresh_token):
        assert rt.vault.decrypt(sealed) not in text
        assert sealed.decode(errors="replace") not in text
    secret = {"access_token", "refresh_token"}
    assert not any(secret & set(each) for each in export.objects(rt, "alice"))
    assert secret <= {column.name for column in Connection.__table__.columns}


@ONCE
def test_it_goes_on_over_many_batches(rt: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(export.objects(rt, "alice"))
    monkeypatch.setattr(export, "BATCH", 3)

    assert list(export.objects(rt, "alice")) == whole


def test_a_user_without_connections(live: Runtime) -> None:
    add_user(live, "bare")

    assert [each["object"] for each in export.objects(live, "bare")] == ["user"]
    assert export.size(live, "bare") == 1


@ONCE
def test_a_user_nobody_knows(live: Runtime) -> None:
    with pytest.raises(LifeloggerError, match="There is no user 'nobody'"):
        list(export.objects(live, "nobody"))


# The command -------------------------------------------------------------------------------------------


def command(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        cli.main(["export", *arguments])
    return end.value.code


def test_printing_and_writing_are_the_same(
    rt: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "processwide", lambda: rt)
    file = tmp_path / "alice.jsonl"

    assert command("alice") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert command("alice", "-o", str(file)) == 0
    written = capsys.readouterr()

    assert file.read_text() == printed.out
    assert written.out == ""
    assert f"{len(printed.out.splitlines()):,} objects written to" in written.err
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir() if "alice" in path.name] == ["alice.jsonl"]


@ONCE
@pytest.mark.parametrize(("trouble", "status"), [(KeyboardInterrupt(), 130), (LifeloggerError("broken"), 1)])
def test_an_interrupted_export_leaves_no_half_file(
    rt: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: BaseException, status: int
) -> None:
    monkeypatch.setattr(cli, "processwide", lambda: rt)
    folder = tmp_path / "exports"
    folder.mkdir()
    (folder / "alice.jsonl").write_text("the one before\n")
    objects = export.objects

    def half(rt: Runtime, user_id: str) -> Iterator[dict[str, Any]]:
        for number, each in enumerate(objects(rt, user_id)):
            if number == 5:
                raise trouble
            yield each

    monkeypatch.setattr(export, "objects", half)

    assert command("alice", "-o", str(folder / "alice.jsonl")) == status
    assert [path.name for path in folder.iterdir()] == ["alice.jsonl"]
    assert (folder / "alice.jsonl").read_text() == "the one before\n"


@ONCE
@pytest.mark.parametrize(
    ("target", "sentence"),
    [("nowhere/file", "No such file or directory"), ("", "it is a folder, name a file in it")],
)
def test_where_nothing_can_be_written(
    rt: Runtime,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    sentence: str,
) -> None:
    monkeypatch.setattr(cli, "processwide", lambda: rt)
    place = tmp_path / target

    assert command("alice", "-o", str(place)) == 1
    assert f"{place} cannot be written: {sentence}" in capsys.readouterr().err


@ONCE
def test_timestamps_have_an_offset(rt: Runtime) -> None:
    created = next(each["created_at"] for each in export.objects(rt, "alice"))

    assert created.endswith("+00:00")
