"""The rules of the house as code: who imports whom, who may name a provider, what others build on."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dramatiq.middleware import SkipMessage

import lifelogger
from lifelogger import errors
from lifelogger.errors import LifeloggerError
from lifelogger.providers import registry
from lifelogger.providers.base import Record
from lifelogger.settings import ProviderSettings, Settings

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "lifelogger"
NOT_OURS = {"__pycache__", "static"}


def sources(*suffixes: str) -> Iterator[Path]:
    """What runs: the library and the application, without tests and documents."""
    for path in sorted([*LIBRARY.rglob("*"), *(ROOT / "actors").rglob("*"), ROOT / "scheduler.py"]):
        if path.suffix in suffixes and not NOT_OURS & set(path.parts):
            yield path


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# Who imports whom -------------------------------------------------------------------------------------------


def test_imports_point_one_way() -> None:
    """The contracts are in pyproject.toml, `[tool.importlinter]`."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout
    assert "3 kept, 0 broken" in done.stdout


def imported(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place(path)}: imports are absolute"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize(
    "path", [path for path in sources(".py") if path.parent.name == "providers"], ids=lambda path: path.stem
)
def test_a_provider_knows_only_its_contract(path: Path) -> None:
    """Nothing of the network, the database, the queue, or another provider."""
    allowed = ("lifelogger.errors", "lifelogger.providers.base")
    strangers = {"requests", "urllib3", "redis", "sqlalchemy", "dramatiq", "limits", "os", "socket"}

    modules = imported(path)

    assert [name for name in modules if name.startswith("lifelogger") and not name.startswith(allowed)] == []
    assert strangers.isdisjoint(name.split(".")[0] for name in modules)


def test_the_sandbox_imports_nothing_of_the_rest() -> None:
    for path in sources(".py"):
        if "sandbox" in path.parts:
            ours = {
                name for name in imported(path) if name.split(".")[0] in ("lifelogger", "actors", "scheduler")
            }
            assert all(name.startswith("lifelogger.sandbox") for name in ours), place(path)


IMPORT_ALL = """
import importlib, os, pkgutil, socket, subprocess, sys

def refuse(*arguments, **more):
    raise AssertionError(f"{name} does something while it is imported")

subprocess.Popen.__init__ = os.fork = socket.socket.connect = refuse
import lifelogger
for module in pkgutil.walk_packages(lifelogger.__path__, "lifelogger."):
    name = module.name
    if not name.endswith("__main__") and ".migrations" not in name:
        importlib.import_module(name)
        print(name)
"""


def test_importing_needs_neither_redis_nor_settings() -> None:
    """The settings file that is named does not exist, so whoever reads settings fails."""
    environ = {**os.environ, "LIFELOGGER_SETTINGS": "/nowhere/settings.toml"}

    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert {"lifelogger.client", "lifelogger.broker", "lifelogger.web.app", "lifelogger.cli"} <= set(
        done.stdout.split()
    )


# Who may name a provider ------------------------------------------------------------------------------------

SANDBOX_REGISTER = {
    "lifelogger/sandbox/__init__.py",  # says in words what it simulates
    "lifelogger/sandbox/__main__.py",
    "lifelogger/sandbox/world.py",  # which one is meant where none is named
}
WORDS = re.compile(
    r"\b({})".format("|".join([*registry(), "strava", "fitbit", "oura", "google.?health"])), re.IGNORECASE
)


def own_files(provider: str) -> set[str]:
    return {f"lifelogger/providers/{provider}.py", f"lifelogger/sandbox/{provider}.py"}


def test_no_provider_is_named_outside_its_own_files() -> None:
    """Code, comments and templates alike; a line that says "for example" may give one."""
    allowed = SANDBOX_REGISTER.union(*map(own_files, registry()))
    named = [
        f"{place(path)}:{number}: {line.strip()}"
        for path in sources(".py", ".lua", ".html", ".mako")
        if place(path) not in allowed
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if WORDS.search(line) and "for example" not in line
    ]

    assert named == []


def test_the_exceptions_are_still_needed() -> None:
    assert all(WORDS.search((ROOT / name).read_text(encoding="utf-8")) for name in SANDBOX_REGISTER)


def test_each_provider_is_one_file_one_sandbox_module_one_test_and_one_document() -> None:
    for name in registry():
        for file in (*own_files(name), f"tests/providers/test_{name}.py", f"docs/providers/{name}.md"):
            assert (ROOT / file).exists(), file


# What records are -------------------------------------------------------------------------------------------

RECORDS = (ROOT / "docs" / "records.md").read_text(encoding="utf-8")


def test_every_column_of_a_record_is_explained() -> None:
    columns = RECORDS.partition("| column |")[2].partition("\n## ")[0]

    assert [name for name in Record.__dataclass_fields__ if f"`{name}`" not in columns] == []


