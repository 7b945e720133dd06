"""Settings: every source, every kind of value, every refusal. The file says what the model says."""

from __future__ import annotations

import json
import re
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError
from typer.testing import CliRunner

from lifelogger.cli import app
from lifelogger.errors import SettingsError
from lifelogger.runtime import build, checked
from lifelogger.settings import PREFIX, ProviderSettings, Section, Settings, known_providers, load_settings

FILE = Path(__file__).parent.parent / "settings.toml"
KEY = "k" * 43 + "="

Write = Callable[[str], dict[str, str]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A settings file of one's own, as the environment that names it."""

    def write(text: str) -> dict[str, str]:
        (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
        return {"LIFELOGGER_SETTINGS": str(tmp_path / "mine.toml")}

    return write


def faults(environ: dict[str, str]) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_settings(environ)
    title, *lines = str(caught.value).splitlines()
    assert title == "The settings are wrong:"
    return [line.strip() for line in lines]


def fault(environ: dict[str, str]) -> str:
    [only] = faults(environ)
    return only


# The file and the model -------------------------------------------------------------------------------------


def in_the_model() -> dict[tuple[str, ...], Any]:
    """Every key with its default; a provider has no defaults in the model, its file table is the default."""
    found = {}
    for section, field in Settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            for key, info in field.annotation.model_fields.items():
                found[section, key] = info.get_default(call_default_factory=True)
    return found


def in_the_file() -> dict[tuple[str, ...], Any]:
    table = tomllib.loads(FILE.read_text(encoding="utf-8"))
    del table["providers"]
    return {(section, key): value for section, keys in table.items() for key, value in keys.items()}


def test_the_file_names_every_key_of_the_model_and_no_other() -> None:
    assert set(in_the_file()) == set(in_the_model())


@pytest.mark.parametrize("path", sorted(in_the_file()), ids=".".join)
def test_the_default_in_the_file_is_that_of_the_model(path: tuple[str, str]) -> None:
    written, default = in_the_file()[path], in_the_model()[path]

    if default is None:
        default = ""
    assert (tuple(written) if isinstance(written, list) else written) == default


def test_each_provider_has_a_table_with_every_key() -> None:
    tables = tomllib.loads(FILE.read_text(encoding="utf-8"))["providers"]

    assert set(tables) == known_providers()
    assert all(
        set(table) == set(ProviderSettings.model_fields) - {"applications"} for table in tables.values()
    )


def test_every_key_is_explained_above_it() -> None:
    """By a comment of its own, or by that of the keys it stands with; a blank line ends a group."""
    alone, explained = [], False
    for line in FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            explained = True
        elif not line or (line.startswith("[") and not line.startswith("[providers.")):
            explained = False
        elif not explained and not line.startswith("["):
            alone.append(line)
    assert alone == []


def test_every_secret_is_marked_as_one_in_the_file() -> None:
    text = FILE.read_text(encoding="utf-8")

    for key in ("encryption_keys", "login_token", "client_secret"):
        assert re.search(rf"# Secret\.[^\n]*\n(#[^\n]*\n)*{key} =", text), key
    assert len(re.findall(r"# Secret\.[^\n]*\n(#[^\n]*\n)*url =", text)) == 2


def test_without_anything_set_the_file_beside_the_project_is_in_force() -> None:
    settings = load_settings({})

    assert settings.root == FILE.parent
    assert settings.providers["strava"].budget == ("100/15 minutes", "1000/day")


# The environment --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("REDIS__PREFIX", "mine", lambda s: s.redis.prefix == "mine"),
        ("WEB__PORT", "9000", lambda s: s.web.port == 9000),
        ("SCHEDULE__RESERVE", "0.5", lambda s: s.schedule.reserve == 0.5),
        ("PROVIDERS__STRAVA__ENABLED", "false", lambda s: s.providers["strava"].enabled is False),
        (
            "PROVIDERS__STRAVA__BUDGET",
            '["5/minute", "7/day"]',
            lambda s: s.providers["strava"].budget == ("5/minute", "7/day"),
        ),
        (
            "PROVIDERS__STRAVA__BUDGET",
            "5/minute, 7/day",
            lambda s: s.providers["strava"].budget == ("5/minute", "7/day"),
        ),
        ("PROVIDERS__STRAVA__USER_BUDGET", "", lambda s: s.providers["strava"].user_budget == ()),
        ("SECURITY__LOGIN_TOKEN", "open", lambda s: s.security.login_token == SecretStr("open")),
        ("SECURITY__LOGIN_TOKEN", "", lambda s: s.security.login_token is None),
        (
            "SECURITY__ENCRYPTION_KEYS",
            "first,second",
            lambda s: s.security.encryption_keys == (SecretStr("first"), SecretStr("second")),
        ),
        (
            "SECURITY__ENCRYPTION_KEYS",
            '["first", "second"]',
            lambda s: s.security.encryption_keys == (SecretStr("first"), SecretStr("second")),
        ),
    ],
)
def test_the_environment_wins_over_the_file(
    write: Write, name: str, value: str, found: Callable[[Settings], bool]
) -> None:
    environ = write('[redis]\nprefix = "files"\n[web]\nport = 1\n')

    assert found(load_settings({**environ, PREFIX + name: value}))


