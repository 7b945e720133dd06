"""Sleep, days and body: the columns that activities do not have."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

COLUMNS: dict[str, Any] = {
    "steps": sa.Integer(),
    "active_energy_j": sa.Double(),
    "heart_rate_min_bpm": sa.Double(),
    "heart_rate_resting_bpm": sa.Double(),
    "hrv_rmssd_ms": sa.Double(),
    "spo2_avg_pct": sa.Double(),
    "breaths_per_min": sa.Double(),
    "score_pct": sa.Double(),
    "is_main_sleep": sa.Boolean(),
    "asleep_s": sa.Double(),
    "awake_s": sa.Double(),
    "light_sleep_s": sa.Double(),
    "deep_sleep_s": sa.Double(),
    "rem_sleep_s": sa.Double(),
    "weight_kg": sa.Double(),
}


def upgrade() -> None:
    with op.batch_alter_table("records") as table:
        for name, kind in COLUMNS.items():
            table.add_column(sa.Column(name, kind, nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("records") as table:
        for name in reversed(COLUMNS):
            table.drop_column(name)
