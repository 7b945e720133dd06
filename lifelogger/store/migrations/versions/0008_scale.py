"""What a large store needs: counts that are kept, and an index for each periodic question about all."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

Instant = sa.DateTime(timezone=True)
ACTIVE = sa.text("status = 'active'")
DELETED = sa.text("deleted_at IS NOT NULL")
LEFT = sa.text("status = 'needs_reauth' AND deauthorised_at IS NOT NULL")


def upgrade() -> None:
    op.create_table(
        "counts",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("counted_at", Instant, nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_counts"),
    )
    op.create_index(
        "ix_connections_deauthorised", "connections", ["id"], sqlite_where=LEFT, postgresql_where=LEFT
    )
    # Each provider's own: else a provider without any would read those of all others.
    op.create_index(
        "ix_connections_expires",
        "connections",
        ["provider", "token_expires_at"],
        sqlite_where=ACTIVE,
        postgresql_where=ACTIVE,
    )
    op.drop_index("ix_connections_expiring", "connections")
    op.create_index(
        "ix_records_deleted", "records", ["connection_id"], sqlite_where=DELETED, postgresql_where=DELETED
    )
    op.create_index("ix_erasures_erased_at", "erasures", ["erased_at"])
    op.create_index("ix_ticks_fired_at", "ticks", ["fired_at"])


def downgrade() -> None:
    op.drop_index("ix_ticks_fired_at", "ticks")
    op.drop_index("ix_erasures_erased_at", "erasures")
    op.drop_index("ix_records_deleted", "records")
    op.create_index(
        "ix_connections_expiring",
        "connections",
        ["token_expires_at"],
        sqlite_where=ACTIVE,
        postgresql_where=ACTIVE,
    )
    op.drop_index("ix_connections_expires", "connections")
    op.drop_index("ix_connections_deauthorised", "connections")
    op.drop_table("counts")
