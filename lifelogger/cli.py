"""The command line. Each command is a few lines: what it does is in the library.

Exit status: 0 it worked, 1 it did not (a sentence on standard error says why and what next), 2 the
command or the settings are wrong, 130 interrupted. For `run` and `periodiq`, Ctrl-C is the regular end: 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
import time
import webbrowser
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import redis
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from sqlalchemy.exc import SQLAlchemyError

from lifelogger import status as standing
from lifelogger.errors import LifeloggerError, SettingsError
from lifelogger.runtime import Runtime, checked, database_url
from lifelogger.runtime import runtime as processwide
from lifelogger.settings import MAIN, get_settings
from lifelogger.status import brought, count

app = typer.Typer(
    help="Keeps people's wearable data fresh in the background.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
user_app = typer.Typer(help="The people whose data is synced.", no_args_is_help=True)
connections_app = typer.Typer(help="Their connections to providers.", no_args_is_help=True)
keys_app = typer.Typer(help="The keys that encrypt tokens.", no_args_is_help=True)
api_key_app = typer.Typer(help="The keys of programs that read through the API.", no_args_is_help=True)
notify_app = typer.Typer(help="The webhooks that tell other applications of changes.", no_args_is_help=True)
webhooks_app = typer.Typer(help="What providers tell us by themselves.", no_args_is_help=True)
app.add_typer(user_app, name="user")
app.add_typer(webhooks_app, name="webhooks")
app.add_typer(connections_app, name="connections")
app.add_typer(keys_app, name="keys")
app.add_typer(api_key_app, name="api-key")
app.add_typer(notify_app, name="notify")

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)


class Form(StrEnum):
    """What an export is written as."""

    zip = "zip"
    jsonl = "jsonl"


WIDE = 10_000
"""Columns of a table that goes to a file or another program: nothing is cut or wrapped there."""
MOST_FAULTS = 20
LOOK_EVERY_SECONDS = 0.1
FOLLOW_EVERY_SECONDS = 1.0
PATIENCE_SECONDS = 60.0
"""How long we wait for a worker before we ask whether one runs."""


def _seconds(value: str | float) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h|)", str(value).strip())  # a default comes by here too
    if match is None or float(match[1]) == 0:
        raise typer.BadParameter(f"{value!r} is not a time: write 60s, 5m or 1h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def _new_id(value: str) -> str:
    from lifelogger.connections import ID_RULE, may_be_id

    if not may_be_id(value):
        raise typer.BadParameter(f"{value[:50]!r} cannot be a user's id: {ID_RULE}")
    return value


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
UserId = Annotated[str, typer.Argument(metavar="USER", help="The user's id.")]
NewUserId = Annotated[str, typer.Argument(metavar="USER", help="The user's id.", callback=_new_id)]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit. Errors are sentences, not tracebacks."""
    try:
        app(list(arguments) if arguments is not None else None, prog_name="lifelogger")
        raise SystemExit(0)
    except SettingsError as error:
        _fail(str(error), 2)
    except LifeloggerError as error:
        _fail(str(error))
    except SQLAlchemyError as error:
        from lifelogger.doctor import database_trouble

        _fail(database_trouble(error))
    except redis.RedisError as error:
        from lifelogger.doctor import redis_trouble

        _fail(redis_trouble(error))
    except BrokenPipeError:
        # Whoever read us has gone; closing standard output must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        _fail(f"{error.filename or 'Standard output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _fail(sentence: str, status: int = 1) -> NoReturn:
    err.print(escape(sentence), style="red")
    raise SystemExit(status)


def _runtime() -> Runtime:
    return processwide()


# Processes -----------------------------------------------------------------------------------------


@app.command()
def run(
    seconds: Annotated[
        float | None,
        typer.Option(
            "--for", metavar="TIME", parser=_seconds, help="End by itself after so long: 60s, 5m, 1h."
        ),
    ] = None,
) -> None:
    """Run everything on this machine until Ctrl-C.

    The sandbox (where a provider is simulated), web, worker and periodiq, in this order.
    """
    from lifelogger import local
    from lifelogger.store.migrate import upgrade
    from lifelogger.web.login import login_token

    rt = _runtime()
    upgrade(rt.store)
    token, made = login_token(rt.settings)
    local.run(rt, _say, seconds=seconds, login_token=token if made else None)


def _say(line: str) -> None:
    out.print(escape(line))
    out.file.flush()


