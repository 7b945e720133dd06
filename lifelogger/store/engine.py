"""One database, SQLite or PostgreSQL, and the two ways to talk to it: `read` and `write`."""

from __future__ import annotations

import re
import time
from collections import namedtuple
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Dialect, Engine, create_engine, event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.schema import Table

BUSY_SECONDS = 30
IDLE_SECONDS = 5.0
"""A connection to PostgreSQL that was idle for longer is tried before it is used: the server may have gone
meanwhile. To try each time would be a round trip more for every transaction."""
CONNECT_SECONDS = 5
"""How long PostgreSQL may take to answer at first; a host that swallows packets would take minutes."""
GONE_SECONDS = 30
"""After that the two ends of a line that broke give each other up. A machine that is cut off within a
transaction holds its locks so long, that of the change feed among them, for which every writer waits;
PostgreSQL's own patience is two hours. No transaction of ours is idle for a fraction of it."""


class Store:
    """Short transactions only: never keep one open while HTTP runs.

    Errors do not show the parameters of their statement: people's data is among them.
    """

    def __init__(self, url: str) -> None:
        self.url = make_url(url)
        if self.url.drivername == "postgresql":
            self.url = self.url.set(drivername="postgresql+psycopg")
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.engine = sqlite_engine(self.url.database or "") if self.is_sqlite else postgres_engine(self.url)
        # Without `preserve_rowcount` an INSERT tells none on PostgreSQL: who comes first would not know it.
        self._writing = self.engine.execution_options(writes=True, preserve_rowcount=True)
        self._reading = self.engine
        if not self.is_sqlite:  # each statement sees what is committed anyway: no BEGIN and COMMIT around it
            self._reading = self.engine.execution_options(isolation_level="AUTOCOMMIT")

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads; on PostgreSQL each statement sees what is committed by then."""
        with self._reading.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that writes: committed at the end of the block, undone by any error."""
        with self._writing.begin() as connection:
            yield connection

    @contextmanager
    def at_once(self) -> Iterator[Connection]:
        """For one statement that writes: PostgreSQL needs no transaction around it."""
        with self.write() if self.is_sqlite else self.read() as connection:
            yield connection

    def insert(self, table: Any) -> Any:
        """The dialect's INSERT, which has `on_conflict_do_…` on both databases."""
        assert isinstance(table, Table)
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)

    def scrub(self) -> bool:
        """Let nothing that was deleted outlive it in SQLite's log; False while others still read from there.

        PostgreSQL keeps dead rows until its own VACUUM, so there is nothing to do here.
        """
        if not self.is_sqlite:
            return True
        raw = self.engine.raw_connection()
        try:
            busy, _, _ = raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        finally:
            raw.close()
        return not busy

    def close(self) -> None:
        self.engine.dispose()


def table(model: Any) -> Table:
    """The table of a model, for statements that know nothing of objects."""
    found = model.__table__
    assert isinstance(found, Table)
    return found


class Prepared:
    """A statement of the hot path: built and compiled once, then handed to the driver as it is.

        FIND = Prepared(select(User.created_at).where(User.id == bindparam("of")))
        [row] = FIND(db, of="ann")

    All its parameters are named; the types convert as ever, and errors are SQLAlchemy's. It costs a third of
    `Connection.execute`, which for statements as short as ours takes longer than the database.
    """

    def __init__(self, statement: Any) -> None:
        self.statement = statement
        self._compiled: dict[str, _Compiled] = {}

    def __call__(self, db: Connection, **values: Any) -> list[Any]:
        """Run it in the transaction of `db`; return its rows, none if it tells nothing."""
        return self.compiled(db.dialect).run(db, values)

    def bind(self, **values: Any) -> Bound:
        """The statement with its values, to run it later."""
        return Bound(self, values)

    def compiled(self, dialect: Dialect) -> _Compiled:
        compiled = self._compiled.get(dialect.name)
        if compiled is None:
            compiled = self._compiled[dialect.name] = _Compiled(self.statement, dialect)
        return compiled


@dataclass(frozen=True, slots=True)
class Bound:
    """A statement with its values."""

    statement: Prepared
    values: dict[str, Any]

    def __call__(self, db: Connection) -> list[Any]:
        return self.statement(db, **self.values)


def run_together(db: Connection, writes: Sequence[Bound]) -> None:
    """Run statements that return nothing, each of rows of its own; PostgreSQL gets them as one."""
    if db.dialect.name != "postgresql":
        for each in writes:
            each(db)
        return
    compiled = [each.statement.compiled(db.dialect) for each in writes]
    named: dict[str, Any] = {}
    for number, (one, each) in enumerate(zip(compiled, writes, strict=True)):
        named |= {f"{name}_{number}": value for name, value in one.named(each.values).items()}
    with _errors(db, sql := _joined(tuple(one.sql for one in compiled))):
        cursor = db.connection.cursor()
        cursor.execute(sql, named)
        cursor.close()


@lru_cache
def _joined(statements: tuple[str, ...]) -> str:
    """One statement of several, whose parameters are named by the number of theirs."""
    *firsts, last = (
        re.sub(r"%\((\w+)\)s", rf"%(\g<1>_{number})s", sql) for number, sql in enumerate(statements)
    )
    within = ", ".join(f"s{number} AS ({sql})" for number, sql in enumerate(firsts))
    return f"WITH {within} {last}" if within else last


