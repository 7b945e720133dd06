"""Who let which application do what: codes, grants and their tokens, for any simulated provider.

What a token lives and when it is replaced is the provider's business; here is only what there is.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from lifelogger.sandbox.state import State


@dataclass(frozen=True, slots=True)
class Grant:
    """One person's authorisation of one application."""

    id: int
    client: str
    person: str
    scopes: tuple[str, ...]
    revoked: bool


@dataclass(frozen=True, slots=True)
class Token:
    """An access or refresh token as it stands. `expires_at` is epoch seconds, None: never."""

    token: str
    grant: Grant
    expires_at: int | None
    replaced: bool
    """A newer one took its place, and this one stopped working."""


@dataclass(frozen=True, slots=True)
class Code:
    """What a person agreed to, until the application fetches its tokens."""

    client: str
    person: str
    scopes: tuple[str, ...]


class Grants:
    """The grants of one provider. Every verb that writes belongs into a transaction."""

    def __init__(self, state: State, provider: str) -> None:
        self.db = state.db
        self.provider = provider

    def open(self, client: str, person: str, scopes: tuple[str, ...], now: float) -> Grant:
        sql = "INSERT INTO grants VALUES (NULL, ?, ?, ?, ?, ?, NULL)"
        values = (self.provider, client, person, " ".join(scopes), now)
        return Grant(self.db.execute(sql, values).lastrowid or 0, client, person, scopes, False)

    def issue(self, grant: Grant, kind: str, expires_at: int | None = None) -> str:
        """Make a token of kind `access` or `refresh`."""
        token = secrets.token_hex(20)
        values = (token, grant.id, kind, expires_at)
        self.db.execute("INSERT INTO tokens VALUES (?, ?, ?, ?, NULL)", values)
        return token

    def find(self, token: str, kind: str) -> Token | None:
        """A token of this provider, working or not; None when there never was such a one."""
        return self._token("t.token = ? AND t.kind = ? AND g.provider = ?", (token, kind, self.provider))

    def newest(self, grant: Grant, kind: str) -> Token | None:
        """The token of a grant that lives longest."""
        where = "t.grant_id = ? AND t.kind = ? AND t.replaced IS NULL ORDER BY t.expires_at DESC LIMIT 1"
        return self._token(where, (grant.id, kind))

    def replace(self, grant: Grant, kind: str, now: float) -> None:
        """End a grant's tokens of a kind: newer ones take their place."""
        sql = "UPDATE tokens SET replaced = ? WHERE grant_id = ? AND kind = ? AND replaced IS NULL"
        self.db.execute(sql, (now, grant.id, kind))

    def revoke(self, person: str, now: float, client: str | None = None) -> int:
        """End what a person granted (to one application). Returns how many grants that were."""
        sql = (
            "UPDATE grants SET revoked = ? WHERE provider = ? AND person = ? "
            "AND client = coalesce(?, client) AND revoked IS NULL"
        )
        return self.db.execute(sql, (now, self.provider, person, client)).rowcount

    def expire(self, person: str, now: float) -> None:
        """Let a person's access tokens expire now."""
        sql = (
            "UPDATE tokens SET expires_at = min(expires_at, ?) WHERE kind = 'access' AND grant_id IN "
            "(SELECT id FROM grants WHERE provider = ? AND person = ?)"
        )
        self.db.execute(sql, (int(now), self.provider, person))

    def live(self) -> list[tuple[str, str]]:
        """Every person and application that have a grant now."""
        sql = "SELECT DISTINCT person, client FROM grants WHERE provider = ? AND revoked IS NULL"
        return [(str(person), str(client)) for person, client in self.db.execute(sql, (self.provider,))]

    def newest_client(self) -> str:
        """The application that was let in last; empty when there is none."""
        sql = "SELECT client FROM grants WHERE provider = ? ORDER BY id DESC LIMIT 1"
        row = self.db.execute(sql, (self.provider,)).fetchone()
        return str(row[0]) if row else ""

    def write_code(self, code: Code, redirect_uri: str, expires_at: float) -> str:
        word = secrets.token_hex(20)
        values = (
            word,
            self.provider,
            code.client,
            code.person,
            " ".join(code.scopes),
            redirect_uri,
            expires_at,
        )
        self.db.execute("INSERT INTO codes VALUES (?, ?, ?, ?, ?, ?, ?, NULL)", values)
        return word

    def redeem(self, word: str, client: str, now: float) -> Code | None:
        """Use a code up; None when it is unknown, used, too old or another application's."""
        sql = (
            "UPDATE codes SET used = ? WHERE code = ? AND provider = ? AND client = ? "
            "AND used IS NULL AND expires_at > ? RETURNING client, person, scopes"
        )
        row = self.db.execute(sql, (now, word, self.provider, client, now)).fetchone()
        return Code(row[0], row[1], tuple(row[2].split())) if row else None

    def _token(self, where: str, values: tuple[object, ...]) -> Token | None:
        row = self.db.execute(
            "SELECT t.token, t.expires_at, t.replaced, g.id, g.client, g.person, g.scopes, g.revoked "
            f"FROM tokens t JOIN grants g ON g.id = t.grant_id WHERE {where}",
            values,
        ).fetchone()
        if row is None:
            return None
        token, expires_at, replaced, id_, client, person, scopes, revoked = row
        grant = Grant(id_, client, person, tuple(scopes.split()), revoked is not None)
        return Token(token, grant, expires_at, replaced is not None)
