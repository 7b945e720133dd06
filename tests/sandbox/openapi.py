"""Oura's OpenAPI document (tests/specs) as a referee: of requests, and with JSON schema of replies."""

from __future__ import annotations

import json
import re
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from jsonschema import Draft202012Validator, FormatChecker

FILE = Path(__file__).parent.parent / "specs" / "oura.openapi.json"
OPEN = "MultiDocumentResponseDict"
"""What replies with `fields` look like: any object. A reply without them shall be of its own schema."""

FORMATS = FormatChecker(formats=["date"])


@FORMATS.checks("date-time", raises=ValueError)
def is_date_time(value: object) -> bool:
    """RFC 3339, for which jsonschema wants another package."""
    return not isinstance(value, str) or ("T" in value and datetime.fromisoformat(value).tzinfo is not None)


class Spec:
    """The specification; read on first use."""

    @cached_property
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
        return found

    @cached_property
    def schemas(self) -> dict[str, Any]:
        """With objects closed: a field that is not in the document is a fault of the sandbox's."""
        return {name: closed(schema) for name, schema in self.document["components"]["schemas"].items()}

    def operation(self, verb: str, path: str) -> dict[str, Any] | None:
        for pattern, verbs in self.document["paths"].items():
            if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", pattern), path) and verb.lower() in verbs:
                found: dict[str, Any] = verbs[verb.lower()]
                return found
        return None

    def parameters(self, path: str) -> dict[str, Any]:
        """The parameters of a query, each with its schema."""
        operation = self.operation("GET", path) or {}
        return {
            each["name"]: each["schema"] for each in operation.get("parameters", []) if each["in"] == "query"
        }

    def refuses(self, verb: str, address: str) -> str | None:
        """Why a request is none of the specification's; None: it is."""
        path, query = urlsplit(address).path, dict(parse_qsl(urlsplit(address).query))
        if self.operation(verb, path) is None:
            return f"no such path: {verb} {path}"
        known = self.parameters(path)
        for name, value in query.items():
            if name not in known:
                return f"no such parameter: {name}"
            typed = {"true": True, "false": False}.get(value, value)
            if not Draft202012Validator(known[name], format_checker=FORMATS).is_valid(typed):
                return f"not a value of {name}: {value}"
        return None

    def faults(self, path: str, reply: Any, status: int = 200) -> list[str]:
        """What is wrong with a reply, in words."""
        return [
            f"{error.json_path}: {error.message}" for error in self.validator(path, status).iter_errors(reply)
        ]

    @cache  # noqa: B019  # there is one of it
    def validator(self, path: str, status: int) -> Draft202012Validator:
        operation = self.operation("GET", path)
        assert operation is not None
        schema = operation["responses"][str(status)]["content"]["application/json"]["schema"]
        own = [each for each in schema.get("anyOf", [schema]) if not each["$ref"].endswith(OPEN)]
        name = own[0]["$ref"].rpartition("/")[2]
        root = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": self.schemas}}
        return Draft202012Validator(root)


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    described = schema.get("type") == "object" and "properties" in schema
    return {**schema, "additionalProperties": False} if described else schema


SPEC = Spec()
