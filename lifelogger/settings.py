"""Settings: files and environment become one typed, frozen object, or one error that lists every fault.

Later wins: the defaults in `settings.toml` (the checkout's own, or the copy in the wheel), the file named by
`LIFELOGGER_SETTINGS`, the environment as `LIFELOGGER_<SECTION>__<KEY>`. A secret may also come from a file:
the same variable with `_FILE` behind it. Tables are merged key by key, lists are replaced.

This module knows where settings come from and what they may be, never what they are used for.
"""

from __future__ import annotations

import difflib
import json
import os
import pkgutil
import re
import tomllib
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import limits
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from lifelogger import redis_url
from lifelogger.errors import SettingsError

PREFIX = "LIFELOGGER_"
# Which file, which broker, and who asks: read elsewhere.
_NO_SETTINGS = {"LIFELOGGER_SETTINGS", "LIFELOGGER_BROKER", "LIFELOGGER_API_KEY"}
_SECRET = "secret"  # marks a plain string that may hold a password
_PACKAGE = Path(__file__).parent


# What a value may be -------------------------------------------------------------------------------


def _listed(value: Any) -> Any:
    """A list from the environment is JSON, or separated by commas or line ends."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            raise ValueError("must be a JSON list, or separated by commas") from None
    return [part.strip() for part in re.split(r"[,\n]", value) if part.strip()]


def _url(*schemes: str, each: Callable[[str], list[str]] = lambda value: [value]) -> AfterValidator:
    """One of these schemes; `each` is what to look at, of a URL with several hosts."""

    def check(value: str) -> str:
        try:
            known = all(
                parts.scheme in schemes and (parts.port is None or parts.port > 0)
                for parts in map(urlsplit, each(value))
            )
        except ValueError:  # a port that is no number, a broken IPv6 address
            known = False
        if value and not known:
            raise ValueError(
                f"must be empty or a URL that begins with {' or '.join(f'{s}://' for s in schemes)}"
            )
        return value

    return AfterValidator(check)


def _web_address(value: str) -> str:
    if value and not urlsplit(value).hostname:
        raise ValueError("must name a host, like https://www.example.com/api")
    return value.rstrip("/")


def _psycopg(value: str) -> str:
    """Name the driver we ship with, whatever the short form would pick."""
    # Not with urlunsplit: it makes postgresql:/NAME of postgresql:///NAME, the form for a local socket.
    return re.sub("^postgres(ql)?://", "postgresql+psycopg://", value, flags=re.IGNORECASE)


def _budget(value: str) -> str:
    """One limit in the notation of the `limits` library, in windows that can be aligned to the clock."""
    try:
        (limit,) = limits.parse_many(value)
    except ValueError:
        limit = None
    if limit is None or limit.amount < 1 or limit.GRANULARITY.name not in ("second", "minute", "hour", "day"):
        raise ValueError(
            'must be a count per window of seconds, minutes, hours or days, like "100/15 minutes"'
        )
    return value


_CRON_FIELDS = (
    ("minute", 0, 59),
    ("hour", 0, 23),
    ("day of month", 1, 31),
    ("month", 1, 12),
    ("weekday", 0, 7),
)
_WEEKDAYS = {
    name: str(number) for number, name in enumerate(("sun", "mon", "tue", "wed", "thu", "fri", "sat"))
}


def _cron(value: str) -> str:
    """Five cron fields that Periodiq fires as they read.

    Periodiq takes values out of range without a word and never fires on weekday 0, `sun` or `@weekly`:
    it compares with ISO weekdays, where Sunday is 7. Both are refused here.
    """
    fields = value.lower().split()
    if len(fields) != len(_CRON_FIELDS):
        raise ValueError('must have five fields (minute, hour, day, month, weekday), like "*/15 * * * *"')
    for text, (name, low, high) in zip(fields, _CRON_FIELDS, strict=True):
        if name == "weekday":
            text = re.sub("[a-z]+", lambda word: _WEEKDAYS.get(word[0], word[0]), text)
        allowed: set[int] = set()
        for part in text.split(","):
            match = re.fullmatch(r"(?:\*|(\d+)(?:-(\d+))?)(?:/(\d+))?", part)
            if match is None:
                raise ValueError(f"its {name} {part!r} cannot be read: use numbers, *, ranges and steps")
            first = int(match[1] or low)
            last = int(match[2] or match[1] or high)
            if not low <= first <= last <= high or match[3] == "0":
                raise ValueError(
                    f"its {name} {part!r} must lie between {low} and {high}, the smaller number first"
                )
            allowed.update(range(first, last + 1, int(match[3] or 1)))
        if name == "weekday" and 0 in allowed and 7 not in allowed:
            raise ValueError("weekday 0 (sun) never fires in Periodiq: write 7 for Sunday")
    return value


def _signing(values: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
    """Secrets of Standard Webhooks: `whsec_` and the base64 of 24 to 64 bytes."""
    for value in values:
        try:
            text = value.get_secret_value().removeprefix("whsec_")
            right = value.get_secret_value() != text and 24 <= len(b64decode(text, validate=True)) <= 64
        except ValueError:
            right = False
        if not right:
            raise ValueError(
                "must be whsec_ and base64 of 24 to 64 bytes: `lifelogger notify secret` makes one"
            )
    return values


Strings = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Secrets = Annotated[tuple[SecretStr, ...], BeforeValidator(_listed)]
SigningSecrets = Annotated[tuple[SecretStr, ...], BeforeValidator(_listed), AfterValidator(_signing)]
Budgets = Annotated[tuple[Annotated[str, AfterValidator(_budget)], ...], BeforeValidator(_listed)]
Cron = Annotated[str, AfterValidator(_cron)]
Project = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]*$")]
WebUrl = Annotated[str, _url("https", "http"), AfterValidator(_web_address)]
Host = Annotated[str, Field(min_length=1)]
Port = Annotated[int, Field(ge=1, le=65535)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
# The leases of a request and of a refresh (budget.py, tokens.py) are longer than that.
RequestSeconds = Annotated[float, Field(gt=0, le=60)]
WholeSeconds = Annotated[int, Field(ge=1)]


# What can be set -----------------------------------------------------------------------------------


class Section(BaseModel):
    """One table of `settings.toml`; what its keys mean is said there, beside them."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Database(Section):
    """Where records are kept; empty means SQLite in `var/`. A URL may hold a password, so it is not shown."""

    url: Annotated[
        str,
        _url("sqlite", "postgresql", "postgresql+psycopg", "postgres"),
        AfterValidator(_psycopg),
        _SECRET,
    ] = Field(default="", repr=False)


