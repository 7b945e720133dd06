"""The providers there are: the modules of this folder, and what other packages register.

A module of this folder brings one subclass of `Provider`; another package names its own under the
entry point group `lifelogger.providers`. Nothing here knows any of them by name.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from importlib.metadata import entry_points

from lifelogger.providers.base import Provider

GROUP = "lifelogger.providers"


@cache
def registry() -> dict[str, Provider]:
    """All providers by name, sorted; the first call imports their modules."""
    found: dict[str, Provider] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name != "base":
            found.update({each.name: each for each in providers_of(f"{__name__}.{module.name}")})
    for entry in entry_points(group=GROUP):
        provider = entry.load()()
        found[provider.name] = provider
    return dict(sorted(found.items()))


def providers_of(module: str) -> list[Provider]:
    """One object of each concrete provider that a module defines."""
    members = vars(importlib.import_module(module)).values()
    classes = [each for each in members if inspect.isclass(each) and issubclass(each, Provider)]
    return [each() for each in classes if each.__module__ == module and not inspect.isabstract(each)]
