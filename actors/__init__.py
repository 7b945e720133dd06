"""The Dramatiq actors: what the `dramatiq` command line loads. All logic is in the library."""

from actors.sync import plan_again, sync_user_data, sync_user_now

__all__ = ["plan_again", "sync_user_data", "sync_user_now"]
