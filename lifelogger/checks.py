"""What of the settings only providers know, and settings themselves cannot check."""

from __future__ import annotations

import difflib

from lifelogger.errors import SettingsError
from lifelogger.providers import registry
from lifelogger.settings import Settings


def checked(settings: Settings) -> Settings:
    """These settings, once each stream that they name is found to exist.

    Here, and not where settings are read: only providers know their streams, and they may read settings.
    Raises `SettingsError`, whose message lists every fault, one a line.
    """
    faults = []
    for name, provider in registry().items():
        allowed = [stream.name for stream in provider.streams if stream.optional]
        for word in settings.providers[name].extra_streams if name in settings.providers else ():
            if word not in allowed:
                near = difflib.get_close_matches(word, allowed, n=1)
                faults.append(
                    f"providers.{name}.extra_streams = {word!r:.80}: "
                    + (f"must be one of {', '.join(allowed)}" if allowed else "must be empty: there is none")
                    + (f"; did you mean {near[0]}?" if near else "")
                )
    if faults:
        raise SettingsError("The settings are wrong:\n" + "\n".join(f"  {fault}" for fault in faults))
    return settings
