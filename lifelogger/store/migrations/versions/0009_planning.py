"""Planning: what is learned of when a person's news come, and how a provider's requests are spent."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

Instant = sa.DateTime(timezone=True)


def upgrade() -> None:
    # Never as a batch on SQLite: making the table anew deletes all that hangs on it.
    op.add_column("connections", sa.Column("habits", sa.LargeBinary(), nullable=True))
    op.create_table(
        "paces",
        sa.Column("provider", sa.String(50), nullable=False),
        sa.Column("price", sa.Double(), nullable=False),
        sa.Column("rate", sa.Double(), nullable=False),
        sa.Column("hours", sa.Text(), nullable=True),
        sa.Column("curve", sa.Text(), nullable=True),
        sa.Column("wanted", sa.Double(), nullable=False),
        sa.Column("offered", sa.Double(), nullable=False),
        sa.Column("longest_s", sa.Double(), nullable=False),
        sa.Column("priced_at", Instant, nullable=True),
        sa.Column("heard_at", Instant, nullable=True),
        sa.Column("deaf", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("provider", name="pk_paces"),
    )


def downgrade() -> None:
    op.drop_table("paces")
    op.drop_column("connections", "habits")
