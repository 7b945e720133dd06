"""Webhooks: what they hint at, what is subscribed to, which were taken; and when people asked last."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

Instant = sa.DateTime(timezone=True)


def upgrade() -> None:
    # Never as a batch on SQLite: making the table anew deletes all that hangs on it.
    op.add_column("connections", sa.Column("news_streams", sa.Text(), nullable=True))
    op.add_column("connections", sa.Column("hint_after", Instant, nullable=True))
    op.add_column("connections", sa.Column("deauthorised_at", Instant, nullable=True))
    op.add_column("users", sa.Column("asked_at", Instant, nullable=True))
    op.create_table(
        "webhooks",
        sa.Column("provider", sa.String(50), nullable=False),
        sa.Column("subscriptions", sa.Text(), nullable=False),
        sa.Column("keys", sa.Text(), nullable=True),
        sa.Column("checked_at", Instant, nullable=False),
        sa.Column("fault", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("provider", name="pk_webhooks"),
    )
    op.create_table(
        "webhook_calls",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("received_at", Instant, nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_webhook_calls"),
    )
    op.create_index("ix_webhook_calls_received", "webhook_calls", ["received_at"])
    op.create_index("ix_records_change_of", "records", ["connection_id", "change"])


def downgrade() -> None:
    op.drop_index("ix_records_change_of", "records")
    op.drop_table("webhook_calls")
    op.drop_table("webhooks")
    op.drop_column("users", "asked_at")
    for name in ("deauthorised_at", "hint_after", "news_streams"):
        op.drop_column("connections", name)