def test_variables_of_others_are_none_of_our_business() -> None:
    load_settings({"WEB__PORT": "x", "LIFELOGGER_BROKER": "stub", "PATH": "/bin"})


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("SECURITY__LOGIN_TOKEN_FILE", "open\n", lambda s: s.security.login_token == SecretStr("open")),
        (
            "SECURITY__ENCRYPTION_KEYS_FILE",
            "first\nsecond\n\n",
            lambda s: s.security.encryption_keys == (SecretStr("first"), SecretStr("second")),
        ),
        (
            "PROVIDERS__STRAVA__CLIENT_SECRET_FILE",
            "hidden",
            lambda s: s.providers["strava"].client_secret == SecretStr("hidden"),
        ),
        (
            "DATABASE__URL_FILE",
            "postgres://u:pw@h/n\n",
            lambda s: s.database.url == "postgresql+psycopg://u:pw@h/n",
        ),
        ("REDIS__URL_FILE", "redis://:pw@h/3", lambda s: s.redis.url == "redis://:pw@h/3"),
        (
            "NOTIFY__SECRETS_FILE",
            f"whsec_{KEY}\nwhsec_{KEY}\n",
            lambda s: s.notify.signing_secrets == [f"whsec_{KEY}"] * 2,
        ),
    ],
)
def test_a_secret_may_come_from_a_file(
    tmp_path: Path, name: str, text: str, found: Callable[[Settings], bool]
) -> None:
    (tmp_path / "secret").write_text(text)

    environ = {PREFIX + name: str(tmp_path / "secret"), "LIFELOGGER_PROVIDERS__STRAVA__CLIENT_ID": "4711"}

    assert found(load_settings(environ))


def test_an_address_to_notify_needs_a_secret_to_sign_with() -> None:
    line = fault({"LIFELOGGER_NOTIFY__URLS": "https://u:hidden@app.example/hook"})

    assert "urls need secrets to sign with: `lifelogger notify secret`" in line
    assert "hidden" not in line


@pytest.mark.parametrize(
    "secret", [KEY, "whsec_", "whsec_dG9vIHNob3J0", f"whsec_{KEY}?", "whsec_" + "é" * 44]
)
def test_a_secret_to_sign_with_is_a_standard_one(secret: str) -> None:
    line = fault({"LIFELOGGER_NOTIFY__SECRETS": secret})

    assert "whsec_ and base64 of 24 to 64 bytes" in line
    assert secret not in line or secret == "whsec_"


def test_a_file_for_what_is_no_secret_is_refused(tmp_path: Path) -> None:
    (tmp_path / "port").write_text("9000")

    assert "LIFELOGGER_WEB__PORT_FILE: no such setting" in fault(
        {"LIFELOGGER_WEB__PORT_FILE": str(tmp_path / "port")}
    )


def test_a_secret_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hush-file")
    environ = {
        "LIFELOGGER_SECURITY__LOGIN_TOKEN": "hush-value",
        "LIFELOGGER_SECURITY__LOGIN_TOKEN_FILE": str(tmp_path / "token"),
    }

    line = fault(environ)

    assert line == (
        "LIFELOGGER_SECURITY__LOGIN_TOKEN_FILE: LIFELOGGER_SECURITY__LOGIN_TOKEN is set as well: "
        "keep one of them"
    )


def test_a_secrets_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    line = fault({"LIFELOGGER_REDIS__URL_FILE": str(tmp_path / "gone")})

    assert "LIFELOGGER_REDIS__URL_FILE" in line
    assert "gone" in line
    assert "No such file" in line