def test_the_vocabulary_is_what_the_providers_use() -> None:
    """Each table from their words to ours, in every provider's module."""
    told = set(re.findall(r"`([a-z_]+)`", RECORDS.partition("## Types of activity")[2].partition("\n## ")[0]))
    used = {"other"}
    for provider in registry().values():
        for name, table in vars(importlib.import_module(type(provider).__module__)).items():
            if name.isupper() and isinstance(table, dict) and all(isinstance(v, str) for v in table.values()):
                used |= set(table.values())

    assert told == used


# Errors -----------------------------------------------------------------------------------------------------


def silent(handler: ast.ExceptHandler) -> bool:
    """`except Exception: pass`, or the same in other words."""
    caught = "" if handler.type is None else ast.unparse(handler.type)
    broad = handler.type is None or re.search(r"\b(Base)?Exception\b", caught) is not None
    return broad and all(
        isinstance(each, ast.Pass | ast.Continue)
        or (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
        for each in handler.body
    )


def test_no_error_is_passed_over_in_silence() -> None:
    found = []
    for path in sources(".py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            hidden = isinstance(node, ast.ExceptHandler) and silent(node)
            suppressed = isinstance(node, ast.Call) and re.fullmatch(
                r"(contextlib\.)?suppress\((Base)?Exception\)", ast.unparse(node)
            )
            if hidden or suppressed:
                found.append(f"{place(path)}:{node.lineno}")
    assert found == []


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        ("except Exception: pass", True),
        ("except: pass", True),
        ("except (ValueError, BaseException): ...", True),
        ("except ValueError: pass", False),
        ("except Exception: raise", False),
        ("except Exception: log.exception('it failed')", False),
    ],
)
def test_that_rule_finds_what_it_is_for(code: str, verdict: bool) -> None:
    [attempt] = ast.parse(f"try: x\n{code}").body

    assert isinstance(attempt, ast.Try)
    assert silent(attempt.handlers[0]) is verdict


def drawn() -> dict[str, str | None]:
    """The tree at the top of errors.py: each name with its parent's."""
    branch = re.compile(r"^    (?P<indent>(?:│   |    )*)(?:├── |└── )(?P<name>\w+)")
    path, tree = ["LifeloggerError"], dict[str, str | None](LifeloggerError=None)
    for line in (errors.__doc__ or "").splitlines():
        if match := branch.match(line):
            depth = len(match["indent"]) // 4 + 1
            path[depth:] = [match["name"]]
            tree[match["name"]] = path[depth - 1]
    return tree


def test_every_error_is_in_the_tree_drawn_at_the_top() -> None:
    classes = {
        name: each
        for name, each in vars(errors).items()
        if inspect.isclass(each) and each.__module__ == errors.__name__
    }

    assert drawn() == {
        name: None if each is LifeloggerError else each.__bases__[0].__name__
        for name, each in classes.items()
    }
    assert len(classes) > 5


def modules() -> list[str]:
    return [
        module.name
        for module in pkgutil.walk_packages(lifelogger.__path__, "lifelogger.")
        if not module.name.endswith("__main__")
        and ".migrations" not in module.name
        and ".sandbox" not in module.name
    ]


def test_all_errors_have_one_root() -> None:
    """But for skips, which are Dramatiq's, and what a module only says to itself."""
    classes = {
        each
        for name in modules()
        for word, each in vars(importlib.import_module(name)).items()
        if not word.startswith("_")
        and inspect.isclass(each)
        and issubclass(each, BaseException)
        and each.__module__.startswith("lifelogger")
    }

    assert [each for each in classes if not issubclass(each, LifeloggerError | SkipMessage)] == []
    assert all(each.__doc__ for each in classes)


# What others build on ---------------------------------------------------------------------------------------

SURFACE = {
    "lifelogger.client": {
        "Change",
        "Changes",
        "CursorUnknown",
        "Freshness",
        "MOST",
        "RecordPage",
        "changes",
        "cursor_since",
        "freshness",
        "imports",
        "latest",
        "newest_cursor",
        "record_page",
        "records",
        "request_sync",
        "sync_now",
        "urgent",
    },
    "lifelogger.errors": {
        "AccountRefused",
        "BadRecord",
        "BudgetSpent",
        "Forged",
        "LifeloggerError",
        "LockLost",
        "NotThere",
        "Refused",
        "SettingsError",
        "SignInAgain",
        "Unavailable",
        "Wait",
    },
    "lifelogger.broker": {
        "Broker",
        "Consumer",
        "HEARTBEAT_TIMEOUT_MS",
        "KIND",
        "LONGEST_WAIT_SECONDS",
        "LateTick",
        "MAINTENANCE_CHANCE",
        "NamedConnections",
        "TIME_LIMIT_MS",
        "WORKER_NAME",
        "QuietSkips",
        "SKIP_DELAY_SECONDS",
        "Ticks",
        "broker",
        "get_mutex",
        "make_broker",
    },
    "lifelogger.providers.base": {
        "Ask",
        "Call",
        "Day",
        "Endpoints",
        "Event",
        "Grant",
        "Heard",
        "Http",
        "Json",
        "Known",
        "LONGEST",
        "MOST_REPLIES",
        "Page",
        "Pool",
        "Provider",
        "Record",
        "RevokeRequest",
        "Secret",
        "Stream",
        "Subscription",
        "Usage",
        "Window",
        "begun",
        "count",
        "date_there",
        "instant",
        "http_date",
        "joules",
        "lasted",
        "lived",
        "midnight",
        "number",
        "parsed",
        "plain_id",
        "same",
        "scaled",
        "shown",
        "split_scopes",
        "text",
        "told_id",
        "utc_offset",
        "webhook_secret",
        "whole_list",
        "word",
    },
}
"""A name that is taken away breaks somebody: say so in the changelog, and give them a release to follow."""


