"""Tokens at rest: several keys, their exchange, the key file, and nothing readable in whatever is printed."""

from __future__ import annotations

import dataclasses
import logging
import stat
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import select, update

from lifelogger.connections import import_lines
from lifelogger.crypto import Vault, key_file
from lifelogger.errors import SettingsError
from lifelogger.runtime import Runtime
from lifelogger.settings import Settings
from lifelogger.store.models import Connection
from lifelogger.tokens import rotate_keys

FIRST, SECOND, THIRD = (Fernet.generate_key().decode() for _ in range(3))
TOKEN = "token-of-ann"
NOT_AMONG = "security.encryption_keys: a stored token was encrypted with a key that is not among them"


def test_the_first_key_encrypts_and_all_decrypt() -> None:
    vault = Vault([FIRST, SECOND])

    assert Vault([FIRST]).decrypt(vault.encrypt(TOKEN)) == TOKEN
    assert vault.decrypt(Vault([SECOND]).encrypt(TOKEN)) == TOKEN
    with pytest.raises(SettingsError):
        Vault([SECOND]).decrypt(vault.encrypt(TOKEN))


def test_the_same_token_never_looks_the_same() -> None:
    vault = Vault([FIRST])

    assert vault.encrypt(TOKEN) != vault.encrypt(TOKEN)


def test_a_rotated_token_needs_the_first_key_only() -> None:
    old = Vault([SECOND]).encrypt(TOKEN)

    rotated = Vault([FIRST, SECOND]).rotate(old)

    assert Vault([FIRST]).decrypt(rotated) == TOKEN


@pytest.mark.parametrize("verb", ["decrypt", "rotate"])
@pytest.mark.parametrize(
    "sealed",
    [Vault([SECOND]).encrypt(TOKEN), b"", b"never sealed", b"\xff" * 80],
    ids=["of another key", "empty", "never sealed", "noise"],
)
def test_what_no_key_opens_is_told_as_a_setting(verb: str, sealed: bytes) -> None:
    with pytest.raises(SettingsError) as caught:
        getattr(Vault([FIRST, THIRD]), verb)(sealed)

    assert str(caught.value) == NOT_AMONG


@pytest.mark.parametrize(
    "bad",
    ["hush", "hush-" + FIRST, FIRST[:-2] + "hü", "", FIRST[:-8]],
    ids=["a word", "too long", "not base64", "empty", "too short"],
)
def test_a_key_that_is_none_is_refused_unseen(bad: str) -> None:
    with pytest.raises(SettingsError, match=r"security\.encryption_keys: each key is 32 bytes") as caught:
        Vault([FIRST, bad])

    assert "lifelogger keys new" in str(caught.value)
    assert FIRST not in printed(caught.value)
    assert "hush" not in str(caught.value)


def test_no_keys_at_all_are_refused() -> None:
    with pytest.raises(SettingsError):
        Vault([])


def test_nothing_secret_stands_in_a_repr_or_a_traceback() -> None:
    vault = Vault([FIRST, SECOND])
    sealed = Vault([THIRD]).encrypt(TOKEN)

    with pytest.raises(SettingsError) as caught:
        vault.decrypt(sealed)

    for text in (repr(vault), str(vault), f"{vault}", printed(caught.value)):
        for secret in (FIRST, SECOND, TOKEN, sealed.decode()):
            assert secret not in text
    assert "InvalidToken" not in printed(caught.value), "the cause from below stays out of tracebacks"


def printed(error: BaseException) -> str:
    """As Dramatiq writes it into the message."""
    return "".join(traceback.format_exception(error))


# The key file -----------------------------------------------------------------------------------------------


def test_the_key_file_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "encryption.key"

    key = key_file(path)

    assert key_file(path) == key == path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]
    assert Vault([key]).decrypt(Vault([key]).encrypt(TOKEN)) == TOKEN