@app.command()
def worker() -> None:
    """Run a worker, which runs the syncs.

    It is the `dramatiq` command with our actors, as large as [worker] in the settings says.
    """
    from lifelogger import worker

    raise typer.Exit(worker.run())  # not another process, which would import everything again


@app.command()
def periodiq() -> None:
    """Run the timetable, which plans the syncs.

    It is the `periodiq` command, started again when it dies.
    """
    from lifelogger import local

    settings = checked(get_settings())
    told = f"syncs at {settings.schedule.sync!r}, refreshes tokens at {settings.schedule.refresh_tokens!r}"
    log = str(settings.var / "log" / "periodiq.log")
    command = [log, "Registered periodic actors", told, *local.periodiq_command()]
    _become([sys.executable, "-m", "lifelogger.supervisor", "periodiq", *command])


@app.command()
def web() -> None:
    """Serve the status pages, the API and the dashboard."""
    from lifelogger import local
    from lifelogger.supervisor import refuse_occupied
    from lifelogger.web.login import login_token

    settings = checked(get_settings())
    refuse_occupied(settings.web.host, settings.web.port, "web")
    token, made = login_token(settings)
    if made:
        _say(f"The login token is {token} (told only once)")
    _say(f"lifelogger's pages are at {local.web_url(settings)}")
    _become(local.web_command(settings))


@app.command()
def sandbox() -> None:
    """Run the simulated providers."""
    from lifelogger import local
    from lifelogger.supervisor import refuse_occupied

    settings = checked(get_settings())
    refuse_occupied(settings.sandbox.host, settings.sandbox.port, "sandbox")
    _become(local.sandbox_command(settings))


def _become(command: Sequence[str]) -> NoReturn:
    """Go on as another command, so that signals and the exit status are its own."""
    sys.stdout.flush()
    os.execv(command[0], list(command))