def defined(path: Path) -> set[str]:
    """The public names that a module makes itself."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_") and name != "log"}


@pytest.mark.parametrize("module", SURFACE)
def test_the_public_names_are_these(module: str) -> None:
    assert defined(ROOT / f"{module.replace('.', '/')}.py") == SURFACE[module]


def test_the_signatures_of_the_client_are_these() -> None:
    from lifelogger import client

    assert list(inspect.signature(client.records).parameters) == [
        "user_id",
        "kind",
        "since",
        "until",
        "limit",
        "runtime",
    ]
    assert list(inspect.signature(client.record_page).parameters) == [
        "user_id",
        "kind",
        "since",
        "until",
        "after",
        "limit",
        "runtime",
    ]
    assert list(inspect.signature(client.latest).parameters) == ["user_id", "kind", "runtime"]
    assert list(inspect.signature(client.freshness).parameters) == ["user_id", "runtime"]
    assert list(inspect.signature(client.imports).parameters) == ["user_id", "runtime"]
    assert list(inspect.signature(client.changes).parameters) == [
        "after",
        "limit",
        "user_id",
        "connections",
        "runtime",
    ]
    assert list(inspect.signature(client.cursor_since).parameters) == ["user_id", "since", "runtime"]
    assert list(inspect.signature(client.newest_cursor).parameters) == ["runtime"]
    assert list(inspect.signature(client.request_sync).parameters) == ["user_id", "runtime"]
    assert list(inspect.signature(client.sync_now).parameters) == ["user_id", "runtime"]


def test_the_settings_are_these() -> None:
    """A key that is taken away or renamed stops whoever has set it from starting."""
    assert {
        name: list(field.annotation.model_fields)
        for name, field in Settings.model_fields.items()
        if name != "providers"
    } == {  # type: ignore[union-attr]
        "database": ["url"],
        "redis": ["url", "prefix"],
        "security": ["encryption_keys", "login_token"],
        "schedule": [
            "sync",
            "refresh_tokens",
            "revoke",
            "tidy",
            "count",
            "notify",
            "news",
            "webhooks",
            "reserve",
        ],
        "sync": [
            "interval_seconds",
            "longest_days",
            "lookback_days",
            "history_days",
            "history_pages",
            "recheck_days",
            "recheck_share",
            "journal_days",
            "lease_seconds",
            "lock_seconds",
            "refresh_margin_seconds",
        ],
        "http": ["connect_timeout_seconds", "read_timeout_seconds", "total_timeout_seconds", "max_bytes"],
        "worker": ["processes", "threads"],
        "web": ["host", "port", "names", "public_url"],
        "hooks": ["sign_in_again"],
        "notify": ["urls", "secrets"],
        "sandbox": ["host", "port", "people", "seed"],
    }
    assert list(ProviderSettings.model_fields) == [
        "enabled",
        "client_id",
        "client_secret",
        "api_url",
        "authorize_url",
        "token_url",
        "revoke_url",
        "budget",
        "overall_budget",
        "user_budget",
        "extra_streams",
        "webhook_secret",
        "webhook_keys_url",
        "project",
        "service_account",
        "applications",
    ]


def test_the_actors_and_their_queues_are_these() -> None:
    """Hosts send them by name; messages of an older version may still lie in a queue."""
    program = (
        "import json, actors, scheduler; from lifelogger.broker import broker\n"
        "print(json.dumps({name: actor.queue_name for name, actor in broker.actors.items()}))"
    )

    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "LIFELOGGER_BROKER": "stub"},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "sync_user_data": "default",
        "sync_user_now": "now",
        "plan_again": "schedule",
        "sync_active_users": "schedule",
        "refresh_integration_tokens": "schedule",
        "forget_old_runs": "schedule",
        "deliver_changes": "notify",
        "deliver_waiting_changes": "notify",
        "revoke_what_is_left": "schedule",
        "count_what_there_is": "schedule",
        "serve_news": "schedule",
        "keep_webhooks": "schedule",
    }
