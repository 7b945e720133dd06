"""Where in a stream a webhook's news is: which items, and which time."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Never as a batch on SQLite: making the table anew deletes all that hangs on it.
    op.add_column("connections", sa.Column("news_about", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("connections", "news_about")
