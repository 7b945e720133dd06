"""Leaving: receipts, and what is still to be revoked at providers. Who was told to sign in again."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

Key = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Instant = sa.DateTime(timezone=True)
UNTOLD = sa.text("status = 'needs_reauth' AND told_at IS NULL")


def upgrade() -> None:
    op.create_table(
        "receipts",
        sa.Column("id", Key, nullable=False),
        sa.Column("number", sa.String(length=40), nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("provider", sa.String(length=50), nullable=True),
        sa.Column("deleted", sa.Text(), nullable=False),
        sa.Column("revocation", sa.String(length=20), nullable=True),
        sa.Column("created_at", Instant, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_receipts")),
    )
    op.create_index("ix_receipts_number", "receipts", ["number"])
    op.create_table(
        "revocations",
        sa.Column("id", Key, nullable=False),
        sa.Column("receipt_id", Key, nullable=False),
        sa.Column("provider", sa.String(length=50), nullable=False),
        sa.Column("connection_id", sa.BigInteger(), nullable=False),
        sa.Column("access_token", sa.LargeBinary(), nullable=False),
        sa.Column("refresh_token", sa.LargeBinary(), nullable=True),
        sa.Column("token_expires_at", Instant, nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_attempt_at", Instant, nullable=False),
        sa.Column("created_at", Instant, nullable=False),
        sa.ForeignKeyConstraint(
            ["receipt_id"], ["receipts.id"], name=op.f("fk_revocations_receipt_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_revocations")),
    )
    op.create_index("ix_revocations_next_attempt_at", "revocations", ["next_attempt_at"])
    # Not in a batch: that would make the table anew, and dropping the old one deletes all that hangs on it.
    op.add_column("connections", sa.Column("told_at", Instant, nullable=True))
    op.create_index(
        "ix_connections_untold", "connections", ["id"], sqlite_where=UNTOLD, postgresql_where=UNTOLD
    )


def downgrade() -> None:
    op.drop_index("ix_connections_untold", "connections")
    op.drop_column("connections", "told_at")
    op.drop_table("revocations")
    op.drop_table("receipts")
