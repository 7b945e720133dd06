"""The read side: change numbers and marks of erasures, records by their time, API keys, endpoints."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

Instant = sa.DateTime(timezone=True)
Key = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    with op.batch_alter_table("records") as table:
        table.add_column(sa.Column("change", sa.BigInteger(), nullable=True))
    # Who reads from the beginning gets what was there in the order in which it came.
    op.execute("UPDATE records SET change = id")
    with op.batch_alter_table("records") as table:
        table.alter_column("change", nullable=False)
        table.create_index("ix_records_change", ["change"], unique=True)
        table.drop_index("ix_records_kind")
        table.create_index("ix_records_kind", ["connection_id", "kind", "ordered_at"])
        table.create_index("ix_records_time", ["connection_id", "ordered_at"])
    op.create_table(
        "feed",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("newest", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_feed")),
    )
    op.execute("INSERT INTO feed (id, newest) SELECT 1, coalesce(max(change), 0) FROM records")
    op.create_table(
        "erasures",
        sa.Column("change", Key, autoincrement=False, nullable=False),
        sa.Column("user_id", sa.String(length=200), nullable=False),
        sa.Column("provider", sa.String(length=50), nullable=True),
        sa.Column("erased_at", Instant, nullable=False),
        sa.PrimaryKeyConstraint("change", name=op.f("pk_erasures")),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", Key, nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("user_id", sa.String(length=200), nullable=True),
        sa.Column("created_at", Instant, nullable=False),
        sa.Column("last_used_at", Instant, nullable=True),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name=op.f("fk_api_keys_user_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("digest", name=op.f("uq_api_keys_digest")),
        sa.UniqueConstraint("name", name=op.f("uq_api_keys_name")),
    )
    op.create_table(
        "endpoints",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("cursor", sa.BigInteger(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("next_try_at", Instant, nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("delivered_at", Instant, nullable=True),
        sa.Column("created_at", Instant, nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_endpoints")),
    )


def downgrade() -> None:
    op.drop_table("endpoints")
    op.drop_table("api_keys")
    op.drop_table("erasures")
    op.drop_table("feed")
    with op.batch_alter_table("records") as table:
        table.drop_index("ix_records_change")
        table.drop_index("ix_records_time")
        table.drop_index("ix_records_kind")
        table.create_index("ix_records_kind", ["connection_id", "kind", "start_at"])
        table.drop_column("change")
