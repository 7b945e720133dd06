"""A whole lifelogger on this machine: which parts there are, and what `lifelogger run` tells of them."""

from __future__ import annotations

import fcntl
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import requests
from sqlalchemy import func, select

from lifelogger import status, webhooks
from lifelogger.connections import import_lines
from lifelogger.errors import LifeloggerError
from lifelogger.http import NO_PROXY
from lifelogger.planner import AGAIN
from lifelogger.runtime import Runtime
from lifelogger.settings import MAIN, Settings
from lifelogger.store.models import Connection, SyncRun, Tick
from lifelogger.supervisor import Part, Tree, refuse_occupied

SHUTDOWN_MS = 10_000
"""How long a worker lets its running syncs go on when it is told to end. What is cut off then is made good by
a later tick, page by page."""
LOOK_EVERY_SECONDS = 0.5
TELL_EVERY = timedelta(seconds=10)
FEW_PEOPLE, SPARE_PEOPLE = 10, 2


def application() -> Path:
    """The folder with `actors/` and `scheduler.py`. Raises `LifeloggerError` when there is none."""
    for folder in (Path.cwd(), Path(__file__).parents[1]):
        if (folder / "scheduler.py").is_file() and (folder / "actors").is_dir():
            return folder
    raise LifeloggerError(
        "No actors/ and scheduler.py in this folder: run this command in a checkout of lifelogger"
    )


def script(name: str) -> str:
    """The command `name` of the environment that we run in."""
    return str(Path(sys.executable).with_name(name))


def worker_arguments(settings: Settings) -> list[str]:
    """What the `dramatiq` command is told: our actors, and the size of `[worker]`."""
    size = ["--processes", str(settings.worker.processes), "--threads", str(settings.worker.threads)]
    where = ["--path", str(application()), "--worker-shutdown-timeout", str(SHUTDOWN_MS)]
    return ["actors", "scheduler", *where, *size]


def worker_command(settings: Settings) -> list[str]:
    """The real `dramatiq` command, by way of `lifelogger.worker`."""
    return [sys.executable, "-m", "lifelogger.worker", *worker_arguments(settings)]


def periodiq_command() -> list[str]:
    """The real `periodiq` command, with our timetable."""
    return [script("periodiq"), "scheduler", "--path", str(application())]


def web_command(settings: Settings) -> list[str]:
    address = ["--host", settings.web.host, "--port", str(settings.web.port)]
    options = ["--no-server-header", "--no-access-log", "--timeout-graceful-shutdown", "5"]
    return [sys.executable, "-m", "uvicorn", "--factory", "lifelogger.web.app:create_app", *address, *options]


def sandbox_command(settings: Settings) -> list[str]:
    of = settings.sandbox
    options = [
        "--people",
        str(of.people),
        "--seed",
        str(of.seed),
        "--state",
        str(settings.var / "sandbox.db"),
    ]
    return [
        sys.executable, "-m", "lifelogger.sandbox", "--host", of.host, "--port", str(of.port), *options
    ]  # fmt: skip


def web_url(settings: Settings) -> str:
    return _url(settings.web.host, settings.web.port)


def sandbox_url(settings: Settings) -> str:
    return _url(settings.sandbox.host, settings.sandbox.port)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def parts(settings: Settings) -> list[Part]:
    """What a whole lifelogger consists of beside its database and Redis."""
    logs = settings.var / "log"
    size = settings.worker
    found = []
    if settings.simulated:
        refuse_occupied(settings.sandbox.host, settings.sandbox.port, "sandbox")
        found.append(
            Part(
                "sandbox",
                sandbox_command(settings),
                lambda log: "sandbox listening on" in log,
                f"{sandbox_url(settings)} ({settings.sandbox.people} simulated people)",
                logs / "sandbox.log",
            )
        )
    refuse_occupied(settings.web.host, settings.web.port, "web")
    found.append(
        Part(
            "web",
            web_command(settings),
            lambda log: "Application startup complete" in log,
            web_url(settings),
            logs / "web.log",
        )
    )
    found.append(
        Part(
            "worker",
            worker_command(settings),
            lambda log: log.count("Worker process is ready for action") >= size.processes,
            f"{size.processes} processes of {size.threads} threads",
            logs / "worker.log",
        )
    )
    found.append(
        Part(
            "periodiq",
            periodiq_command(),
            lambda log: "Registered periodic actors" in log,
            f"syncs at {settings.schedule.sync!r}, refreshes tokens at {settings.schedule.refresh_tokens!r}",
            logs / "periodiq.log",
        )
    )
    return found