class Redis(Section):
    """Where queues, locks and budgets are kept; empty means the embedded server."""

    url: Annotated[str, _url(*redis_url.SCHEMES, each=redis_url.each), _SECRET] = Field(
        default="", repr=False
    )
    prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] = "lifelogger"


class Security(Section):
    """Keys and the login; empty means that one is made in `var/` on first use."""

    encryption_keys: Secrets = ()
    login_token: SecretStr | None = None

    @field_validator("login_token")
    @classmethod
    def _empty_is_none(cls, value: SecretStr | None) -> SecretStr | None:
        return value if value else None


class Schedule(Section):
    """When ticks fire, and how much of a budget they leave to webhooks and people."""

    sync: Cron = "*/15 * * * *"
    refresh_tokens: Cron = "*/5 * * * *"
    revoke: Cron = "*/5 * * * *"
    tidy: Cron = "17 * * * *"
    count: Cron = "*/5 * * * *"
    notify: Cron = "* * * * *"
    news: Cron = "* * * * *"
    webhooks: Cron = "41 * * * *"
    reserve: Annotated[float, Field(ge=0, lt=1)] = 0.2


class Sync(Section):
    """How far and how often a connection is read."""

    interval_seconds: WholeSeconds = 900
    longest_days: Annotated[float, Field(gt=0, le=365)] = 7
    lookback_days: Annotated[int, Field(ge=0)] = 7
    history_days: Annotated[int, Field(ge=0)] = 1825
    history_pages: Count = 10
    recheck_days: Annotated[float, Field(ge=0, le=3650)] = 30
    recheck_share: Annotated[float, Field(ge=0, le=0.5)] = 0.01
    journal_days: Count = 90
    lease_seconds: WholeSeconds = 600
    lock_seconds: Annotated[int, Field(ge=3)] = 60
    refresh_margin_seconds: WholeSeconds = 1800


