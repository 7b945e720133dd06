"""The objects that a process works with, built once from the settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache

import redis

from lifelogger import embedded, redis_url
from lifelogger.budget import Budget
from lifelogger.checks import checked as checked
from lifelogger.crypto import Vault
from lifelogger.errors import Unavailable
from lifelogger.mutex import Mutex
from lifelogger.providers import registry
from lifelogger.providers.base import Pool, Provider
from lifelogger.settings import MAIN, ProviderSettings, Settings, get_settings, path_of
from lifelogger.store import Store


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Application:
    """A client id at a provider: connections belong to one, and so do budgets and webhooks."""

    provider: Provider
    settings: ProviderSettings
    """Those of this application."""

    @property
    def name(self) -> str:
        return self.settings.application

    @property
    def key(self) -> tuple[str, str]:
        """The columns `provider` and `application` of what is its."""
        return self.provider.name, self.name

    @property
    def path(self) -> str:
        return path_of(*self.key)

    @property
    def title(self) -> str:
        """What people call it: the provider, where there are no others."""
        return self.provider.title if self.name == MAIN else f"{self.provider.title} ({self.name})"

    @property
    def pools(self) -> tuple[Pool, ...]:
        """What all its connections spend from."""
        return self.provider.shared_pools(self.settings)


@dataclass(frozen=True)
class Runtime:
    """What the engine, the planner and the token keeper are given. Tests build their own."""

    settings: Settings
    store: Store
    redis: redis.Redis
    budget: Budget
    mutex: Mutex
    vault: Vault
    providers: Mapping[str, Provider]
    clock: Callable[[], datetime] = utc_now

    def enabled(self) -> dict[str, Provider]:
        """The providers that are switched on, by name."""
        on = self.settings.providers
        return {name: each for name, each in self.providers.items() if name in on and on[name].enabled}

    def applications(self) -> list[Application]:
        """Those of the providers that are switched on, the main one of each first."""
        found = []
        for name, provider in self.enabled().items():
            settings = self.settings.providers[name]
            every = (settings.of(each) for each in (MAIN, *settings.applications))
            found += [Application(provider, each) for each in every if each is not None]
        return found

    def application(self, provider: str, name: str = MAIN) -> Application:
        """Whoever works for a connection, or at a provider, asks here for the client id and all that is its.

        Raises `Unavailable` when there is none in the settings: what is its waits until it is back.
        """
        about, settings = self.providers.get(provider), self.settings.providers.get(provider)
        mine = settings and settings.of(name)
        if about is None or mine is None:
            raise Unavailable(f"its application, {path_of(provider, name)}, is not in the settings")
        return Application(about, mine)

    def close(self) -> None:
        self.store.close()
        self.redis.close()


def build(settings: Settings) -> Runtime:
    """Connect everything that `settings` name.

    Where none is named, starts the embedded Redis and brings SQLite in `var/` to the tables of this version.
    Raises `SettingsError` as `checked`.
    """
    checked(settings)
    url = embedded.redis_url(settings)
    client = redis_url.client(url, timeout=10, connect_timeout=5)
    store = Store(database_url(settings))
    if not settings.database.url:
        from lifelogger.store import migrate  # Alembic takes a fifth of a second to import

        migrate.upgrade(store)
    return Runtime(
        settings=settings,
        store=store,
        redis=client,
        budget=Budget(url, prefix=settings.redis.prefix),
        mutex=Mutex(client, ttl=settings.sync.lock_seconds, prefix=settings.redis.prefix),
        vault=Vault.of(settings),
        providers=registry(),
    )


def database_url(settings: Settings) -> str:
    """The database in force: the one named, or SQLite in `var/`."""
    return settings.database.url or f"sqlite:///{settings.var / 'lifelogger.db'}"


@cache
def runtime() -> Runtime:
    """The runtime of this process."""
    return build(get_settings())