@contextmanager
def _errors(db: Connection, sql: str) -> Iterator[None]:
    """The driver's errors, as SQLAlchemy raises them."""
    try:
        yield
    except db.dialect.loaded_dbapi.Error as error:
        raise DBAPIError.instance(
            sql, None, error, db.dialect.loaded_dbapi.Error, hide_parameters=True, dialect=db.dialect
        ) from error


class _Compiled:
    """A statement for one database."""

    def __init__(self, statement: Any, dialect: Dialect) -> None:
        compiled = statement.compile(dialect=dialect)
        assert not compiled.prefetch, "a default of Python's is not looked up here: name the column"
        self.sql = str(compiled)
        self.order: list[str] | None = compiled.positiontup
        binds = {name: bind for bind, name in compiled.bind_names.items()}
        kinds = {name: bind.type.dialect_impl(dialect) for name, bind in binds.items()}
        self.convert = {name: to for name, kind in kinds.items() if (to := kind.bind_processor(dialect))}
        self.constant = {
            name: self._converted(name, bind.value) for name, bind in binds.items() if not bind.required
        }
        columns = tuple(statement.exported_columns)
        self.row = namedtuple("Row", [each.name for each in columns]) if columns else None
        self.dialect, self.types = dialect, [each.type.dialect_impl(dialect) for each in columns]
        self.read: list[tuple[int, Any]] | None = None
        """What the columns' values go through, once a first answer has told their types."""

    def _converted(self, name: str, value: Any) -> Any:
        return self.convert[name](value) if name in self.convert else value

    def named(self, values: dict[str, Any]) -> dict[str, Any]:
        """All parameters as the driver gets them."""
        named = {**self.constant, **values}
        for name in self.convert.keys() & values.keys():
            named[name] = self.convert[name](values[name])
        return named

    def run(self, db: Connection, values: dict[str, Any]) -> list[Any]:
        named = self.named(values)
        with _errors(db, self.sql):
            cursor = db.connection.cursor()
            cursor.execute(self.sql, named if self.order is None else [named[name] for name in self.order])
            found = cursor.fetchall() if self.row else []
            if self.read is None and self.row:
                told = zip(self.types, cursor.description, strict=True)
                to = [kind.result_processor(self.dialect, column[1]) for kind, column in told]
                self.read = [(at, of) for at, of in enumerate(to) if of]
            cursor.close()
        if not self.read:
            return [self.row(*each) for each in found]  # type: ignore[misc]
        rows = []
        for each in found:
            row = list(each)
            for at, of in self.read:
                row[at] = of(row[at])
            rows.append(self.row(*row))  # type: ignore[misc]
        return rows


def postgres_engine(url: URL) -> Engine:
    """PostgreSQL, where both ends notice that a line is broken; what the URL says of that wins.

    The server's end is told by statements: PgBouncer refuses who asks for it in `options`.
    """
    idle, interval, count = GONE_SECONDS // 2, GONE_SECONDS // 6, 3
    arguments = {
        "connect_timeout": CONNECT_SECONDS,
        "tcp_user_timeout": GONE_SECONDS * 1000,
        "keepalives_idle": idle,
        "keepalives_interval": interval,
        "keepalives_count": count,
    }
    session = {
        "idle_in_transaction_session_timeout": f"'{GONE_SECONDS}s'",
        "tcp_user_timeout": f"'{GONE_SECONDS}s'",
        "tcp_keepalives_idle": idle,
        "tcp_keepalives_interval": interval,
        "tcp_keepalives_count": count,
    }
    engine = create_engine(
        url, pool_size=16, max_overflow=16, isolation_level="READ COMMITTED", hide_parameters=True,
        connect_args={name: value for name, value in arguments.items() if name not in url.query},
    )  # fmt: skip

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        if "options" not in url.query:
            connection.execute("; ".join(f"SET {name} = {value}" for name, value in session.items()))
            connection.commit()  # what is set in a transaction is undone with it

    @event.listens_for(engine, "checkin")
    def note(connection: Any, record: Any) -> None:
        record.info["idle_since"] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def try_out(connection: Any, record: Any, proxy: Any) -> None:
        idle_since = record.info.get("idle_since", time.monotonic())
        if time.monotonic() - idle_since > IDLE_SECONDS:
            try:
                engine.dialect.do_ping(connection)
            except engine.dialect.dbapi.Error as gone:  # type: ignore[union-attr]
                raise DisconnectionError from gone  # the pool drops what it has, and makes a new one

    return engine


def sqlite_engine(path: str) -> Engine:
    """SQLite for several processes: WAL, waiting for locks, writers that begin as writers.

    A deferred transaction that turns into a writer fails at once when another one wrote meanwhile,
    whatever the time-out, so writers take the lock at their start (sqlite.org/lang_transaction.html).
    """
    if path and path != ":memory:":
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": BUSY_SECONDS}, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves, below
        # What is deleted is overwritten: a page that is free again would keep somebody's data for years.
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "secure_delete=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine
