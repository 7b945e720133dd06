"""The Dramatiq actors: what the `dramatiq` command line loads. All logic is in the library."""

from actors.notify import deliver_changes
from actors.sync import plan_again, sync_user_data, sync_user_now

__all__ = ["deliver_changes", "plan_again", "sync_user_data", "sync_user_now"]
