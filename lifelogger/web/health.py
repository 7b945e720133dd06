"""Whether the parts we need answer, told within seconds."""

from __future__ import annotations

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import select
from sqlalchemy.exc import InterfaceError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from lifelogger import embedded, redis_url
from lifelogger.runtime import Runtime
from lifelogger.store.models import User

DATABASE_TROUBLE = (OperationalError, InterfaceError, ProgrammingError, PoolTimeout)
"""What a database that is away, or has not our tables, raises."""
DATABASE_SENTENCE = (
    "The database does not answer, or has not the tables of this version (`lifelogger migrate` makes them). "
    "Syncs wait meanwhile and nothing is lost."
)
REDIS_SENTENCE = (
    "Redis does not answer. No sync can start and budgets cannot be told until it does; "
    "what is stored is safe, and the next tick goes on."
)
SECONDS = 1.0


class Health:
    """Asks Redis with a client of its own: the others are patient, a page is not."""

    def __init__(self, rt: Runtime) -> None:
        self._store = rt.store
        self._redis = redis_url.client(
            embedded.redis_url(rt.settings),
            timeout=SECONDS,
            connect_timeout=SECONDS,
            # Once more at once: a pooled connection may be from before a restart.
            retry=Retry(NoBackoff(), 1),
        )

    def redis(self) -> bool:
        """Whether Redis answers."""
        try:
            return bool(self._redis.ping())
        except redis.RedisError:
            return False

    def database(self) -> bool:
        """Whether the database answers, and has our tables."""
        try:
            with self._store.read() as db:
                db.execute(select(User.id).limit(1)).first()
        except DATABASE_TROUBLE:
            return False
        return True

    def failing(self) -> list[str]:
        """The parts that do not answer, by name."""
        return [part.__name__ for part in (self.database, self.redis) if not part()]
