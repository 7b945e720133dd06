"""What the URL of a Redis means: every client is made here. Valkey is spoken to in the same way.

    redis://[USER:PASSWORD@]HOST[:PORT][/DATABASE][?OPTIONS]     rediss:// with TLS
    unix:///PATH?db=DATABASE                                     a socket on this machine
    redis+sentinel://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]…]/SERVICE[/DATABASE][?OPTIONS]
                                                                 rediss+sentinel:// with TLS

Options are those of redis-py (`ssl_ca_certs`, `ssl_certfile`, …). Of the hosts with Sentinel one has to
answer; they tell who is the master now, and are asked again when it has changed. User and password are
those of the Redis servers: Sentinels that want some get `sentinel_username` and `sentinel_password`.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import redis
from redis.connection import parse_url
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool

SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")
SENTINEL_PORT = 26379


def client(url: str, *, timeout: float, connect_timeout: float, retry: Retry | None = None) -> redis.Redis:
    """A client of its own, as `pool`."""
    return redis.Redis.from_pool(pool(url, timeout=timeout, connect_timeout=connect_timeout, retry=retry))


def pool(
    url: str, *, timeout: float, connect_timeout: float, retry: Retry | None = None
) -> redis.ConnectionPool:
    """Connections to the Redis that an URL names; nobody is asked yet.

    Times are in seconds: until an answer, and until somebody is reached. Without `retry` each command is
    tried once. Raises `ValueError` when the URL cannot be read.
    """
    waits: dict[str, Any] = {"socket_timeout": timeout, "socket_connect_timeout": connect_timeout}
    if not _is_sentinel(url):
        return redis.ConnectionPool.from_url(url, retry=retry, **waits)
    hosts = [parse_url(host) for host in each(url)]  # type: ignore[no-untyped-call]
    addresses = [(host.pop("host"), host.pop("port")) for host in hosts]
    options = hosts[0]  # of each the same, but for the address
    tls = options.pop("connection_class", None) is not None
    certificates = {key: value for key, value in options.items() if key.startswith("ssl_")}
    login = {key: options.pop(f"sentinel_{key}", None) for key in ("username", "password")}
    manager = Sentinel(  # type: ignore[no-untyped-call]
        addresses, sentinel_kwargs={**waits, **certificates, **login, "ssl": tls}
    )
    return SentinelConnectionPool(  # type: ignore[no-untyped-call]
        _service(url), manager, ssl=tls, retry=retry, **waits, **options
    )


def each(url: str) -> list[str]:
    """A URL for each host that `url` names, with its database and options. Raises `ValueError`."""
    if not _is_sentinel(url):
        return [url]
    scheme, _, rest = url.partition("://")
    place, _, path = rest.partition("/")
    login, at, hosts = place.rpartition("@")
    path, _, options = path.partition("?")
    database = path.partition("/")[2] or "0"
    if not _service(url):
        raise ValueError("it names no service, as in redis+sentinel://HOST/SERVICE")
    found = []
    for host in hosts.split(","):
        parts = urlsplit(f"//{host}")
        if not parts.hostname:
            raise ValueError("it names a Sentinel without a host")
        port = "" if parts.port else f":{SENTINEL_PORT}"
        found.append(
            f"{scheme.lower().removesuffix('+sentinel')}://{login}{at}{host.rstrip(':')}{port}/{database}?{options}"
        )
    return found


def _is_sentinel(url: str) -> bool:
    return url.partition("://")[0].lower().endswith("+sentinel")


def _service(url: str) -> str:
    """The name under which Sentinels know the master."""
    return url.partition("://")[2].partition("/")[2].partition("?")[0].partition("/")[0]
