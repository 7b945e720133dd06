"""One user's sync as one writes it with SQLAlchemy's ORM: the same for Celery and plain Dramatiq.

As the documentation of SQLAlchemy has it: an engine per process, a session per task, what is there is
selected and what is new is added, a commit per page.
"""

from __future__ import annotations

from datetime import date, datetime, timedelta
from functools import cache
from typing import Any

import plain
from sqlalchemy import BigInteger, Engine, FetchedValue, ForeignKey, create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column


class Base(DeclarativeBase):
    pass


class Integration(Base):
    __tablename__ = "connections"

    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[str]
    access_token: Mapped[bytes]
    last_sync_at: Mapped[datetime | None]
    next_sync_at: Mapped[datetime | None]
    updated_at: Mapped[datetime]


class Stream(Base):
    __tablename__ = "streams"

    id: Mapped[int] = mapped_column(primary_key=True)
    connection_id: Mapped[int] = mapped_column(ForeignKey("connections.id"))
    name: Mapped[str]
    cursor: Mapped[datetime | None]


class Activity(Base):
    __tablename__ = "records"

    id: Mapped[int] = mapped_column(primary_key=True)
    connection_id: Mapped[int] = mapped_column(ForeignKey("connections.id"))
    stream: Mapped[str]
    external_id: Mapped[str]
    kind: Mapped[str]
    ordered_at: Mapped[datetime]
    start_at: Mapped[datetime | None]
    end_at: Mapped[datetime | None]
    utc_offset_s: Mapped[int | None]
    local_date: Mapped[date | None]
    type: Mapped[str | None]
    provider_type: Mapped[str | None]
    title: Mapped[str | None]
    duration_s: Mapped[float | None]
    moving_s: Mapped[float | None]
    distance_m: Mapped[float | None]
    elevation_gain_m: Mapped[float | None]
    heart_rate_avg_bpm: Mapped[float | None]
    heart_rate_max_bpm: Mapped[float | None]
    raw: Mapped[str | None]
    digest: Mapped[str | None]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    change: Mapped[int] = mapped_column(BigInteger, server_default=FetchedValue())

    __mapper_args__ = {"eager_defaults": False}  # noqa: RUF012


class SyncLog(Base):
    __tablename__ = "sync_runs"

    id: Mapped[int] = mapped_column(primary_key=True)
    connection_id: Mapped[int] = mapped_column(ForeignKey("connections.id"))
    trigger: Mapped[str]
    outcome: Mapped[str]
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    requests: Mapped[int]
    inserted: Mapped[int]
    updated: Mapped[int]
    deleted: Mapped[int]
    quarantined: Mapped[int]


@cache
def engine() -> Engine:
    return create_engine(plain.DATABASE, pool_size=16)


def user_ids() -> list[str]:
    """Whose turn it is."""
    with Session(engine()) as session:
        due = select(Integration.user_id).where(Integration.next_sync_at <= plain.now())
        return list(session.scalars(due))


def sync(user_id: str) -> None:
    began, requests, inserted, updated = plain.now(), 0, 0, 0
    with Session(engine()) as session:
        integration = session.scalars(select(Integration).where(Integration.user_id == user_id)).one()
        stream = session.scalars(select(Stream).where(Stream.connection_id == integration.id)).one_or_none()
        if stream is None:
            stream = Stream(connection_id=integration.id, name="activities")
            session.add(stream)
        for page in plain.pages(integration.access_token.decode(), stream.cursor):
            requests += 1
            rows = [plain.columns(each) for each in page]
            known = known_of(session, integration.id, [row["external_id"] for row in rows])
            for row in rows:
                activity = known.get(row["external_id"])
                if activity is None:
                    session.add(
                        Activity(
                            connection_id=integration.id,
                            stream="activities",
                            created_at=began,
                            updated_at=began,
                            **row,
                        )
                    )
                    inserted += 1
                elif activity.digest != row["digest"]:
                    for name, value in row.items():
                        setattr(activity, name, value)
                    activity.updated_at = began
                    updated += 1
            stream.cursor = began
            session.commit()
        now = plain.now()
        integration.last_sync_at = integration.updated_at = now
        integration.next_sync_at = now + timedelta(minutes=15)
        session.add(
            SyncLog(
                connection_id=integration.id,
                trigger="tick",
                outcome="ok",
                started_at=began,
                ended_at=now,
                requests=requests,
                inserted=inserted,
                updated=updated,
                deleted=0,
                quarantined=0,
            )
        )
        session.commit()


def known_of(session: Session, connection_id: int, keys: list[str]) -> dict[str, Any]:
    found = select(Activity).where(
        Activity.connection_id == connection_id,
        Activity.stream == "activities",
        Activity.external_id.in_(keys),
    )
    return {activity.external_id: activity for activity in session.scalars(found)}