# The file of one's own --------------------------------------------------------------------------------------


def test_an_own_file_needs_only_the_keys_it_changes(write: Write, tmp_path: Path) -> None:
    settings = load_settings(write('[sync]\nlookback_days = 3\n[providers.strava]\nbudget = ["9/day"]\n'))

    assert settings.sync.lookback_days == 3
    assert settings.sync.history_days == 1825
    assert settings.providers["strava"].budget == ("9/day",), "lists are replaced"
    assert settings.providers["strava"].overall_budget == ("200/15 minutes", "2000/day")
    assert settings.root == tmp_path


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "No such file" in fault({"LIFELOGGER_SETTINGS": str(tmp_path / "gone.toml")})


@pytest.mark.parametrize("text", ["[redis\n", "a = b = c", "[redis]\nprefix = 'a'\nprefix = 'b'"])
def test_a_file_that_is_not_toml_is_refused(write: Write, text: str) -> None:
    assert "mine.toml: is not valid TOML" in fault(write(text))


def test_a_file_that_is_not_utf_8_is_refused(write: Write, tmp_path: Path) -> None:
    environ = write("")
    (tmp_path / "mine.toml").write_bytes(b'[redis]\nprefix = "\xff"\n')

    assert "is not valid TOML" in fault(environ)


# Refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("[sync]\nlokback_days = 3", "sync.lokback_days"),
        ("[sink]\nlookback_days = 3", "sink.lookback_days"),
        ("lookback_days = 3", "lookback_days"),
        ("[providers.strafa]\nenabled = true", "providers.strafa.enabled"),
    ],
)
def test_an_unknown_key_of_the_file_is_refused(write: Write, text: str, refusal: str) -> None:
    line = fault(write(text))

    assert line.startswith(f"{refusal} (")
    assert "mine.toml): no such setting: " in line


def test_an_unknown_key_is_answered_with_a_near_one(write: Write) -> None:
    assert fault(write("[sync]\nlokback_days = 3")).endswith("did you mean sync.lookback_days?")
    assert fault({"LIFELOGGER_WEB__PROT": "1"}) == (
        "LIFELOGGER_WEB__PROT: no such setting: did you mean LIFELOGGER_WEB__PORT?"
    )
    assert fault({"LIFELOGGER_0123456789__0123456789__0123456789": "1"}).endswith(
        "see settings.toml for all there are"
    )


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("WEB__PORT", "0", "greater than or equal to 1"),
        ("WEB__PORT", "65536", "less than or equal to 65535"),
        ("WEB__PORT", "web", "integer"),
        ("SCHEDULE__RESERVE", "1", "less than 1"),
        ("SCHEDULE__RESERVE", "-0.1", "greater than or equal to 0"),
        ("SYNC__LOCK_SECONDS", "2", "greater than or equal to 3"),
        ("WORKER__THREADS", "1.5", "integer"),
        ("HTTP__READ_TIMEOUT_SECONDS", "0", "greater than 0"),
        ("REDIS__PREFIX", "a b", "pattern"),
        ("REDIS__PREFIX", "", "pattern"),
        ("PROVIDERS__STRAVA__ENABLED", "maybe", "boolean"),
        ("PROVIDERS__STRAVA__API_URL", "ftp://www.strava.com", "https:// or http://"),
        ("PROVIDERS__STRAVA__API_URL", "www.strava.com/api", "https:// or http://"),
        ("PROVIDERS__STRAVA__API_URL", "https:///api", "must name a host"),
        ("PROVIDERS__STRAVA__TOKEN_URL", "https://host:port/", "https:// or http://"),
        ("PROVIDERS__STRAVA__TOKEN_URL", "https://[::1/", "https:// or http://"),
    ],
)
def test_a_refusal_names_the_key_the_value_where_it_is_from_and_what_is_allowed(
    name: str, value: str, allowed: str
) -> None:
    line = fault({PREFIX + name: value})

    key = name.lower().replace("__", ".")
    assert line.startswith(f"{key} = {value!r} ({PREFIX}{name}): ")
    assert allowed in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE__URL", "mysql://u:hush-pw@h/n"),
        ("DATABASE__URL", "hush-pw"),
        ("REDIS__URL", "http://u:hush-pw@h/0"),
        ("REDIS__URL", "redis://u:hush-pw@h:x/0"),
        ("SECURITY__ENCRYPTION_KEYS", '["hush-pw"'),
        ("SECURITY__ENCRYPTION_KEYS", '[["hush-pw"]]'),
    ],
)
def test_a_refusal_of_a_secret_does_not_show_it(name: str, value: str) -> None:
    text = "\n".join(faults({PREFIX + name: value}))

    assert name.lower().replace("__", ".") in text
    assert "hush" not in text


