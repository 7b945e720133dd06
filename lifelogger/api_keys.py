"""Keys for programs that read through the API: made, found, listed, removed.

A key is 256 random bits, shown once and stored as its SHA-256. A slow hash with a salt is for what people
think up; nobody guesses 256 bits, and a fast hash can be looked up by an index at each request. An index
is no oracle either: how far a comparison gets tells of the digest, which nobody can choose bytes of.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from lifelogger.connections import PLAIN
from lifelogger.errors import LifeloggerError
from lifelogger.runtime import Runtime
from lifelogger.store.models import ApiKey, User

SCOPES = {
    "read:records": "Read records, their changes and how fresh they are.",
    "read:status": "Read who is connected, the state of their connections and the journal.",
    "sync": "Ask for syncs.",
    "export": "Take along all that is kept about a user.",
    "erase": "Disconnect and erase, and read the receipts.",
}
PREFIX = "llk_"
"""How a key begins, so that people and scanners for secrets know one when they see it."""
USED_EVERY = timedelta(minutes=1)
"""How exact `last_used_at` is: a write for each read would be too much."""


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of a key; not the key itself."""

    name: str
    scopes: frozenset[str]
    user_id: str | None
    """The only user it may ask about; None: all."""
    created_at: datetime
    last_used_at: datetime | None


def add(rt: Runtime, name: str, scopes: Collection[str], user_id: str | None = None) -> str:
    """Make a key and return it: nobody can read it later. Raises `LifeloggerError`."""
    if not 0 < len(name) <= 100 or not re.search(PLAIN, name):
        raise LifeloggerError("A key's name has 1 to 100 printable characters")
    if not scopes or set(scopes) - set(SCOPES):
        raise LifeloggerError(f"A key needs scopes out of {', '.join(SCOPES)}")
    key = PREFIX + secrets.token_urlsafe(32)
    with rt.store.write() as db:
        if user_id is not None and db.scalar(select(User.id).where(User.id == user_id)) is None:
            raise LifeloggerError(f"There is no user {user_id!r}: `lifelogger user list` shows all")
        try:
            db.execute(
                insert(ApiKey).values(
                    name=name,
                    digest=digest_of(key),
                    scopes=sorted(set(scopes)),
                    user_id=user_id,
                    created_at=rt.clock(),
                )
            )
        except IntegrityError:
            raise LifeloggerError(
                f"There is a key {name!r} already: `lifelogger api-key list` shows all"
            ) from None
    return key


def find(rt: Runtime, key: str) -> Key | None:
    """What a key allows; None: there is no such key."""
    now = rt.clock()
    with rt.store.read() as db:
        row = db.execute(select(ApiKey.__table__).where(ApiKey.digest == digest_of(key))).one_or_none()
    if row is None:
        return None
    if row.last_used_at is None or row.last_used_at <= now - USED_EVERY:
        with rt.store.write() as db:
            db.execute(update(ApiKey).where(ApiKey.id == row.id).values(last_used_at=now))
    return _key(row)


def listed(rt: Runtime) -> list[Key]:
    """All keys, by name."""
    with rt.store.read() as db:
        return [_key(row) for row in db.execute(select(ApiKey.__table__).order_by(ApiKey.name))]


def remove(rt: Runtime, name: str) -> bool:
    """Take a key away; it opens nothing from now on. False: there is none of that name."""
    with rt.store.write() as db:
        return db.execute(delete(ApiKey).where(ApiKey.name == name)).rowcount == 1


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def _key(row: Any) -> Key:
    return Key(row.name, frozenset(row.scopes), row.user_id, row.created_at, row.last_used_at)