@app.command()
def migrate() -> None:
    """Bring the database to the tables of this version."""
    from lifelogger.store import Store
    from lifelogger.store.migrate import revisions, upgrade

    settings = checked(get_settings())
    store = Store(database_url(settings))
    before, newest = revisions(store)
    upgrade(store)
    out.print("Nothing to do." if before == newest else f"From {before or 'no tables'} to {newest}.")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Look for what is wrong, and say what to do.

    A line for each check; the exit status is 1 when one failed.
    """
    from lifelogger.doctor import examine

    findings = list(examine(_runtime()))
    if as_json:
        _print_json([{"part": each.part, "ok": each.ok, "sentence": each.sentence} for each in findings])
    else:
        for each in findings:
            mark = {True: "[green]ok  [/]", False: "[red]FAIL[/]", None: "[yellow]note[/]"}[each.ok]
            out.print(f"{mark} {each.part:<10} {escape(each.sentence)}")
    if any(each.ok is False for each in findings):
        raise typer.Exit(1)


# People --------------------------------------------------------------------------------------------


@user_app.command("add")
def user_add(user_id: NewUserId) -> None:
    """Add a user."""
    from lifelogger.connections import add_user

    if not add_user(_runtime(), user_id):
        raise LifeloggerError(f"There is a user {user_id!r} already: `lifelogger status {_quoted(user_id)}`")
    _say(f"Added {user_id}. Next: `lifelogger connect {_quoted(user_id)} PROVIDER`")


@user_app.command("list")
def user_list(
    search: Annotated[str, typer.Option(help="Only ids that begin so.")] = "",
    limit: Annotated[int, typer.Option(min=1)] = 50,
    as_json: AsJson = False,
) -> None:
    """List users with the state of their connections."""
    found = standing.users(_runtime(), limit=limit, search=search)
    if as_json:
        _print_json(found)
        return
    table = _table("user", "provider", "state")
    for user in found:
        for connection in user["connections"] or [{"provider": "", "sentence": "No connection."}]:
            table.add_row(escape(user["user_id"]), connection["provider"], escape(connection["sentence"]))
    _print_table(table, "No users yet: `lifelogger connect USER PROVIDER` adds one.")


@user_app.command("remove")
def user_remove(
    user_id: UserId,
    yes: Annotated[bool, typer.Option("--yes", help="Really: without it nothing is deleted.")] = False,
) -> None:
    """Erase a user with all their data.

    Their authorisations are revoked at the providers. Prints a receipt, which names nobody.
    """
    from lifelogger import leaving

    rt = _runtime()
    user = _known(rt, user_id)
    if not yes:
        held = sum(each["records"] for each in user["connections"])
        raise LifeloggerError(
            f"Nothing was deleted yet of {count(len(user['connections']), 'connection')} and "
            f"{count(held, 'record')}. `lifelogger export {_quoted(user_id)}` keeps a copy; "
            f"`lifelogger user remove {_quoted(user_id)} --yes` deletes them for good"
        )
    _print_receipt(leaving.erase(rt, user_id))


@app.command()
def disconnect(
    user_id: UserId,
    provider: Annotated[str, typer.Argument(help="As `lifelogger status USER` names it.")],
) -> None:
    """Disconnect a user's account at a provider.

    All that came from there is deleted, and the authorisation is revoked. Prints a receipt that names nobody.
    """
    from lifelogger import leaving

    rt = _runtime()
    _known(rt, user_id)
    _print_receipt(leaving.disconnect(rt, user_id, provider))


@app.command()
def receipt(
    number: Annotated[str, typer.Argument(metavar="NUMBER", help="As it was printed.")],
    as_json: AsJson = False,
) -> None:
    """Show the receipt of somebody who left."""
    from lifelogger import leaving

    found = leaving.receipt(_runtime(), number)
    if found is None:
        raise LifeloggerError(f"There is no receipt {number!r}")
    if as_json:
        _print_json(found)
    else:
        _print_receipt(found)


def _print_receipt(said: dict[str, Any]) -> None:
    _say(f"Receipt {said['receipt']}: {said['kind']} at {said['at']:%Y-%m-%d %H:%M} UTC.")
    for each in said["connections"]:
        records = count(each["deleted"].get("records", 0), "record")
        _say(f"{each['provider']}: {records} deleted. {each['sentence']}")


OneApplication = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Which of the provider's applications, where there are several."),
]


@app.command()
def connect(
    user_id: NewUserId,
    provider: Annotated[str, typer.Argument(help="strava, for example; see [providers] in the settings.")],
    application: OneApplication = None,
    port: Annotated[int, typer.Option(help="Port for the callback; 0: any free one.", min=0, max=65535)] = 0,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the address at once.")] = True,
    timeout: Annotated[
        float, typer.Option(metavar="TIME", parser=_seconds, help="How long to wait for the person.")
    ] = 300,
    wait: Annotated[
        bool | None,
        typer.Option(
            "--wait/--no-wait",
            help="Show the first import until it is done. On a terminal: unless told otherwise.",
        ),
    ] = None,
) -> None:
    """Connect a user's account at a provider.

    Opens the provider's page and waits until the person has agreed there. Then Ctrl-C leaves the first import
    going on in the background. Without --application it stays where it is connected, or else goes to the
    application that has most requests a day for it.
    """
    from lifelogger.client import request_sync
    from lifelogger.connecting import connect as connect_account

    rt = _runtime()

    def show(address: str) -> None:
        _say(f"Open this address and agree:\n{address}")
        if open_browser and sys.stdin.isatty():
            webbrowser.open(address)

    newest = _newest_run(rt, user_id)
    done = connect_account(rt, user_id, provider, show, application=application, port=port, seconds=timeout)
    out.print(f"{'Connected' if done.new else 'Connected again, keeping the data:'} {escape(user_id)}.")
    if done.missing:
        out.print(f"Not granted: {', '.join(done.missing)}. What needs it is not synced.", style="yellow")
    request_sync(user_id, runtime=rt)
    if err.is_terminal if wait is None else wait:
        _follow_import(rt, user_id, provider, newest)
    else:
        what = "The first import" if done.new else "Syncing"
        _say(f"{what} goes on in the background: `lifelogger status {_quoted(user_id)}`")


@connections_app.command("import")
def connections_import(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", exists=True, dir_okay=False, readable=True)],
) -> None:
    """Import connections from JSON lines.

    All of them or, when any line is wrong, none. A line: {"user_id", "provider", "access_token",
    "refresh_token", "expires_at", "scopes", "provider_user_id"}, and "application" where there are several.
    """
    from lifelogger.connections import ImportRefused, import_lines

    rt = _runtime()
    with file.open(encoding="utf-8", errors="replace") as lines, _progress() as progress:
        total = sum(1 for _ in lines)
        lines.seek(0)
        try:
            done = import_lines(rt, progress.track(lines, total=total, description="Checking"))
        except ImportRefused as error:
            shown, more = error.faults[:MOST_FAULTS], len(error.faults) - MOST_FAULTS
            told = "\n  ".join([*shown, f"and {more} more"] if more > 0 else shown)
            raise LifeloggerError(f"Nothing was imported:\n  {told}") from None
    out.print(f"{count(done.added, 'connection')} added, {done.replaced:,} replaced.")


@app.command()
def export(
    user_id: UserId,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="The file to write; - is standard output."),
    ] = None,
    form: Annotated[
        Form, typer.Option("--format", help="zip: an archive, a file for each kind. jsonl: an object a line.")
    ] = Form.zip,
) -> None:
    """Write all that is kept about a user into one archive. No token is in it.

    It has records with what the provider sent, quarantine and journal, as JSON Lines. Without --output it is
    lifelogger-USER.zip in this folder. As jsonl, each line has in `object` what it is, and goes to standard
    output.
    """
    from lifelogger import export as exporting

    rt = _runtime()
    total = exporting.size(rt, user_id)
    if output is None:
        output = exporting.file_name(user_id) if form is Form.zip else "-"
        if output != "-" and Path(output).exists():
            raise LifeloggerError(f"{output} is there already: name it with --output to replace it")
    if output == "-" and form is Form.zip and sys.stdout.isatty():
        raise LifeloggerError("An archive is not for a terminal: name a file with --output")
    written = 0
    with _progress() as progress:
        task = progress.add_task("Exporting", total=total)

        def told(number: int) -> None:
            nonlocal written
            written += number
            progress.advance(task, number)

        def lines() -> Iterator[bytes]:
            for each in exporting.objects(rt, user_id):
                yield (json.dumps(each) + "\n").encode()
                told(1)

        content = exporting.archive(rt, user_id, told=told) if form is Form.zip else lines()
        if output == "-":
            for some in content:
                sys.stdout.buffer.write(some)
            sys.stdout.flush()
            return
        _write_whole(Path(output), content)
    err.print(f"{written:,} objects written to {escape(output)}.")


def _write_whole(output: Path, content: Iterator[bytes]) -> None:
    """Write a file that is there whole, or not at all."""
    if not output.name or output.is_dir():
        raise LifeloggerError(f"{output} cannot be written: it is a folder, name a file in it")
    draft = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with open(draft, "xb", opener=_private) as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(output)
    except OSError as error:
        raise LifeloggerError(f"{output} cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):  # not even the folder is there
            draft.unlink()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


# Syncs ---------------------------------------------------------------------------------------------


@app.command()
def sync(
    user_id: UserId,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until it is done, and tell what it did.")
    ] = False,
    timeout: Annotated[float, typer.Option(metavar="TIME", parser=_seconds, help="How long to wait.")] = 120,
) -> None:
    """Ask for a sync of one user now."""
    from lifelogger.client import request_sync

    rt = _runtime()
    user = _known(rt, user_id)
    newest = _newest_run(rt, user_id)
    asked = request_sync(user_id, runtime=rt)
    if not asked:
        sentences = [each["sentence"] for each in user["connections"]]
        none = f"no connection yet: `lifelogger connect {_quoted(user_id)} PROVIDER`"
        raise LifeloggerError(f"Nothing to sync: {' '.join(sentences) or none}")
    if not wait:
        _say(
            f"Asked for a sync of {count(asked, 'connection')}. "
            f"`lifelogger runs {_quoted(user_id)}` tells what came."
        )
        return
    _wait_for_runs(rt, user_id, newest, timeout)


def _newest_run(rt: Runtime, user_id: str) -> int:
    return max((each["id"] for each in standing.runs(rt, user_id=user_id, limit=1)), default=0)


def _wait_for_runs(rt: Runtime, user_id: str, newest: int, seconds: float) -> None:
    """Wait for the journal rows behind `newest`, print them; the exit status tells whether all went well."""
    deadline = time.monotonic() + seconds
    with _in_background(user_id), Imports() as imports:
        while True:
            user = _known(rt, user_id)
            imports.show(user["connections"])
            runs = [each for each in user["runs"] if each["id"] > newest]
            if runs and all(each["outcome"] != "running" for each in runs):
                break
            if time.monotonic() > deadline:
                raise LifeloggerError(
                    "A sync is still running" if runs else
                    f"No worker took it in {seconds:g} s: does one run (`make worker`)? It is not forgotten"
                )  # fmt: skip
            time.sleep(LOOK_EVERY_SECONDS)
    _print_runs(runs)
    if any(each["outcome"] not in ("ok", "deferred") for each in runs):
        raise typer.Exit(1)


def _follow_import(rt: Runtime, user_id: str, provider: str, newest: int) -> None:
    """Show the import of one connection until it is done, has to be signed in again, or nobody takes it up.

    `newest` is the id of the last journal row from before.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    with _in_background(user_id), Imports() as imports:
        while True:
            user = _known(rt, user_id)
            mine = [each for each in user["connections"] if each["provider"] == provider]
            imports.show(mine)
            if not any(each["import"] and each["status"] == "active" for each in mine):
                break
            if time.monotonic() > deadline and not any(each["id"] > newest for each in user["runs"]):
                raise LifeloggerError(
                    f"No worker took it in {PATIENCE_SECONDS:g} s: does one run (`make worker`)? "
                    "It is not forgotten"
                )
            time.sleep(FOLLOW_EVERY_SECONDS)
    for each in mine:
        _say(f"{count(each['records'], 'record')}. {each['sentence']}")