class Http(Section):
    """Limits of one request to a provider."""

    connect_timeout_seconds: RequestSeconds = 5.0
    read_timeout_seconds: RequestSeconds = 20.0
    total_timeout_seconds: RequestSeconds = 60.0
    max_bytes: Count = 20_000_000


class Worker(Section):
    """The size of one `make worker`."""

    processes: Count = 2
    threads: Count = 8


class Web(Section):
    """Where the status pages and the API listen."""

    host: Host = "127.0.0.1"
    port: Port = 8000
    names: Strings = ()
    public_url: WebUrl = ""


class Hooks(Section):
    """Callables of the host application, as `module:function`."""

    sign_in_again: Annotated[str, Field(pattern=r"^([A-Za-z_][\w.]*:[A-Za-z_][\w.]*)?$")] = ""


class Notify(Section):
    """Whom changes are told of. An address may hold a password, so they are not shown."""

    urls: Annotated[tuple[WebUrl, ...], BeforeValidator(_listed), _SECRET] = Field(default=(), repr=False)
    secrets: SigningSecrets = ()

    @model_validator(mode="after")
    def _signed(self) -> Notify:
        if not all(self.urls):
            raise ValueError("urls must not be empty texts")
        if self.urls and not self.secrets:
            raise ValueError("urls need secrets to sign with: `lifelogger notify secret` makes one")
        return self

    @property
    def signing_secrets(self) -> list[str]:
        return [each.get_secret_value() for each in self.secrets]


class Sandbox(Section):
    """Where the simulated providers listen, and whom they simulate."""

    host: Host = "127.0.0.1"
    port: Port = 8790
    people: Count = 36
    seed: int = 1


MAIN = "main"
"""What the application of a provider's own table is called, where there are others."""
_APPLICATION = re.compile("(?=.{1,50}$)[a-z0-9]+(_[a-z0-9]+)*")  # as it can be in a variable and an address


def path_of(provider: str, application: str) -> str:
    """How an application is named in addresses and messages: `PROVIDER`, or `PROVIDER/NAME`."""
    return provider if application == MAIN else f"{provider}/{application}"


class Application(Section):
    """One more application at a provider: what says who it is. A budget that is None is the provider's."""

    client_id: Annotated[str, Field(min_length=1)]
    client_secret: SecretStr = SecretStr("")
    budget: Budgets | None = None
    overall_budget: Budgets | None = None
    user_budget: Budgets | None = None
    webhook_secret: SecretStr = SecretStr("")
    project: Project = ""
    service_account: SecretStr = SecretStr("")