def test_nor_does_one_of_a_file(write: Write) -> None:
    text = "\n".join(
        faults(
            write(
                '[security]\nlogin_token = ["hush-pw"]\nencryption_keys = {a = "hush-pw"}\n'
                '[providers.strava]\nclient_secret = ["hush-pw"]\n[database]\nurl = ["hush-pw"]\n'
            )
        )
    )

    for key in (
        "security.login_token",
        "security.encryption_keys",
        "database.url",
        "providers.strava.client_secret",
    ):
        assert key in text
    assert "hush" not in text


def test_all_faults_are_told_at_once(write: Write) -> None:
    environ = {
        **write('[web]\nport = 0\n[sync]\nhistory = 1\n[schedule]\nsync = "@weekly"\n'),
        "LIFELOGGER_WORKER__THREADS": "none",
        "LIFELOGGER_WORKER__THREAD": "4",
    }

    found = faults(environ)

    assert sorted(line.split(" ")[0].rstrip(":") for line in found) == [
        "LIFELOGGER_WORKER__THREAD",
        "schedule.sync",
        "sync.history",
        "web.port",
        "worker.threads",
    ]


def test_a_table_where_a_value_belongs_and_a_value_where_a_table_belongs(write: Write) -> None:
    assert fault(write("[web.port]\nnumber = 1")).startswith("web.port (")
    assert fault(write("web = 1")).startswith("web (")
    assert fault(write("providers = 1")).startswith("providers (")
    assert fault(write("[providers]\nstrava = 1")).startswith("providers.strava (")


@pytest.mark.parametrize(
    "value",
    [
        "*/15 * * * 0",
        "*/15 * * * sun",
        "*/15 * * * SUN,mon",
        "*/15 * * * 0-3",
        "0 4 * * */2",
        "@weekly",
        "@daily",
        "60 * * * *",
        "* 24 * * *",
        "* * 0 * *",
        "* * 32 * *",
        "* * * 13 *",
        "* * * 0 *",
        "* * * * 8",
        "*/0 * * * *",
        "30-10 * * * *",
        "-5 * * * *",
        "* * * jan *",
        "* * * *",
        "* * * * * *",
        "",
        "every 15 minutes or so",
    ],
)
def test_a_cron_that_periodiq_would_misread_is_refused(value: str) -> None:
    line = fault({"LIFELOGGER_SCHEDULE__SYNC": value})

    assert line.startswith(f"schedule.sync = {value!r} ")


@pytest.mark.parametrize(
    "value", ["0 4 * * 7", "*/5 * * * 1-5", "0,30 8-18/2 1 1,7 mon", "* * * * mon-fri", "0 0 * * 0-7"]
)
def test_a_cron_that_periodiq_fires_as_it_reads_is_taken(value: str) -> None:
    assert load_settings({"LIFELOGGER_SCHEDULE__REFRESH_TOKENS": value}).schedule.refresh_tokens == value


@pytest.mark.parametrize(
    "value", ["100", "100/fortnight", "0/day", "-1/day", "many/day", "10/month", "10/year"]
)
def test_a_budget_that_has_no_windows_is_refused(value: str) -> None:
    line = fault({"LIFELOGGER_PROVIDERS__STRAVA__BUDGET": value})

    assert line.startswith(f"providers.strava.budget = {value!r} ")
    assert "like" in line


def test_a_list_that_is_not_one_is_refused() -> None:
    assert "must be a JSON list" in fault({"LIFELOGGER_PROVIDERS__STRAVA__BUDGET": '["1/day"'})
    assert "valid string" in fault({"LIFELOGGER_PROVIDERS__STRAVA__BUDGET": "[1]"})


def test_an_enabled_provider_needs_its_addresses_and_a_budget(write: Write) -> None:
    line = fault(write('[providers.strava]\napi_url = ""\nbudget = []\n'))

    assert line == "providers.strava: an enabled provider needs api_url, budget"


