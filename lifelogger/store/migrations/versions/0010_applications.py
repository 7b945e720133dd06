"""Applications: connections, budgets' prices and webhooks belong to one of a provider's client ids."""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

# What there is belongs to the application of the provider's own table.
MAIN = "main"
INDEXES = {
    "due": ("next_sync_at", "next_sync_at IS NOT NULL AND news_at IS NULL"),
    "news": ("next_sync_at", "next_sync_at IS NOT NULL AND news_at IS NOT NULL"),
    "claimed": ("claimed_at", "claimed_at IS NOT NULL"),
    "expires": ("token_expires_at", "status = 'active'"),
}
"""Of connections: the column that they are in the order of, and which are in it."""


def application() -> sa.Column[str]:
    return sa.Column("application", sa.String(50), nullable=False, server_default=MAIN)


def upgrade() -> None:
    # Never as a batch on SQLite: making the table anew deletes all that hangs on it.
    op.add_column("connections", application())
    op.add_column("revocations", application())
    order("provider", "application")
    for table in ("paces", "webhooks"):
        key(table, "provider", "application")


def downgrade() -> None:
    order("provider")
    for table in ("paces", "webhooks"):
        op.execute(f"DELETE FROM {table} WHERE application <> '{MAIN}'")
        key(table, "provider")
    op.drop_column("revocations", "application")
    op.drop_column("connections", "application")


def order(*whose: str) -> None:
    """Have the indexes of connections begin with these columns."""
    for name, (column, which) in INDEXES.items():
        op.drop_index(f"ix_connections_{name}", "connections")
        op.create_index(
            f"ix_connections_{name}",
            "connections",
            [*whose, column],
            sqlite_where=sa.text(which),
            postgresql_where=sa.text(which),
        )


def key(table: str, *columns: str) -> None:
    """Make a small table anew with this primary key, and put its rows back."""
    db = op.get_bind()
    old = sa.Table(table, sa.MetaData(), autoload_with=db)
    rows: Sequence[Any] = db.execute(sa.select(old)).mappings().all()
    op.drop_table(table)
    kept = [sa.Column(each.name, each.type, nullable=each.nullable) for each in old.columns]
    kept = [each for each in kept if each.name != "application"]
    added = [application()] if "application" in columns else []
    new = op.create_table(table, *kept, *added, sa.PrimaryKeyConstraint(*columns, name=f"pk_{table}"))
    op.bulk_insert(new, [{each.name: row[each.name] for each in kept} for row in rows])