@contextlib.contextmanager
def _in_background(user_id: str) -> Iterator[None]:
    """Ctrl-C ends the watching only, and says so."""
    try:
        yield
    except KeyboardInterrupt:
        err.print(escape(f"It goes on in the background: `lifelogger status {_quoted(user_id)}`"))
        raise


def _known(rt: Runtime, user_id: str) -> dict[str, Any]:
    user = standing.user(rt, user_id)
    if user is None:
        raise LifeloggerError(f"There is no user {user_id!r}: `lifelogger user list` shows all")
    return user


def _quoted(user_id: str) -> str:
    """An id as one types it into a shell."""
    return shlex.quote(user_id)


@app.command()
def runs(
    user_id: Annotated[str | None, typer.Argument(metavar="[USER]", help="Only of this user.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 20,
    as_json: AsJson = False,
) -> None:
    """Show what each sync brought and cost, newest first."""
    rt = _runtime()
    if user_id is not None:
        _known(rt, user_id)
    found = standing.runs(rt, user_id=user_id, limit=limit)
    if as_json:
        _print_json(found)
    else:
        _print_runs(found)


def _print_runs(found: list[dict[str, Any]]) -> None:
    table = _table("started", "user", "provider", "asked by", "outcome", "records", "requests", "note")
    table.columns[0].no_wrap = True
    for each in found:
        words = [each[name] for name in ("user_id", "provider", "trigger", "outcome")]
        table.add_row(
            f"{each['started_at']:%m-%d %H:%M:%S}",
            *map(escape, words),
            brought(each),
            str(each["requests"]),
            escape(each["message"] or ""),
        )
    _print_table(table, "No syncs yet: `make periodiq` plans them, `make worker` runs them.")


@app.command()
def status(
    user_id: Annotated[
        str | None, typer.Argument(metavar="[USER]", help="Only this user, in detail.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how everything stands, or one user in detail.

    Totals, the last tick, and for each provider its budget and who waits for what.
    """
    rt = _runtime()
    if user_id is not None:
        _user_status(rt, user_id, as_json)
        return
    now = standing.overview(rt)
    if as_json:
        _print_json(now)
        return
    out.print(
        f"{count(now['users'], 'user')}, {count(now['connections'], 'connection')}, "
        f"{count(now['records'], 'record')}, {now['quarantined']:,} quarantined."
    )
    if now["counted_at"] != now["now"]:
        out.print(f"Counted at {standing.moment(now['counted_at'], now['now'])}, since it is much.")
    if now["importing"]:
        out.print(f"Still importing their past: {count(now['importing'], 'connection')}.")
    tick = now["last_tick"]
    out.print(
        f"Last tick: {tick['name']} at {standing.moment(tick['fired_at'], now['now'])}, "
        f"{count(tick['planned'] or 0, 'user')} planned."
        if tick
        else "No tick yet: `make periodiq` fires them."
    )
    for each in now["providers"].values():
        out.print()
        simulated = " (simulated by the sandbox)" if each["simulated"] else ""
        last = standing.moment(each["last_sync"], now["now"]) if each["last_sync"] else "never"
        out.print(f"[bold]{escape(each['title'])}[/]{simulated}: {count(each['connections'], 'connection')}, "
                  f"{count(each['records'], 'record')}, last sync {last}.")  # fmt: skip
        if each["needs_reauth"]:
            people = count(each["needs_reauth"], "connection")
            out.print(f"  To be signed in again by their people: {people}.", style="yellow")
        if each["importing"]:
            out.print(f"  Still importing their past: {count(each['importing'], 'connection')}.")
        if not each["applications"]:
            _print_application(each)
        for one in each["applications"]:
            _say(f"  Application {one['name']}: {one['sentence']}")
            _print_application(one)
        for wait in each["waits"]:
            until = standing.moment(wait["until"], now["now"])
            waiting = count(wait["connections"], "connection")
            out.print(f"  Waiting until {until}, {waiting}: {escape(wait['reason'])}.")
    if now["notify"]:
        out.print("\n[bold]Whom we tell of changes[/]")
    for each in now["notify"]:
        out.print(f"  {escape(each['host'])}: {escape(each['sentence'])}", style=_trouble(each["reason"]))


def _print_application(state: dict[str, Any]) -> None:
    """What comes by itself, and what is spent; nothing of one that is not in the settings."""
    hooks = state["webhooks"]
    if hooks is not None:
        _say(f"  {state['recheck']['sentence']}")
        out.print(f"  {escape(hooks['sentence'])}", style=_trouble(hooks["ok"] is False))
        _print_budget(state["budget"])


def _trouble(is_there: object) -> str | None:
    return "yellow" if is_there else None


def _user_status(rt: Runtime, user_id: str, as_json: bool) -> None:
    user = _known(rt, user_id)
    if as_json:
        _print_json(user)
        return
    for each in user["connections"]:
        last = standing.moment(each["last_sync_at"], rt.clock()) if each["last_sync_at"] else "never"
        out.print(f"[bold]{escape(each['provider'])}[/]: {escape(each['sentence'])}")
        if each["status"] == "needs_reauth":
            _say(f"  `lifelogger connect {_quoted(user_id)} {each['provider']}` mends it; the data stays.")
        out.print(
            f"  {count(each['records'], 'record')}, {each['quarantined']} quarantined; last sync {last}."
        )
        if each["import"]:
            _say(f"  {each['import']['sentence']}")
        else:
            _say(f"  {each['recheck']['sentence']}")
        for stream in each["streams"]:
            if stream["off_reason"]:
                out.print(f"  {stream['name']} is off: {escape(stream['off_reason'])}.")
            elif stream["history_left_until"]:
                left = f"{stream['history_left_until']:%Y-%m-%d}"
                out.print(f"  {stream['name']}: history before {left} is still to come "
                          f"({standing.percent(stream['history_share'])} is here).")  # fmt: skip
    if not user["connections"]:
        _say(f"No connection yet: `lifelogger connect {_quoted(user_id)} PROVIDER`")
    _print_runs(user["runs"])


@app.command()
def budget(as_json: AsJson = False) -> None:
    """Show what is spent of each provider's request budget."""
    rt = _runtime()
    every = [(each, standing.budget(rt, *each.key)) for each in rt.applications()]
    if as_json:
        _print_json({each.path: windows for each, windows in every})
        return
    for each, windows in every:
        out.print(f"[bold]{escape(each.title)}[/]")
        _print_budget(windows)


def _print_budget(windows: list[dict[str, Any]] | None) -> None:
    if windows is None:
        out.print("  Its budget is unknown: Redis does not answer. No request is sent.", style="yellow")
    for window in windows or []:
        used = f"{window['used']:,} of {window['limit']:,} used"
        if not window["known"]:
            used = f"at least {used}; the next reply tells the true count"
        closed = f", closed until {window['closed_until']:%H:%M} UTC" if window["closed_until"] else ""
        out.print(f"  {window['pool']} to {window['end']:%H:%M} UTC: {used}{closed}")


@app.command()
def plan(
    user_id: Annotated[str | None, typer.Argument(metavar="[USER]", help="Only of this user.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what the next ticks will do, and why."""
    from lifelogger import plans

    rt = _runtime()
    if user_id is not None:
        _known(rt, user_id)
        _user_plan(plans.of_user(rt, user_id), rt, as_json)
        return
    found = plans.overall(rt)
    if as_json:
        _print_json(found)
        return
    for each in found["providers"].values():
        out.print(f"[bold]{escape(each['title'])}[/]: {escape(each['sentence'])}")
        if each["webhooks_stopped"]:
            out.print("  Its webhooks have stopped: polls do their work.", style="yellow")
        if each["allowed"] is None:
            out.print("  Its budget is unknown: Redis does not answer. No request is sent.", style="yellow")
        else:
            may = each["allowed"]
            out.print(
                f"  Now: {count(each['news_due'], 'connection')} with news of {may['news']:,} that could be "
                f"served; {count(may['polls'], 'poll')}, {may['early']:,} of them early if need be; "
                f"{each['held']:,} held for webhooks and people."
            )
        for step in each["due"]:
            due = count(step["connections"], "connection")
            out.print(f"  Due by {standing.moment(step['until'], found['now'])}: {due}.")
        table = _table("next", "user", "why")
        for one in each["next"]:
            when = standing.moment(one["next_sync_at"], found["now"])
            table.add_row(when, escape(one["user_id"]), escape(one["why"]))
        _print_table(table, "  Nobody is connected.")


def _user_plan(found: list[dict[str, Any]], rt: Runtime, as_json: bool) -> None:
    if as_json:
        _print_json(found)
        return
    for each in found:
        due = each["next_sync_at"]
        when = standing.moment(due, rt.clock()) if due else "never"
        out.print(f"[bold]{escape(each['provider'])}[/]: next at {when}. {escape(each['why'])}")
        _say(f"  {each['recheck']['sentence']}")
    if not found:
        out.print("No connection yet.")


# Webhooks ------------------------------------------------------------------------------------------

OneProvider = Annotated[
    str, typer.Argument(metavar="PROVIDER", help="The provider's name, as in the settings.")
]


@webhooks_app.command("list")
def webhooks_list(as_json: AsJson = False) -> None:
    """Show the subscriptions of each provider, as the last check found them."""
    from lifelogger import webhooks

    found = webhooks.known(_runtime())
    if as_json:
        _print_json({name: {key: row[key] for key in ("subscriptions", "checked_at", "heard_at", "fault")}
                     for name, row in found.items()})  # fmt: skip
        return
    table = _table("provider", "to", "address", "until")
    for name, row in found.items():
        for each in row["subscriptions"]:
            table.add_row(name, escape(each["topic"]), escape(each["callback"]), each["expires_at"] or "")
    _print_table(table, "No subscriptions: `lifelogger webhooks subscribe PROVIDER` makes them.")
    for name, row in found.items():
        if row["fault"]:
            out.print(f"{name}: the last check failed: {escape(row['fault'])}", style="yellow")


@webhooks_app.command("subscribe")
def webhooks_subscribe(provider: OneProvider, application: OneApplication = None) -> None:
    """Make, renew and repair the subscriptions of a provider; the web server must be reachable.

    The scheduler does it every hour. This also takes over a subscription that goes elsewhere, where an
    application can have only one. Without --application it does so for all there are.
    """
    from lifelogger import webhooks

    rt = _runtime()
    for name in _names(rt, provider, application):
        made = webhooks.keep(rt, provider, name, take_over=True)
        _say(f"{count(len(made), 'subscription')} to {made[0].callback}" if made else "No subscriptions.")


def _names(rt: Runtime, provider: str, application: str | None) -> list[str]:
    """The applications that a command is about; of a provider that is unknown the main one, which says so."""
    every = [each.name for each in rt.applications() if each.provider.name == provider]
    return [application] if application is not None else every or [MAIN]


@webhooks_app.command("remove")
def webhooks_remove(provider: OneProvider, application: OneApplication = None) -> None:
    """End our subscriptions at a provider. The scheduler makes them again while web.public_url is set."""
    from lifelogger import webhooks

    rt = _runtime()
    ended = sum(webhooks.remove(rt, provider, name) for name in _names(rt, provider, application))
    _say(f"{count(ended, 'subscription')} ended.")


# Keys ----------------------------------------------------------------------------------------------


@keys_app.command("new")
def keys_new() -> None:
    """Print a new key for security.encryption_keys."""
    from cryptography.fernet import Fernet

    print(Fernet.generate_key().decode())


@keys_app.command("rotate")
def keys_rotate() -> None:
    """Encrypt all stored tokens with the first key again.

    Afterwards the other keys can be dropped from security.encryption_keys.
    """
    from lifelogger.tokens import rotate_keys

    done = count(rotate_keys(_runtime()), "connection")
    out.print(f"The tokens of {done} are encrypted with the first key now.")


# API keys ------------------------------------------------------------------------------------------


@api_key_app.command("add")
def api_key_add(
    name: Annotated[str, typer.Argument(help="What it is for: it is listed and removed by this name.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="read:records, read:status, sync, export or erase; once for each."),
    ] = None,
    user_id: Annotated[str | None, typer.Option("--user", help="The only user it may ask about.")] = None,
) -> None:
    """Make a key for the API, and print it: once, for nobody can read it later.

    Without --scope it may read records, their changes and how fresh they are.
    """
    from lifelogger import api_keys

    print(api_keys.add(_runtime(), name, scope or ["read:records"], user_id))


@api_key_app.command("list")
def api_key_list(as_json: AsJson = False) -> None:
    """List the keys: what each may do, and when it was last used."""
    from lifelogger import api_keys

    rt = _runtime()
    found = api_keys.listed(rt)
    if as_json:
        _print_json([{**asdict(each), "scopes": sorted(each.scopes)} for each in found])
        return
    table = _table("name", "scopes", "user", "last used")
    for each in found:
        used = standing.moment(each.last_used_at, rt.clock()) if each.last_used_at else "never"
        whose = "all" if each.user_id is None else escape(each.user_id)
        table.add_row(escape(each.name), ", ".join(sorted(each.scopes)), whose, used)
    _print_table(table, "No keys yet: `lifelogger api-key add NAME` makes one.")


@api_key_app.command("remove")
def api_key_remove(name: Annotated[str, typer.Argument(help="The key's name.")]) -> None:
    """Take a key away: it opens nothing from now on."""
    from lifelogger import api_keys

    if not api_keys.remove(_runtime(), name):
        raise LifeloggerError(f"There is no key {name!r}: `lifelogger api-key list` shows all")
    _say(f"Removed {name}.")


@app.command()
def mcp(
    key_file: Annotated[
        Path | None,
        typer.Option(
            help="A file with the API key, instead of LIFELOGGER_API_KEY.", dir_okay=False, exists=True
        ),
    ] = None,
) -> None:
    """Let an assistant ask about one user, over MCP.

    A server on standard input and output. Its API key says which user:
    `lifelogger api-key add assistant --user USER` makes one.
    """
    from importlib.util import find_spec

    if find_spec("mcp") is None:
        raise LifeloggerError("The MCP SDK is not installed: pip install 'lifelogger[mcp]'")
    from lifelogger import api_keys, mcp_server

    key = (
        key_file.read_text(encoding="utf-8") if key_file else os.environ.get("LIFELOGGER_API_KEY", "")
    ).strip()
    rt = _runtime()
    known = api_keys.find(rt, key)
    if known is None or known.user_id is None or "read:records" not in known.scopes:
        raise LifeloggerError(
            "LIFELOGGER_API_KEY (or --key-file) must be a key for one user with the scope read:records: "
            "`lifelogger api-key add assistant --user USER` makes one"
        )
    mcp_server.server(rt, lambda _: api_keys.find(rt, key)).run()


# Webhooks to others --------------------------------------------------------------------------------


@notify_app.command("secret")
def notify_secret() -> None:
    """Print a new secret for notify.secrets."""
    from lifelogger.notify import new_secret

    print(new_secret())


@notify_app.command("list")
def notify_list(as_json: AsJson = False) -> None:
    """List the endpoints: when each was last told, and what it waits for."""
    rt = _runtime()
    found = standing.endpoints(rt)
    if as_json:
        _print_json(found)
        return
    table = _table("host", "last told", "state")
    for each in found:
        told = standing.moment(each["delivered_at"], rt.clock()) if each["delivered_at"] else "never"
        table.add_row(escape(each["host"]), told, escape(each["sentence"]))
    _print_table(table, "No endpoints: `notify.urls` in the settings names them.")


# Printing ------------------------------------------------------------------------------------------


def _print_json(value: Any) -> None:
    print(json.dumps(standing.as_json(value), indent=2))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")  # on a narrow terminal: never cut
    return table


def _print_table(table: Table, when_empty: str) -> None:
    where = out if out.is_terminal else Console(width=WIDE, highlight=False)
    where.print(table if table.row_count else when_empty)


class Imports:
    """How far first imports are: a bar for each on a terminal, else a line for each step."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[told]}"),
        )
        self._bars = Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, str] = {}

    def __enter__(self) -> Imports:
        self._bars.start()
        self._bars.add_task("Syncing", total=None, told="")
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, connections: Sequence[Mapping[str, Any]]) -> None:
        """Show how far these connections, as `status.user` tells them, are now."""
        for each in connections:
            name, one = each["provider"], each["import"]
            if one is None and name not in self._told:
                continue  # it was done before we came
            share = one["share"] if one else 1.0
            told = one["sentence"] if one else "Nothing is left to import."
            step = standing.percent(share)
            if err.is_terminal:
                if name not in self._tasks:
                    self._tasks[name] = self._bars.add_task(name, total=1.0, told="")
                self._bars.update(self._tasks[name], completed=share, told=told)
            elif self._told.get(name) != step:
                err.print(escape(f"{name}: {told}"))
            self._told[name] = step


def _progress() -> Progress:
    """A bar on standard error, gone afterwards; nothing where nobody looks."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