def test_one_that_is_not_enabled_needs_nothing(write: Write) -> None:
    settings = load_settings(write('[providers.strava]\nenabled = false\napi_url = ""\nbudget = []\n'))

    assert not settings.providers["strava"].enabled
    assert "strava" not in settings.simulated


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("postgres://u@h/n", "postgresql+psycopg://u@h/n"),
        ("postgresql://u@h/n?host=/run", "postgresql+psycopg://u@h/n?host=/run"),
        ("postgresql:///n", "postgresql+psycopg:///n"),
        ("postgresql+psycopg://u@h/n", "postgresql+psycopg://u@h/n"),
        ("sqlite:////srv/data.db", "sqlite:////srv/data.db"),
        ("", ""),
    ],
)
def test_the_database_url_names_the_driver_we_ship_with(given: str, kept: str) -> None:
    assert load_settings({"LIFELOGGER_DATABASE__URL": given}).database.url == kept


# Applications -----------------------------------------------------------------------------------------------

MINE = """
[providers.strava]
client_id = "1"
client_secret = "hush-1"
webhook_secret = "hush-3"
project = "p"
budget = ["200/15 minutes", "2000/day"]

[providers.strava.applications.second]
client_id = "2"
client_secret = "hush-2"
overall_budget = ["9/day"]
"""
SECOND = "LIFELOGGER_PROVIDERS__STRAVA__APPLICATIONS__SECOND"


def test_an_application_has_what_says_who_it_is_and_shares_the_rest(write: Write) -> None:
    strava = load_settings(write(MINE)).providers["strava"]
    second = strava.of("second")

    assert strava.of("main") is strava
    assert strava.of("third") is None
    assert second is not None
    assert (second.application, second.client_id) == ("second", "2")
    assert second.client_secret.get_secret_value() == "hush-2"
    assert (second.budget, second.overall_budget) == (strava.budget, ("9/day",))
    assert (second.api_url, second.enabled) == (strava.api_url, True)
    assert (second.webhook_secret.get_secret_value(), second.project) == ("", ""), "they are the main one's"
    assert strava.model_copy(update={"enabled": False}).of("second").enabled is False
    assert second.of("second") is second