class ProviderSettings(Section):
    """One provider's application, addresses and request budgets; further applications have tables in it.

    One that is enabled without a `client_id` and with the default addresses is *simulated*: it speaks to the
    sandbox.
    """

    enabled: bool = False
    client_id: str = ""
    client_secret: SecretStr = SecretStr("")
    api_url: WebUrl = ""
    authorize_url: WebUrl = ""
    token_url: WebUrl = ""
    revoke_url: WebUrl = ""
    budget: Budgets = ()
    overall_budget: Budgets = ()
    user_budget: Budgets = ()
    extra_streams: Strings = ()
    webhook_secret: SecretStr = SecretStr("")
    webhook_keys_url: WebUrl = ""
    project: Project = ""
    service_account: SecretStr = SecretStr("")
    applications: dict[str, Application] = {}

    _application: str = PrivateAttr(default=MAIN)

    @property
    def application(self) -> str:
        """The name of the application that these are the settings of."""
        return self._application

    @property
    def suffix(self) -> str:
        """What names this application behind its provider; empty for the main one, as in `path_of`."""
        return path_of("", self._application)

    def of(self, application: str) -> ProviderSettings | None:
        """What holds for one of its applications; None: there is none of that name."""
        if application == self._application:
            return self
        own = self.applications.get(application)
        if own is None:
            return None
        values = {key: value for key, value in own if value is not None}
        found = self.model_copy(update={**values, "applications": {}})
        found._application = application
        return found

    @field_validator("applications")
    @classmethod
    def _names(cls, value: dict[str, Application]) -> dict[str, Application]:
        for name in value:
            if name == MAIN or not _APPLICATION.fullmatch(name):
                raise ValueError(
                    f"{name!r:.60} cannot name an application: lower-case letters, digits and single _ can, "
                    f"but not {MAIN}, which is the one of the table above it"
                )
        return value

    @model_validator(mode="after")
    def _an_application_each(self) -> ProviderSettings:
        """A budget is counted by client id: two applications with one would each think that it is theirs."""
        if self.applications and not self.client_id:
            raise ValueError("client_id must be set, that of the main application, where there are others")
        whose = {self.client_id: "the main application"}
        for name, each in self.applications.items():
            if each.client_id in whose:
                raise ValueError(
                    f"applications.{name}.client_id = {each.client_id!r:.80} must be another than that of "
                    f"{whose[each.client_id]}"
                )
            whose[each.client_id] = f"applications.{name}"
        return self

    @model_validator(mode="after")
    def _complete(self) -> ProviderSettings:
        if self.enabled:
            missing = [
                key for key in ("api_url", "authorize_url", "token_url", "budget") if not getattr(self, key)
            ]
            if missing:
                raise ValueError(f"an enabled provider needs {', '.join(missing)}")
            for name, each in self.applications.items():
                if each.budget == ():  # no limit at all
                    raise ValueError(
                        f"applications.{name}.budget must not be empty: leave it out for that of the provider"
                    )
        return self


class Settings(Section):
    """Everything that can be set. Made by `load_settings`; read it, never change it."""

    database: Database = Database()
    redis: Redis = Redis()
    security: Security = Security()
    schedule: Schedule = Schedule()
    sync: Sync = Sync()
    http: Http = Http()
    worker: Worker = Worker()
    web: Web = Web()
    notify: Notify = Notify()
    hooks: Hooks = Hooks()
    sandbox: Sandbox = Sandbox()
    providers: dict[str, ProviderSettings] = {}

    _root: Path = PrivateAttr(default_factory=Path.cwd)
    _simulated: frozenset[str] = PrivateAttr(default=frozenset())

    @field_validator("providers")
    @classmethod
    def _every_known_provider(cls, value: dict[str, ProviderSettings]) -> dict[str, ProviderSettings]:
        return {
            name: value.get(name) or ProviderSettings() for name in sorted(known_providers() | set(value))
        }

    @property
    def root(self) -> Path:
        """The folder of the settings file in force."""
        return self._root

    @property
    def simulated(self) -> frozenset[str]:
        """The providers that speak to the sandbox, because no `client_id` says whose application it is."""
        return self._simulated

    @property
    def var(self) -> Path:
        """The folder for what is made here (database, Redis, keys): readable by its owner only."""
        path = self._root / "var"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path


@cache
def known_providers() -> frozenset[str]:
    """The providers one can configure: a module in `lifelogger/providers/`, or an entry point of that name.

    By name alone: nothing is imported, since providers may themselves read the settings.
    """
    modules = {module.name for module in pkgutil.iter_modules([str(_PACKAGE / "providers")])} - {"base"}
    plugins = metadata.entry_points(group="lifelogger.providers").names
    return frozenset(name for name in modules | plugins if not name.startswith("_"))


# Where it comes from -------------------------------------------------------------------------------

KeyPath = tuple[str, ...]


def _keys() -> dict[KeyPath, FieldInfo]:
    """Every key that can be set, by its path."""
    found: dict[KeyPath, FieldInfo] = {}
    for section, field in Settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= {(section, key): info for key, info in field.annotation.model_fields.items()}
    for name in sorted(known_providers()):
        found |= {("providers", name, key): info for key, info in ProviderSettings.model_fields.items()}
        del found["providers", name, "applications"]  # the user names them: `_Layers.know` adds their keys
    return found