@contextmanager
def alone(settings: Settings) -> Iterator[None]:
    """Refuse to run a second whole lifelogger on the same `var/`. The lock ends with the process."""
    with (settings.var / "run.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LifeloggerError(
                f"lifelogger runs here already (it has locked {settings.var / 'run.lock'})"
            ) from None
        yield


def run(
    rt: Runtime, say: Callable[[str], None], *, seconds: float | None = None, login_token: str | None = None
) -> None:
    """Run everything until Ctrl-C, or for so many seconds. Raises `PartFailed` if a part will not stay up."""
    settings = rt.settings
    with alone(settings), Tree(say).running() as tree:
        rt.redis.ping()  # without it all parts would start, and none could do anything
        at = rt.redis.connection_pool.connection_kwargs
        address = at.get("path") or f"{at.get('host')}:{at.get('port')}"
        say(f"{'redis':<10} {address}{'' if settings.redis.url else ' (embedded)'}")
        say(f"{'database':<10} {rt.store.url.render_as_string(hide_password=True)}")
        for part in parts(settings):
            tree.start(part)
        tree.wait_until_ready()
        if login_token:
            say(f"The login token of {web_url(settings)} is {login_token} (told only once)")
        connect_people(rt, say)
        tree.heed()
        webhooks.keep_all(rt)
        tree.heed()
        reporter = Reporter(rt, say)
        tick_now(rt)
        deadline = None if seconds is None else time.monotonic() + seconds
        while deadline is None or time.monotonic() < deadline:
            tree.watch()
            reporter.look()
            time.sleep(LOOK_EVERY_SECONDS)
        reporter.look(final=True)


def tick_now(rt: Runtime) -> None:
    """Ask for a plan at once: the timetable's next tick may be a quarter of an hour away."""
    from dramatiq import Message

    from lifelogger.broker import broker

    broker.enqueue(
        Message(queue_name="schedule", actor_name="sync_active_users", args=(), kwargs={}, options={})
    )


def connect_people(rt: Runtime, say: Callable[[str], None]) -> None:
    """Connect the sandbox's people at each simulated provider, unless their account is taken."""
    control = f"{sandbox_url(rt.settings)}/control"
    for provider in sorted(rt.settings.simulated):
        people = {
            person["user_id"]: {str(each) for each in person[provider].values()}
            for person in _ask("GET", f"{control}/people")
        }
        with rt.store.read() as db:
            taken = {
                name
                for row in db.execute(
                    select(Connection.user_id, Connection.provider_user_id).where(
                        Connection.provider == provider
                    )
                )
                for name in row
            }
        if len(people) > FEW_PEOPLE:  # some are left for whoever wants to try `lifelogger connect`
            people = dict(list(people.items())[:-SPARE_PEOPLE])
        missing = sorted(user for user, accounts in people.items() if not taken & {user, *accounts})
        if not missing:
            continue
        settings = rt.settings.providers[provider]
        wanted = {
            "provider": provider,
            "people": missing,
            "client_id": settings.client_id,
            "client_secret": settings.client_secret.get_secret_value(),
            "scopes": None,
        }
        lines = [json.dumps(line) for line in _ask("POST", f"{control}/connect", wanted)]
        imported = import_lines(rt, lines)
        say(f"{imported.added} simulated people connected their {rt.providers[provider].title}")


def _ask(method: str, url: str, body: Any = None) -> Any:
    try:
        reply = requests.request(method, url, json=body, timeout=60, proxies=NO_PROXY)
        reply.raise_for_status()
        return reply.json()
    except (requests.RequestException, ValueError) as error:
        trouble = f"The sandbox does not answer as it should at {url}: {type(error).__name__}"
    raise LifeloggerError(trouble)


