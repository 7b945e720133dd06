"""How far an import is, changes of a connection's status in the feed, and when a webhook last came."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

Instant = sa.DateTime(timezone=True)
UNNUMBERED = sa.text("status_at IS NOT NULL AND status_change IS NULL")
NUMBERED = sa.text("status_change IS NOT NULL")
UNREAD = sa.text("backlog_until IS NOT NULL")


def upgrade() -> None:
    # Never as a batch on SQLite: making the table anew deletes all that hangs on it.
    op.add_column("connections", sa.Column("status_at", Instant, nullable=True))
    op.add_column("connections", sa.Column("status_change", sa.BigInteger(), nullable=True))
    op.create_index(
        "ix_connections_unnumbered",
        "connections",
        ["id"],
        sqlite_where=UNNUMBERED,
        postgresql_where=UNNUMBERED,
    )
    op.create_index(
        "ix_connections_status_change",
        "connections",
        ["status_change"],
        unique=True,
        sqlite_where=NUMBERED,
        postgresql_where=NUMBERED,
    )
    op.create_index(
        "ix_streams_unread", "streams", ["connection_id"], sqlite_where=UNREAD, postgresql_where=UNREAD
    )
    op.add_column("sync_runs", sa.Column("history_s", sa.Double(), nullable=True))
    op.add_column("webhooks", sa.Column("heard_at", Instant, nullable=True))


def downgrade() -> None:
    op.drop_column("webhooks", "heard_at")
    op.drop_column("sync_runs", "history_s")
    op.drop_index("ix_streams_unread", "streams")
    op.drop_index("ix_connections_status_change", "connections")
    op.drop_index("ix_connections_unnumbered", "connections")
    op.drop_column("connections", "status_change")
    op.drop_column("connections", "status_at")
