"""The first tables: users, connections, streams, records, quarantine, sync runs, ticks."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

Key = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Instant = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "ticks",
        sa.Column("name", sa.String(length=50), nullable=False),
        sa.Column("due_at", Instant, nullable=False),
        sa.Column("fired_at", Instant, nullable=False),
        sa.Column("planned", sa.Integer(), nullable=True),
        sa.PrimaryKeyConstraint("name", "due_at", name=op.f("pk_ticks")),
    )
    op.create_table(
        "users",
        sa.Column("id", sa.String(length=200), nullable=False),
        sa.Column("created_at", Instant, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_users")),
    )
    op.create_table(
        "connections",
        sa.Column("id", Key, nullable=False),
        sa.Column("user_id", sa.String(length=200), nullable=False),
        sa.Column("provider", sa.String(length=50), nullable=False),
        sa.Column("provider_user_id", sa.String(length=200), nullable=True),
        sa.Column("status", sa.String(length=20), nullable=False),
        sa.Column("status_reason", sa.Text(), nullable=True),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("access_token", sa.LargeBinary(), nullable=False),
        sa.Column("refresh_token", sa.LargeBinary(), nullable=True),
        sa.Column("token_expires_at", Instant, nullable=False),
        sa.Column("refreshing_until", Instant, nullable=True),
        sa.Column("next_sync_at", Instant, nullable=True),
        sa.Column("claimed_at", Instant, nullable=True),
        sa.Column("news_at", Instant, nullable=True),
        sa.Column("wait_reason", sa.Text(), nullable=True),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("last_sync_at", Instant, nullable=True),
        sa.Column("created_at", Instant, nullable=False),
        sa.Column("updated_at", Instant, nullable=False),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name=op.f("fk_connections_user_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_connections")),
        sa.UniqueConstraint(
            "provider", "provider_user_id", name=op.f("uq_connections_provider_provider_user_id")
        ),
        sa.UniqueConstraint("user_id", "provider", name=op.f("uq_connections_user_id_provider")),
    )
    with op.batch_alter_table("connections", schema=None) as batch_op:
        batch_op.create_index(
            "ix_connections_claimed",
            ["provider", "claimed_at"],
            unique=False,
            sqlite_where=sa.text("claimed_at IS NOT NULL"),
            postgresql_where=sa.text("claimed_at IS NOT NULL"),
        )
        batch_op.create_index(
            "ix_connections_due",
            ["provider", "next_sync_at"],
            unique=False,
            sqlite_where=sa.text("next_sync_at IS NOT NULL AND news_at IS NULL"),
            postgresql_where=sa.text("next_sync_at IS NOT NULL AND news_at IS NULL"),
        )
        batch_op.create_index(
            "ix_connections_expiring",
            ["token_expires_at"],
            unique=False,
            sqlite_where=sa.text("status = 'active'"),
            postgresql_where=sa.text("status = 'active'"),
        )
        batch_op.create_index(
            "ix_connections_news",
            ["provider", "next_sync_at"],
            unique=False,
            sqlite_where=sa.text("next_sync_at IS NOT NULL AND news_at IS NOT NULL"),
            postgresql_where=sa.text("next_sync_at IS NOT NULL AND news_at IS NOT NULL"),
        )

    op.create_table(
        "quarantine",
        sa.Column("id", Key, nullable=False),
        sa.Column("connection_id", Key, nullable=False),
        sa.Column("stream", sa.String(length=50), nullable=False),
        sa.Column("external_id", sa.String(length=200), nullable=True),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("payload", sa.Text(), nullable=False),
        sa.Column("created_at", Instant, nullable=False),
        sa.ForeignKeyConstraint(
            ["connection_id"],
            ["connections.id"],
            name=op.f("fk_quarantine_connection_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_quarantine")),
        sa.UniqueConstraint(
            "connection_id", "stream", "digest", name=op.f("uq_quarantine_connection_id_stream_digest")
        ),
    )
    op.create_table(
        "records",
        sa.Column("id", Key, nullable=False),
        sa.Column("connection_id", Key, nullable=False),
        sa.Column("stream", sa.String(length=50), nullable=False),
        sa.Column("external_id", sa.String(length=200), nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("ordered_at", Instant, nullable=False),
        sa.Column("start_at", Instant, nullable=True),
        sa.Column("end_at", Instant, nullable=True),
        sa.Column("utc_offset_s", sa.Integer(), nullable=True),
        sa.Column("local_date", sa.Date(), nullable=True),
        sa.Column("type", sa.String(length=50), nullable=True),
        sa.Column("provider_type", sa.Text(), nullable=True),
        sa.Column("title", sa.Text(), nullable=True),
        sa.Column("duration_s", sa.Double(), nullable=True),
        sa.Column("moving_s", sa.Double(), nullable=True),
        sa.Column("distance_m", sa.Double(), nullable=True),
        sa.Column("elevation_gain_m", sa.Double(), nullable=True),
        sa.Column("energy_j", sa.Double(), nullable=True),
        sa.Column("work_j", sa.Double(), nullable=True),
        sa.Column("heart_rate_avg_bpm", sa.Double(), nullable=True),
        sa.Column("heart_rate_max_bpm", sa.Double(), nullable=True),
        sa.Column("raw", sa.Text(), nullable=True),
        sa.Column("digest", sa.String(length=64), nullable=True),
        sa.Column("deleted_at", Instant, nullable=True),
        sa.Column("created_at", Instant, nullable=False),
        sa.Column("updated_at", Instant, nullable=False),
        sa.ForeignKeyConstraint(
            ["connection_id"], ["connections.id"], name=op.f("fk_records_connection_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_records")),
        sa.UniqueConstraint(
            "connection_id", "stream", "external_id", name=op.f("uq_records_connection_id_stream_external_id")
        ),
    )
    with op.batch_alter_table("records", schema=None) as batch_op:
        batch_op.create_index("ix_records_kind", ["connection_id", "kind", "start_at"], unique=False)
        batch_op.create_index("ix_records_order", ["connection_id", "stream", "ordered_at"], unique=False)

    op.create_table(
        "streams",
        sa.Column("id", Key, nullable=False),
        sa.Column("connection_id", Key, nullable=False),
        sa.Column("name", sa.String(length=50), nullable=False),
        sa.Column("off_reason", sa.Text(), nullable=True),
        sa.Column("off_until", Instant, nullable=True),
        sa.Column("cursor", Instant, nullable=True),
        sa.Column("backlog_since", Instant, nullable=True),
        sa.Column("backlog_until", Instant, nullable=True),
        sa.Column("ended_at", Instant, nullable=True),
        sa.ForeignKeyConstraint(
            ["connection_id"], ["connections.id"], name=op.f("fk_streams_connection_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_streams")),
        sa.UniqueConstraint("connection_id", "name", name=op.f("uq_streams_connection_id_name")),
    )
    op.create_table(
        "sync_runs",
        sa.Column("id", Key, nullable=False),
        sa.Column("connection_id", Key, nullable=False),
        sa.Column("trigger", sa.String(length=20), nullable=False),
        sa.Column("started_at", Instant, nullable=False),
        sa.Column("ended_at", Instant, nullable=True),
        sa.Column("outcome", sa.String(length=20), nullable=False),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("requests", sa.Integer(), nullable=False),
        sa.Column("inserted", sa.Integer(), nullable=False),
        sa.Column("updated", sa.Integer(), nullable=False),
        sa.Column("deleted", sa.Integer(), nullable=False),
        sa.Column("quarantined", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["connection_id"], ["connections.id"], name=op.f("fk_sync_runs_connection_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sync_runs")),
    )
    with op.batch_alter_table("sync_runs", schema=None) as batch_op:
        batch_op.create_index("ix_sync_runs_connection", ["connection_id", "id"], unique=False)
        batch_op.create_index("ix_sync_runs_started", ["started_at"], unique=False)


def downgrade() -> None:
    with op.batch_alter_table("sync_runs", schema=None) as batch_op:
        batch_op.drop_index("ix_sync_runs_started")
        batch_op.drop_index("ix_sync_runs_connection")

    op.drop_table("sync_runs")
    op.drop_table("streams")
    with op.batch_alter_table("records", schema=None) as batch_op:
        batch_op.drop_index("ix_records_order")
        batch_op.drop_index("ix_records_kind")

    op.drop_table("records")
    op.drop_table("quarantine")
    with op.batch_alter_table("connections", schema=None) as batch_op:
        batch_op.drop_index(
            "ix_connections_news",
            sqlite_where=sa.text("next_sync_at IS NOT NULL AND news_at IS NOT NULL"),
            postgresql_where=sa.text("next_sync_at IS NOT NULL AND news_at IS NOT NULL"),
        )
        batch_op.drop_index(
            "ix_connections_expiring",
            sqlite_where=sa.text("status = 'active'"),
            postgresql_where=sa.text("status = 'active'"),
        )
        batch_op.drop_index(
            "ix_connections_due",
            sqlite_where=sa.text("next_sync_at IS NOT NULL AND news_at IS NULL"),
            postgresql_where=sa.text("next_sync_at IS NOT NULL AND news_at IS NULL"),
        )
        batch_op.drop_index(
            "ix_connections_claimed",
            sqlite_where=sa.text("claimed_at IS NOT NULL"),
            postgresql_where=sa.text("claimed_at IS NOT NULL"),
        )

    op.drop_table("connections")
    op.drop_table("users")
    op.drop_table("ticks")