def test_the_environment_overrides_and_makes_applications(write: Write, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hush-4\n", encoding="utf-8")
    more = {
        f"{SECOND}__CLIENT_SECRET_FILE": str(tmp_path / "secret"),
        f"{SECOND}__BUDGET": "5/minute, 50/day",
    }
    third = {"LIFELOGGER_PROVIDERS__STRAVA__APPLICATIONS__THE_THIRD__CLIENT_ID": "3"}

    strava = load_settings({**write(MINE), **more, **third}).providers["strava"]

    second = strava.of("second")
    assert second is not None
    assert second.client_secret.get_secret_value() == "hush-4"
    assert (second.client_id, second.budget) == ("2", ("5/minute", "50/day"))
    assert list(strava.applications) == ["second", "the_third"]
    assert "hush" not in f"{strava!r} {second!r}"


@pytest.mark.parametrize(
    ("table", "lines", "sentence"),
    [
        ("second", "", "providers.strava.applications.second.client_id: must be set"),
        ("second", 'client_id = ""', "providers.strava.applications.second.client_id = '' ({file}): "
         "String should have at least 1 character"),
        ("second", 'client_id = "1"', "providers.strava: applications.second.client_id = '1' must be another "
         "than that of the main application"),
        ("second", 'client_id = "2"\n[providers.strava.applications.third]\nclient_id = "2"',
         "providers.strava: applications.third.client_id = '2' must be another than that of "
         "applications.second"),
        ("main", 'client_id = "2"', "providers.strava.applications: 'main' cannot name an application: "
         "lower-case letters, digits and single _ can, but not main, which is the one of the table above it"),
        ("Second", 'client_id = "2"', "providers.strava.applications: 'Second' cannot name an application: "
         "lower-case letters, digits and single _ can, but not main, which is the one of the table above it"),
        ("a__b", 'client_id = "2"', "providers.strava.applications: 'a__b' cannot name an application: "
         "lower-case letters, digits and single _ can, but not main, which is the one of the table above it"),
        ("second", 'client_id = "2"\nclient_idd = "3"', "providers.strava.applications.second.client_idd "
         "({file}): no such setting: did you mean providers.strava.applications.second.client_id?"),
        ("second", 'client_id = "2"\nbudget = ["many"]', "providers.strava.applications.second.budget = "
         "'many' ({file}): must be a count per window of seconds, minutes, hours or days, like "
         '"100/15 minutes"'),
        ("second", 'client_id = "2"\nbudget = []', "providers.strava: applications.second.budget must not be "
         "empty: leave it out for that of the provider"),
    ],
)  # fmt: skip
def test_an_application_that_cannot_be_is_refused_by_name(
    write: Write, tmp_path: Path, table: str, lines: str, sentence: str
) -> None:
    environ = write(
        f'[providers.strava]\nclient_id = "1"\n[providers.strava.applications.{table}]\n{lines}\n'
    )

    assert fault(environ) == sentence.format(file=tmp_path / "mine.toml")


@pytest.mark.parametrize("text", ["applications = 3", "[providers.strava.applications]\nclient_id = '2'"])
def test_what_is_no_table_of_an_application_is_refused(write: Write, text: str) -> None:
    wanted = "must be the table of an application: [providers.strava.applications.NAME]"

    assert wanted in fault(write(f'[providers.strava]\nclient_id = "1"\n{text}\n'))


def test_an_empty_variable_takes_no_application_its_limits(write: Write) -> None:
    assert "applications.second.budget must not be empty" in fault({**write(MINE), f"{SECOND}__BUDGET": ""})


def test_further_applications_need_a_main_one(write: Write) -> None:
    """Nobody would say whose the simulated provider's people are."""
    assert fault(write('[providers.strava.applications.second]\nclient_id = "2"\n')) == (
        "providers.strava: client_id must be set, that of the main application, where there are others"
    )


def test_a_variable_of_an_unknown_provider_or_key_is_refused(write: Write) -> None:
    elsewhere = "LIFELOGGER_PROVIDERS__STRAV__APPLICATIONS__SECOND__CLIENT_ID"

    found = faults({**write(MINE), elsewhere: "2", f"{SECOND}__CLIENT_IDD": "2"})

    assert found == [
        f"{SECOND}__CLIENT_IDD: no such setting: did you mean {SECOND}__CLIENT_ID?",
        f"{elsewhere}: no such setting: did you mean {SECOND}__CLIENT_ID?",
    ]


# Secrets ----------------------------------------------------------------------------------------------------


def test_no_secret_stands_in_what_is_printed_or_logged() -> None:
    settings = load_settings(
        {
            "LIFELOGGER_DATABASE__URL": "postgresql://u:hush-db@h/n",
            "LIFELOGGER_REDIS__URL": "redis://:hush-redis@h/0",
            "LIFELOGGER_SECURITY__ENCRYPTION_KEYS": "hush-key",
            "LIFELOGGER_SECURITY__LOGIN_TOKEN": "hush-login",
            "LIFELOGGER_PROVIDERS__STRAVA__CLIENT_SECRET": "hush-client",
        }
    )

    for part in (settings, *(getattr(settings, name) for name in Settings.model_fields)):
        assert "hush" not in f"{part} {part!r}"


# The sandbox ------------------------------------------------------------------------------------------------


def test_a_provider_without_an_application_speaks_to_the_sandbox() -> None:
    settings = load_settings({"LIFELOGGER_SANDBOX__HOST": "::1", "LIFELOGGER_SANDBOX__PORT": "4000"})

    strava = settings.providers["strava"]
    assert settings.simulated == {"fitbit", "oura", "strava"}
    assert strava.api_url == "http://[::1]:4000/strava/api/v3"
    assert strava.authorize_url == "http://[::1]:4000/strava/oauth/authorize"
    assert strava.token_url == "http://[::1]:4000/strava/api/v3/oauth/token"
    assert strava.revoke_url == "http://[::1]:4000/strava/oauth/revoke"
    assert strava.client_id
    assert strava.client_secret.get_secret_value()
    fitbit = settings.providers["fitbit"]  # whose API, sign-in and tokens are three hosts
    assert fitbit.api_url == "http://[::1]:4000/fitbit"
    assert fitbit.authorize_url == "http://[::1]:4000/fitbit/o/oauth2/v2/auth"
    assert fitbit.token_url == "http://[::1]:4000/fitbit/token"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CLIENT_ID", "4711"),
        ("API_URL", "http://127.0.0.1:9/api"),
        ("TOKEN_URL", "http://127.0.0.1:9/token"),
        ("ENABLED", "false"),
    ],
)
def test_one_with_an_application_or_an_address_of_its_own_does_not(name: str, value: str) -> None:
    settings = load_settings({f"LIFELOGGER_PROVIDERS__STRAVA__{name}": value})

    assert "strava" not in settings.simulated
    assert str(settings.sandbox.port) not in settings.providers["strava"].authorize_url


