"""Reading a model's reply: it says exactly what was asked for, or it is a counted failure.

`read` takes one JSON object and nothing around it but white space or one code fence. No search for
something that looks like JSON: a model that thinks aloud, or repeats a corpus text that looks like
an answer, is not an answer.
"""

import json
import math
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

Schema = Mapping[str, Any]

_FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n```", re.DOTALL)
_MAX_CHARACTERS = 200_000


class FailureKind(StrEnum):
    """Why a question has no answer."""

    REFUSED = "refused"
    TRUNCATED = "truncated"
    REJECTED = "rejected"
    MALFORMED = "malformed"
    UNAVAILABLE = "unavailable"
    TIMED_OUT = "timed_out"


class Malformed(Exception):
    """A reply that does not say what was asked for. The message never holds the reply's text."""


def read(text: str, schema: Schema) -> Any:
    """The value of a reply. Raises Malformed unless it is JSON of exactly this schema."""
    text = text.strip()
    if len(text) > _MAX_CHARACTERS:
        raise Malformed(f"{len(text)} characters")
    if fenced := _FENCE.fullmatch(text):
        text = fenced[1]
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON: {type(error).__name__}") from None
    _check(value, schema, "$")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Malformed("a key stands twice")
    return found


def _constant(name: str) -> float:
    raise Malformed(f"{name} is not JSON")


def _check(value: Any, schema: Schema, path: str) -> None:
    """Holds `value` to the part of JSON Schema that our schemas use."""
    match schema["type"]:
        case "object":
            if not isinstance(value, dict) or value.keys() != schema["properties"].keys():
                raise Malformed(f"{path} has other keys")
            for key, part in schema["properties"].items():
                _check(value[key], part, f"{path}.{key}")
        case "array":
            if not isinstance(value, list):
                raise Malformed(f"{path} is not a list")
            for number, item in enumerate(value):
                _check(item, schema["items"], f"{path}[{number}]")
        case "integer":
            if not isinstance(value, int) or isinstance(value, bool):
                raise Malformed(f"{path} is not an integer")
            low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
            if not low <= value <= high:
                raise Malformed(f"{path} is out of range")
        case "string":
            if not isinstance(value, str):
                raise Malformed(f"{path} is not a string")
        case other:
            raise AssertionError(f"no schema of ours has {other}")
