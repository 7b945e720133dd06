"""Old edits and deletions: how far each stream's round over its past is, and how long rounds take."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

Instant = sa.DateTime(timezone=True)
STREAMS = ("recheck_at", "recheck_until", "recheck_began_at", "recheck_ended_at")


def upgrade() -> None:
    for name in STREAMS:
        op.add_column("streams", sa.Column(name, Instant, nullable=True))
    op.add_column("paces", sa.Column("connections", sa.Double(), nullable=False, server_default="0"))
    op.add_column("paces", sa.Column("recheck_s", sa.Double(), nullable=True))
    op.add_column("paces", sa.Column("recheck_at", Instant, nullable=True))


def downgrade() -> None:
    for name in ("recheck_at", "recheck_s", "connections"):
        op.drop_column("paces", name)
    for name in reversed(STREAMS):
        op.drop_column("streams", name)