def test_an_address_in_ones_own_file_is_no_simulation_either(write: Write) -> None:
    settings = load_settings(write('[providers.strava]\napi_url = "https://www.strava.com/api/v3"\n'))

    assert "strava" not in settings.simulated


# The object -------------------------------------------------------------------------------------------------


def test_settings_are_frozen() -> None:
    settings = load_settings({})

    for section, key in [(settings, "web"), (settings.web, "port"), (settings.providers["strava"], "budget")]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, getattr(section, key))


def test_var_is_for_its_owner_only(write: Write, tmp_path: Path) -> None:
    var = load_settings(write("")).var

    assert var == tmp_path / "var"
    assert stat.S_IMODE(var.stat().st_mode) == 0o700


def test_the_helper_of_the_tests_sets_what_a_child_sees(settings_env: Callable[..., Settings]) -> None:
    settings = settings_env(sync={"lookback_days": 1}, providers={"strava": {"budget": ["1/day"]}})

    assert settings.providers["strava"].budget == ("1/day",)
    assert load_settings() == settings
    assert json.loads(settings.model_dump_json())["sync"]["lookback_days"] == 1


def test_a_variable_with_one_underscore_is_refused() -> None:
    """The usual slip: it would leave a production worker on SQLite in `var/`."""
    with pytest.raises(SettingsError, match="LIFELOGGER_DATABASE_URL: no such setting: did you mean"):
        load_settings({"LIFELOGGER_DATABASE_URL": "postgresql://db/lifelogger"})


# What only providers know -----------------------------------------------------------------------------------


def test_streams_that_no_provider_has_are_refused_all_at_once(settings_env: Callable[..., Settings]) -> None:
    """With the key, the value, and what is allowed: a misspelt one would be off without a word."""
    settings = settings_env(
        providers={
            "fitbit": {"extra_streams": ["heart-rate-sample", "sleep"]},
            "oura": {"extra_streams": ["heartrate", "heart_rate"], "enabled": False},
            "strava": {"extra_streams": ["laps"]},
        }
    )

    with pytest.raises(SettingsError) as caught:
        checked(settings)

    assert str(caught.value).splitlines() == [
        "The settings are wrong:",
        "  providers.fitbit.extra_streams = 'heart-rate-sample': must be one of heart-rate-samples; "
        "did you mean heart-rate-samples?",
        "  providers.fitbit.extra_streams = 'sleep': must be one of heart-rate-samples",
        "  providers.oura.extra_streams = 'heart_rate': must be one of heartrate; did you mean heartrate?",
        "  providers.strava.extra_streams = 'laps': must be empty: there is none",
    ]


def test_streams_that_there_are_can_be_switched_on(settings_env: Callable[..., Settings]) -> None:
    settings = settings_env(
        providers={
            "fitbit": {"extra_streams": ["heart-rate-samples"]},
            "oura": {"extra_streams": ["heartrate"]},
        }
    )

    assert checked(settings) is settings


def test_nothing_starts_with_a_stream_that_is_misspelt(settings_env: Callable[..., Settings]) -> None:
    settings = settings_env(providers={"oura": {"extra_streams": ["heartbeat"]}})

    with pytest.raises(SettingsError, match="heartbeat"):
        build(settings)


@pytest.mark.parametrize("command", ["worker", "periodiq", "web", "sandbox", "migrate", "doctor"])
def test_no_command_starts_with_it(command: str, settings_env: Callable[..., Settings]) -> None:
    """Before anything is connected to."""
    settings_env(providers={"oura": {"extra_streams": ["heartbeat"]}})

    with pytest.raises(SettingsError, match="heartbeat"):
        CliRunner().invoke(app, [command], catch_exceptions=False)


def test_the_default_budgets_are_those_of_the_documents() -> None:
    """docs/providers: what a new application may ask, and each user of it."""
    found = {
        name: (each.budget, each.overall_budget, each.user_budget)
        for name, each in load_settings({}).providers.items()
        if each.enabled
    }

    assert found["strava"] == (("100/15 minutes", "1000/day"), ("200/15 minutes", "2000/day"), ())
    assert found["fitbit"] == (("120000/minute", "86400000/day"), (), ("300/minute",))
    assert found["oura"] == (("5000/5 minutes",), (), ())
