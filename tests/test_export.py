"""An export has everything of one user and nothing else, and is there whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import re
import stat
import zipfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from lifelogger import cli, client, export, leaving, sync
from lifelogger.connections import add_user
from lifelogger.errors import LifeloggerError
from lifelogger.runtime import Runtime
from lifelogger.store.models import Base, Connection, Quarantined, Record, Stream, SyncRun, User
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


# The archive -------------------------------------------------------------------------------------------


def opened(content: Iterator[bytes]) -> zipfile.ZipFile:
    archive = zipfile.ZipFile(io.BytesIO(b"".join(content)))
    assert archive.testzip() is None
    return archive


def lines(archive: zipfile.ZipFile, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in archive.read(name).decode("ascii").splitlines()]


def test_an_archive_has_the_same_by_kind(rt: Runtime) -> None:
    whole = list(export.objects(rt, "alice"))
    archive = opened(export.archive(rt, "alice"))
    manifest = json.loads(archive.read("manifest.json"))

    names = [entry["name"] for entry in manifest["files"]]
    assert archive.namelist() == ["README.txt", *names, "manifest.json"]
    assert "records/strava-activities.jsonl" in names
    told = []
    for entry in manifest["files"]:
        content = archive.read(entry["name"])
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert (entry["bytes"], entry["objects"]) == (len(content), len(lines(archive, entry["name"])))
        assert entry["what"]
        told += lines(archive, entry["name"])
    assert told == [{name: value for name, value in each.items() if name != "object"} for each in whole]
    assert manifest["user"] == "alice"
    assert manifest["made_at"] == rt.clock().isoformat()
    assert manifest["changes_after"] == client.newest_cursor(runtime=rt)
    stored = {row.external_id: row.raw for row in rows(rt, Record.__table__, "alice")}
    records = lines(archive, "records/strava-activities.jsonl")
    assert {each["external_id"]: each["raw"] for each in records} == stored
    readme = archive.read("README.txt").decode()
    assert "2026-11-24 12:03:00 UTC" in readme
    assert all(name.partition("/")[0] in readme for name in names)


@ONCE
def test_a_record_file_for_each_kind_of_data_of_each_provider(live: Runtime, sandbox: Control) -> None:
    for provider in ("strava", "oura"):
        connect(live, sandbox, "alice", provider=provider)
    sync.run("alice", runtime=live)

    names = [
        name
        for name in opened(export.archive(live, "alice")).namelist()
        if name.startswith(("records/strava-", "records/oura-"))
    ]
    assert names[0] == "records/strava-activities.jsonl"
    assert "records/oura-daily_sleep.jsonl" in names
    assert len(names) == len(rows(live, Stream.__table__, "alice"))


@ONCE
def test_no_token_is_in_an_archive(rt: Runtime) -> None:
    archive = opened(export.archive(rt, "alice"))
    everything = "".join(archive.read(name).decode() for name in archive.namelist())

    row = connection(rt, "alice")
    for sealed in (row.access_token, row.refresh_token):
        assert rt.vault.decrypt(sealed) not in everything
        assert sealed.decode(errors="replace") not in everything
    assert "access_token" not in everything


@ONCE
def test_it_is_made_as_it_is_taken_with_no_transaction_open(
    rt: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is a batch and what the compressor holds; whoever reads slowly keeps nobody waiting."""
    monkeypatch.setattr(export, "BATCH", 2)
    seen: list[int] = []
    reads: list[int] = []
    rows_of = export._rows

    def watched(*arguments: Any) -> Iterator[dict[str, Any]]:
        for row in rows_of(*arguments):
            reads.append(1)
            yield row

    monkeypatch.setattr(export, "_rows", watched)
    content = export.archive(rt, "alice", told=seen.append)
    ahead = 0
    for some in content:
        # Noise in each record would fill a piece: what is compressed is never more than a batch of rows.
        assert len(some) < 100_000
        ahead = max(ahead, len(reads) - sum(seen))
        assert rt.store.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        with rt.store.write() as db:  # on SQLite an open reader would be met by a checkpoint, a writer never
            db.execute(update(User).values(asked_at=rt.clock()))
    assert ahead <= 2 * export.BATCH
    assert sum(seen) == export.size(rt, "alice")


def test_what_comes_meanwhile_is_left_for_the_change_feed(rt: Runtime, sandbox: Control) -> None:
    """Whoever follows it from the manifest's cursor misses nothing."""
    keys = {row.external_id for row in rows(rt, Record.__table__, "alice")}
    cursor = client.newest_cursor(runtime=rt)
    content = export.archive(rt, "alice")
    first = next(content)
    late = sandbox.add("alice")
    sync.run("alice", runtime=rt)

    archive = opened(chain([first], content))

    assert {each["external_id"] for each in lines(archive, "records/strava-activities.jsonl")} == keys
    manifest = json.loads(archive.read("manifest.json"))
    assert manifest["changes_after"] == cursor
    (change,) = client.changes(cursor, user_id="alice", runtime=rt).changes
    assert change["external_id"] == str(late)


@pytest.mark.parametrize("leave", ["disconnect", "erase", "and come back"])
def test_who_leaves_meanwhile_ends_it(rt: Runtime, sandbox: Control, leave: str) -> None:
    """What was sent by then cannot be opened: nobody takes it for the whole."""
    content = export.archive(rt, "alice")
    sent = next(content)
    if leave == "erase":
        leaving.erase(rt, "alice")
    else:
        leaving.disconnect(rt, "alice", "strava")
    if leave == "and come back":  # under the same number, on SQLite
        connect(rt, sandbox, "alice")
        sandbox.step(1)

    pieces = [sent]
    with pytest.raises(LifeloggerError, match="not whole"):
        pieces.extend(content)

    with pytest.raises(zipfile.BadZipFile):
        zipfile.ZipFile(io.BytesIO(b"".join(pieces)))


@pytest.mark.parametrize(
    ("user_id", "name"),
    [("alice", "lifelogger-alice.zip"), ('a/b"\r\n../é', "lifelogger-a_b_.._.zip"), ("x" * 200, None)],
)
def test_the_name_of_a_file_is_one_everywhere(user_id: str, name: str | None) -> None:
    made = export.file_name(user_id)

    assert name in (None, made)
    assert re.fullmatch(r"lifelogger-[A-Za-z0-9._-]{1,100}\.zip", made)


# The command -------------------------------------------------------------------------------------------


def command(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        cli.main(["export", *arguments])
    return end.value.code


@pytest.mark.parametrize("form", ["zip", "jsonl"])
def test_printing_and_writing_are_the_same(
    rt: Runtime, tmp_path: Path, capfdbinary: Any, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(cli, "processwide", lambda: rt)
    file = tmp_path / f"alice.{form}"

    assert command("alice", "--format", form, "-o", "-") == 0
    printed = capfdbinary.readouterr()
    assert printed.err == b""
    assert command("alice", "--format", form, "-o", str(file)) == 0
    written = capfdbinary.readouterr()

    assert file.read_bytes() == printed.out
    assert written.out == b""
    assert f"{export.size(rt, 'alice'):,} objects written to".encode() in written.err
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir() if "alice" in path.name] == [file.name]


@ONCE
def test_without_more_it_is_an_archive_in_this_folder(
    rt: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is there is somebody's copy of another day."""
    monkeypatch.setattr(cli, "processwide", lambda: rt)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    assert command("alice") == 0
    made = (folder / "lifelogger-alice.zip").read_bytes()
    assert "records/strava-activities.jsonl" in zipfile.ZipFile(io.BytesIO(made)).namelist()
    assert command("alice") == 1
    assert "is there already" in capsys.readouterr().err
    assert (folder / "lifelogger-alice.zip").read_bytes() == made
    assert command("alice", "-o", "lifelogger-alice.zip") == 0
    assert [path.name for path in folder.iterdir()] == ["lifelogger-alice.zip"]


@ONCE
def test_objects_a_line_are_printed(
    rt: Runtime, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "processwide", lambda: rt)

    assert command("alice", "--format", "jsonl") == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == list(export.objects(rt, "alice"))


@ONCE
@pytest.mark.parametrize(("trouble", "status"), [(KeyboardInterrupt(), 130), (LifeloggerError("broken"), 1)])
def test_an_interrupted_export_leaves_no_half_file(
    rt: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: BaseException, status: int
) -> None:
    monkeypatch.setattr(cli, "processwide", lambda: rt)
    folder = tmp_path / "exports"
    folder.mkdir()
    (folder / "alice.zip").write_text("the one before\n")
    rows_of = export._rows

    def half(*arguments: Any) -> Iterator[dict[str, Any]]:
        for number, each in enumerate(rows_of(*arguments)):
            if number == 5:
                raise trouble
            yield each

    monkeypatch.setattr(export, "_rows", half)

    assert command("alice", "-o", str(folder / "alice.zip")) == status
    assert [path.name for path in folder.iterdir()] == ["alice.zip"]
    assert (folder / "alice.zip").read_text() == "the one before\n"


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