_OF_APPLICATION = re.compile(f"{PREFIX}PROVIDERS__(.+?)__APPLICATIONS__(.+?)__.+")


def _is_secret(field: FieldInfo) -> bool:
    return _SECRET in field.metadata or "SecretStr" in str(field.annotation)


def _variable(path: KeyPath) -> str:
    return PREFIX + "__".join(path).upper()


def _near(name: str, names: list[str]) -> str:
    matches = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {matches[0]}?" if matches else "see settings.toml for all there are"


class _Layers:
    """The sources merged so far, with where each value came from and what was wrong with them."""

    def __init__(self) -> None:
        self.keys = _keys()
        self.tables: set[KeyPath] = set()
        """What begins the path of a key, a whole one too."""
        self._begin(self.keys)
        self.merged: dict[str, Any] = {}
        self.origin: dict[KeyPath, str] = {}
        self.faults: list[str] = []

    def _begin(self, keys: Iterable[KeyPath]) -> None:
        self.tables |= {key[:length] for key in keys for length in range(len(key) + 1)}

    def know(self, provider: str, application: str) -> None:
        """Expect the keys of an application, whose name somebody chose."""
        table = ("providers", provider, "applications", application)
        if table[:2] in self.tables and table not in self.tables:
            keys: dict[KeyPath, FieldInfo] = {
                (*table, key): info for key, info in Application.model_fields.items()
            }
            self._begin(keys)
            self.keys |= keys
            self._put(table, {}, "")  # one that says nothing is missed all the same

    def add_file(self, path: Path) -> None:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            self.faults.append(f"{path}: cannot be read: {error.strerror}")
        except ValueError as error:  # TOML or UTF-8 that is none
            self.faults.append(f"{path}: is not valid TOML: {error}")
        else:
            for provider, name in _applications(table):
                self.know(provider, name)
            for key, value in self._leaves(table, ()):
                self._add_from_file(key, value, path)

    def _leaves(self, table: dict[str, Any], path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
        for key, value in table.items():
            if isinstance(value, dict) and (*path, key) not in self.keys:
                yield from self._leaves(value, (*path, key))
            else:
                yield (*path, key), value
        if not table and path:
            yield path, {}

    def _add_from_file(self, path: KeyPath, value: Any, file: Path) -> None:
        is_table = path in self.tables
        if path in self.keys or (is_table and not isinstance(value, dict)):
            self._put(path, value, str(file))
        elif is_table:
            return
        elif path[2:3] == ("applications",) and path[:2] in self.tables and len(path) < 5:
            wanted = f"must be the table of an application: [{'.'.join(path[:3])}.NAME]"
            self.faults.append(f"{'.'.join(path)} ({file}): {wanted}")
        else:
            names = [".".join(key) for key in self.keys]
            self.faults.append(f"{'.'.join(path)} ({file}): no such setting: {_near('.'.join(path), names)}")

    def add_environment(self, environ: Mapping[str, str]) -> None:
        for name in sorted(environ):
            if found := _OF_APPLICATION.fullmatch(name):
                self.know(found[1].lower(), found[2].lower())
        variables = {_variable(path): path for path in self.keys}
        files = {f"{_variable(path)}_FILE": path for path, field in self.keys.items() if _is_secret(field)}
        for name, value in sorted(environ.items()):
            if not name.startswith(PREFIX) or name in _NO_SETTINGS:
                continue
            if name in variables:
                self._put(variables[name], value, name)
            elif name not in files:
                self.faults.append(f"{name}: no such setting: {_near(name, [*variables, *files])}")
            elif name.removesuffix("_FILE") in environ:
                self.faults.append(f"{name}: {name.removesuffix('_FILE')} is set as well: keep one of them")
            else:
                try:
                    text = Path(value).read_text(encoding="utf-8").strip()
                except (OSError, UnicodeDecodeError) as error:
                    self.faults.append(
                        f"{name} = {value!r}: cannot be read: {getattr(error, 'strerror', error)}"
                    )
                else:
                    self._put(files[name], text, name)

    def _put(self, path: KeyPath, value: Any, origin: str) -> None:
        table = self.merged
        for key in path[:-1]:
            if not isinstance(table.setdefault(key, {}), dict):
                table[key] = {}
            table = table[key]
        table[path[-1]] = value
        if origin:
            self.origin[path] = origin

    def explain(self, location: tuple[int | str, ...], message: str, value: Any) -> str:
        """One fault as a line: the key, its value unless it may be a secret, its origin, what is allowed."""
        path = tuple(part for part in location if isinstance(part, str))
        field = self.keys.get(path)
        shown = (
            ""
            if field is None or _is_secret(field) or isinstance(value, (dict, list))
            else f" = {value!r:.80}"
        )
        origin = f" ({self.origin[path]})" if path in self.origin else ""
        message = message.removeprefix("Value error, ").replace("Input should be", "must be", 1)
        message = message.replace("Field required", "must be set")
        return f"{'.'.join(path)}{shown}{origin}: {message}"


def _applications(table: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The provider and the name of each table of an application in a file."""
    providers = table.get("providers")
    for provider, keys in providers.items() if isinstance(providers, dict) else ():
        found = keys.get("applications") if isinstance(keys, dict) else None
        for name, value in found.items() if isinstance(found, dict) else ():
            if isinstance(value, dict):
                yield provider, name


def load_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Read and check the settings.

    Raises `SettingsError`, whose message lists every fault, one a line. No secret is ever in it.
    """
    layers = _Layers()
    packaged = _PACKAGE / "settings.toml"
    defaults = packaged if packaged.exists() else _PACKAGE.parent / "settings.toml"
    # An installed library must not write beside itself, in site-packages.
    root = Path.cwd() if defaults == packaged else defaults.parent
    layers.add_file(defaults)
    if named := environ.get("LIFELOGGER_SETTINGS"):
        file = Path(named).expanduser().resolve()
        root = file.parent
        layers.add_file(file)
    layers.add_environment(environ)
    if defaults == packaged and not named and not layers.merged["database"]["url"]:
        # Not a world of its own in whatever folder this happens to be.
        layers.faults.append(
            "database.url: not set: name the database of your workers (LIFELOGGER_DATABASE__URL), "
            "or a settings file (LIFELOGGER_SETTINGS)"
        )
    try:
        settings = Settings.model_validate(layers.merged)
    except ValidationError as error:
        layers.faults += [
            layers.explain(fault["loc"], fault["msg"], fault["input"])
            for fault in error.errors(include_url=False, include_context=False)
        ]
    if layers.faults:
        raise SettingsError("The settings are wrong:\n" + "\n".join(f"  {fault}" for fault in layers.faults))
    simulated = frozenset(
        name
        for name, provider in settings.providers.items()
        if provider.enabled
        and not provider.client_id
        and all(layers.origin.get(("providers", name, key)) == str(defaults) for key in _ADDRESSES)
    )
    settings = settings.model_copy(
        update={
            "providers": {
                name: _simulate(name, provider, settings.sandbox) if name in simulated else provider
                for name, provider in settings.providers.items()
            }
        }
    )
    settings._root, settings._simulated = root, simulated
    return settings


_ADDRESSES = ("api_url", "authorize_url", "token_url", "revoke_url")


def _simulate(name: str, provider: ProviderSettings, sandbox: Sandbox) -> ProviderSettings:
    """The provider as the sandbox has it: the paths of the real addresses, beneath its name."""
    host = f"[{sandbox.host}]" if ":" in sandbox.host else sandbox.host
    here = {
        key: f"http://{host}:{sandbox.port}/{name}{urlsplit(getattr(provider, key)).path}"
        for key in _ADDRESSES
    }
    if provider.webhook_keys_url:
        path = urlsplit(provider.webhook_keys_url).path
        here["webhook_keys_url"] = f"http://{host}:{sandbox.port}/{name}{path}"
    if not provider.project:
        here["project"] = "sandbox"
    secrets = {key: SecretStr("sandbox") for key in ("client_secret", "service_account")}
    return provider.model_copy(update={**here, "client_id": "sandbox", **secrets})


@cache
def get_settings() -> Settings:
    """The settings of this process, read once."""
    return load_settings()
