"""Google's discovery document (tests/specs) as a referee: of requests, and with JSON schema of replies."""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from jsonschema import Draft202012Validator

FILE = Path(__file__).parent.parent / "specs" / "google-health.v4.discovery.json"
FORMATS = {
    "int64": r"^-?[0-9]{1,19}$",
    "google-datetime": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)$",
    "google-duration": r"^-?[0-9]+(\.[0-9]{1,9})?s$",
    "google-fieldmask": r".*",
    "byte": r".*",
}
"""What a string of a format looks like: JSON schema does not know Google's."""


class Spec:
    """The specification; read on first use."""

    @cached_property
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
        return found

    @cached_property
    def schemas(self) -> dict[str, Any]:
        return {name: strict(schema) for name, schema in self.document["schemas"].items()}

    @cached_property
    def methods(self) -> list[tuple[str, re.Pattern[str], dict[str, Any]]]:
        """Of what concerns users: verb, path, and the method's own words."""
        return list(self._methods(self.document["resources"]["users"]))

    def method(self, verb: str, path: str) -> dict[str, Any] | None:
        fits = (about for word, pattern, about in self.methods if word == verb and pattern.fullmatch(path))
        return next(fits, None)

    def refuses(self, verb: str, address: str) -> str | None:
        """Why a request is none of the specification's; None: it is."""
        path, query = urlsplit(address).path, dict(parse_qsl(urlsplit(address).query))
        about = self.method(verb, path)
        if about is None:
            return f"no such method: {verb} {path}"
        known = {name for name, each in about["parameters"].items() if each["location"] == "query"}
        strange = query.keys() - known - self.document["parameters"].keys()
        return f"no such parameter: {', '.join(sorted(strange))}" if strange else None

    def faults(self, schema: str, value: Any) -> list[str]:
        """What is wrong with a value of a schema, in words."""
        root = {"$ref": f"#/$defs/{schema}", "$defs": self.schemas}
        return [
            f"{error.json_path}: {error.message}" for error in Draft202012Validator(root).iter_errors(value)
        ]

    def _methods(self, resource: dict[str, Any]) -> Any:
        for about in resource.get("methods", {}).values():
            pattern = re.sub(r"\\\{\w+\\\}", r"[^/:]+", re.escape(f"/{about['flatPath']}"))
            yield about["httpMethod"], re.compile(pattern), about
        for below in resource.get("resources", {}).values():
            yield from self._methods(below)


def strict(schema: Any) -> Any:
    """A schema of the discovery document as JSON schema: nothing that it does not name, and formats checked.

    Only an `Optional.` that is not there goes without saying: what it calls `Required.` must be there.
    """
    if "$ref" in schema:
        return {"$ref": f"#/$defs/{schema['$ref']}"}
    found = {name: schema[name] for name in ("type", "enum", "minimum", "maximum") if name in schema}
    if found.get("type") == "any":
        del found["type"]
    if schema.get("type") == "string" and "format" in schema:
        found["pattern"] = FORMATS[schema["format"]]
    if "items" in schema:
        found["items"] = strict(schema["items"])
    if "properties" in schema:
        found["properties"] = {name: strict(each) for name, each in schema["properties"].items()}
        found["required"] = [
            name
            for name, each in schema["properties"].items()
            if each.get("description", "").startswith("Required.")
        ]
        found["additionalProperties"] = False
    elif "additionalProperties" in schema:
        found["additionalProperties"] = strict(schema["additionalProperties"])
    return found


spec = Spec()