class Reporter:
    """Tells what each tick did: one line when it has planned, one when what it planned is done."""

    def __init__(self, rt: Runtime, say: Callable[[str], None]) -> None:
        self.rt, self.say = rt, say
        self.since = rt.clock()
        """Ticks that fired before are told."""
        self.told_at = self.since
        self.run_id = self._newest_run()
        """Journal rows up to this one are told."""

    def look(self, *, final: bool = False) -> None:
        """Tell what is new; `final`: also of what is not done yet."""
        with self.rt.store.read() as db:
            ticks = db.execute(
                select(Tick.__table__).where(Tick.fired_at > self.since).order_by(Tick.fired_at)
            ).all()
            for tick in ticks:
                self.since = tick.fired_at
                planned = f"{status.count(tick.planned, 'user')} planned" if tick.planned else "nobody is due"
                if tick.name != AGAIN:
                    self.say(f"{clock(tick.fired_at)} tick: {planned}")
                elif tick.planned:
                    self.say(f"{clock(tick.fired_at)} the first reply told the budget: {planned}")
            settled, now = self._settled(db), self.rt.clock()
            if not final and not settled and now - self.told_at < TELL_EVERY:
                return
            self.told_at = now
            running = db.scalar(select(func.min(SyncRun.id)).where(SyncRun.outcome == "running"))
            # Rows in order: one that is passed over while it runs would never be told.
            ended = [SyncRun.id < running] if running and not final else [SyncRun.outcome != "running"]
            rows = db.execute(
                select(
                    Connection.provider,
                    SyncRun.outcome,
                    func.count().label("runs"),
                    func.max(SyncRun.id).label("newest"),
                    *(
                        func.sum(getattr(SyncRun, name)).label(name)
                        for name in ("requests", "inserted", "updated", "deleted", "quarantined")
                    ),
                )
                .join_from(SyncRun, Connection, SyncRun.connection_id == Connection.id)
                .where(SyncRun.id > self.run_id, *ended)
                .group_by(Connection.provider, SyncRun.outcome)
                .order_by(Connection.provider, func.count().desc())
            ).all()
        if not rows:
            return
        self.run_id = max(row.newest for row in rows)
        for provider in dict.fromkeys(row.provider for row in rows):
            mine = [row for row in rows if row.provider == provider]
            self.say(f"{clock(self.rt.clock())} {self._told(provider, mine)}")

    def _told(self, provider: str, rows: list[Any]) -> str:
        outcomes = ", ".join(f"{row.runs} {row.outcome}" for row in rows)
        sums = {
            name: sum(getattr(row, name) or 0 for row in rows)
            for name in ("inserted", "updated", "deleted", "quarantined", "requests")
        }
        title = self.rt.providers[provider].title if provider in self.rt.providers else provider
        windows = ", ".join(
            f"{window['used']} of {window['limit']} {window['pool']}{of} until {window['end']:%H:%M}"
            for of, windows in self._windows(provider)
            for window in windows
            if window["seconds"] < 86400
        )
        syncs = status.count(sum(row.runs for row in rows), "sync")
        cost = status.count(sums["requests"], "request") + (f" ({windows})" if windows else "")
        return f"{title}: {syncs} ({outcomes}); {status.brought(sums)}; {cost}"

    def _windows(self, provider: str) -> list[tuple[str, list[dict[str, Any]]]]:
        """The budget of each application, by what is added to name it: nothing of the main one."""
        every = [each for each in self.rt.applications() if each.provider.name == provider]
        return [
            ("" if each.name == MAIN else f" of {each.name}", status.budget(self.rt, *each.key) or [])
            for each in every
        ]

    def _settled(self, db: Any) -> bool:
        """Whether nothing that was planned is still to come."""
        now = self.rt.clock()
        under_way = db.scalar(
            select(func.count()).where(Connection.claimed_at.is_not(None), Connection.next_sync_at > now)
        )
        running = db.scalar(
            select(func.count()).where(SyncRun.id > self.run_id, SyncRun.outcome == "running")
        )
        return not under_way and not running

    def _newest_run(self) -> int:
        """The newest journal row whose sync has ended, as all before it have."""
        with self.rt.store.read() as db:
            running = db.scalar(select(func.min(SyncRun.id)).where(SyncRun.outcome == "running"))
            return running - 1 if running else db.scalar(select(func.max(SyncRun.id))) or 0


def clock(instant: datetime) -> str:
    return f"{instant:%H:%M:%S}"