def test_threads_that_come_first_together_agree_on_one_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has seen that there is none before any of them makes one."""
    path, threads = tmp_path / "encryption.key", 4
    together = threading.Barrier(threads, timeout=10)
    generate = Fernet.generate_key

    def generate_together() -> bytes:
        together.wait()
        return generate()

    monkeypatch.setattr(Fernet, "generate_key", generate_together)
    with ThreadPoolExecutor(threads) as pool:
        keys = set(pool.map(key_file, [path] * threads))

    assert keys == {path.read_text()}
    assert list(tmp_path.iterdir()) == [path]


def test_processes_that_come_first_together_agree_on_one_key(tmp_path: Path) -> None:
    path = tmp_path / "encryption.key"
    program = (
        "import sys; from pathlib import Path; from lifelogger.crypto import key_file\n"
        "print('ready', flush=True); sys.stdin.readline(); print(key_file(Path(sys.argv[1])))"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()

    keys = {child.communicate(timeout=20)[0].strip() for child in children}

    assert keys == {path.read_text()}


def test_the_settings_say_which_keys(settings_env: Callable[..., Settings]) -> None:
    made = settings_env()
    sealed = Vault.of(made).encrypt(TOKEN)
    assert Vault([(made.var / "encryption.key").read_text()]).decrypt(sealed) == TOKEN

    named = settings_env(security={"encryption_keys": [FIRST, SECOND]})
    assert Vault([FIRST]).decrypt(Vault.of(named).encrypt(TOKEN)) == TOKEN


# All rows ---------------------------------------------------------------------------------------------------


def connect(rt: Runtime, user_id: str, refresh: str | None = "refresh") -> None:
    refresh_token = "null" if refresh is None else f'"{refresh} of {user_id}"'.replace(" ", "-")
    import_lines(
        rt,
        [
            f'{{"user_id": "{user_id}", "provider": "strava", "access_token": "access-of-{user_id}",'
            f' "refresh_token": {refresh_token}, "expires_at": 1900000000}}'
        ],
    )


def tokens(rt: Runtime, vault: Vault) -> dict[str, tuple[str, str | None]]:
    with rt.store.read() as db:
        rows = db.execute(select(Connection.user_id, Connection.access_token, Connection.refresh_token)).all()
    return {
        user: (vault.decrypt(access), vault.decrypt(refresh) if refresh else None)
        for user, access, refresh in rows
    }


def with_keys(rt: Runtime, *keys: str) -> Runtime:
    return dataclasses.replace(rt, vault=Vault(list(keys)))


def test_rotating_the_keys_makes_the_old_one_superfluous(runtime: Runtime) -> None:
    """More rows than one transaction takes."""
    before = with_keys(runtime, SECOND)
    connect(before, "ann")
    connect(before, "bob", refresh=None)
    with runtime.store.read() as db:
        template = dict(db.execute(select(Connection.__table__).limit(1)).one()._mapping)
    copies = [
        {**template, "id": number, "user_id": f"user {number}", "provider_user_id": None}
        for number in range(100, 320)
    ]
    with runtime.store.write() as db:
        users = runtime.store.insert(Connection.metadata.tables["users"])
        db.execute(users, [{"id": row["user_id"], "created_at": row["created_at"]} for row in copies])
        db.execute(runtime.store.insert(Connection.__table__), copies)
    expected = tokens(runtime, Vault([SECOND]))

    assert rotate_keys(with_keys(runtime, FIRST, SECOND)) == 222

    assert tokens(runtime, Vault([FIRST])) == expected
    assert expected["ann"] == ("access-of-ann", "refresh-of-ann")
    assert expected["bob"] == ("access-of-bob", None)


def test_rotating_twice_is_as_good_as_once(runtime: Runtime) -> None:
    connect(with_keys(runtime, SECOND), "ann")
    both = with_keys(runtime, FIRST, SECOND)

    assert (rotate_keys(both), rotate_keys(both)) == (1, 1)

    assert tokens(runtime, Vault([FIRST])) == {"ann": ("access-of-ann", "refresh-of-ann")}


def test_rotating_leaves_a_connection_to_its_refresh(runtime: Runtime) -> None:
    """A refresh under way writes its own pair; one whose worker is gone does not."""
    for user_id in ("ann", "bob"):
        connect(with_keys(runtime, SECOND), user_id)
    now = runtime.clock()
    for user_id, until in (("ann", now + timedelta(minutes=1)), ("bob", now - timedelta(minutes=1))):
        with runtime.store.write() as db:
            db.execute(update(Connection).where(Connection.user_id == user_id).values(refreshing_until=until))

    assert rotate_keys(with_keys(runtime, FIRST, SECOND)) == 1

    with pytest.raises(SettingsError):
        tokens(runtime, Vault([FIRST]))
    assert set(tokens(runtime, Vault([FIRST, SECOND]))) == {"ann", "bob"}


def test_rotating_without_the_old_key_changes_nothing(
    runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    connect(with_keys(runtime, SECOND), "ann")

    with pytest.raises(SettingsError, match="not among them"):
        rotate_keys(with_keys(runtime, FIRST))

    assert tokens(runtime, Vault([SECOND])) == {"ann": ("access-of-ann", "refresh-of-ann")}
    assert "access-of-ann" not in caplog.text
