"""JSON text to messages and back, strictly.

The rules are proto3 JSON's: names in lowerCamelCase or as in the proto, enums by name, 64-bit
integers as strings, bytes in base64. What proto3 JSON or a JSON parser would let pass silently is
refused: unknown fields, a key twice, a field under both its names, two branches of a oneof, NaN and
infinity in any spelling. Every refusal names the field in proto names, which protobuf's own parser
does not do; so the tree is checked by descriptor first and converted afterwards. What a message can
hold all the same (NaN, an enum number without a name) the services refuse as well: `strict` says it
here too, so that a refusal reads the same over HTTP as over gRPC.
"""

import base64
import binascii
import json
import math
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from services.common import strict
from services.common.errors import InvalidArgument

_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_FLOATS = (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT)
_NON_FINITE = ("NaN", "Infinity", "-Infinity")  # proto3 JSON has them: `strict` refuses them


class _Object(dict[str, Any]):
    """A JSON object that remembers a key which stood in it twice."""

    repeated_key: str | None = None


def parse(body: bytes, kind: type[Message]) -> Message:
    """The message in `body`. Raises InvalidArgument with the field at fault."""
    try:
        tree = json.loads(body, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise InvalidArgument("the JSON is nested too deeply") from None
    except UnicodeDecodeError:
        raise InvalidArgument("the body is not UTF-8") from None
    except ValueError as error:  # its text quotes a position, never the body
        raise InvalidArgument(f"the body is not JSON: {error}") from None
    _check_message(_descriptor(kind), tree, "")
    try:
        message = json_format.ParseDict(tree, kind(), max_recursion_depth=100)
    except (json_format.ParseError, RecursionError):
        name = kind.DESCRIPTOR.full_name
        raise InvalidArgument(f"the body is not a {name} in proto3 JSON") from None
    strict.check(message)
    return message


def write(message: Message) -> bytes:
    """proto3 JSON with zeros written out, so that 0 and "not there" look different."""
    tree = json_format.MessageToDict(message, always_print_fields_with_no_presence=True)
    text = json.dumps(tree, ensure_ascii=False, separators=(",", ":"))
    return text.encode()


def _descriptor(kind: type[Message]) -> Descriptor:
    descriptor: Any = kind.DESCRIPTOR  # its stub unites the pure-Python and the C classes
    found: Descriptor = descriptor
    return found


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    made = _Object(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        made.repeated_key = next(key for key in keys if keys.count(key) > 1)
    return made


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _check_message(kind: Descriptor, tree: Any, path: str) -> None:
    if not isinstance(tree, _Object):
        raise _wrong(path, "must be an object", tree)
    if tree.repeated_key is not None:
        at = _join(path, tree.repeated_key)
        raise InvalidArgument(f"{at} is given twice", field=at, reason="REPEATED_KEY")
    fields = {field.json_name: field for field in kind.fields} | dict(kind.fields_by_name)
    seen: dict[str, str] = {}
    for key, value in tree.items():
        if key not in fields:
            at = _join(path, key)
            raise InvalidArgument(
                f"{kind.full_name} has no field {key!r}", field=at, reason="UNKNOWN_FIELD"
            )
        field = fields[key]
        at = _join(path, field.name)
        if value is None:  # proto3 JSON: the same as absent
            continue
        choice = field.containing_oneof
        slot = choice.name if choice is not None else field.name
        if slot in seen:
            raise InvalidArgument(
                f"{at} and {_join(path, seen[slot])} exclude each other"
                if seen[slot] != field.name
                else f"{at} is given twice",
                field=at,
                reason="REPEATED_KEY",
            )
        seen[slot] = field.name
        _check_field(field, value, at)


def _check_field(field: FieldDescriptor, value: Any, path: str) -> None:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        if not isinstance(value, _Object):
            raise _wrong(path, "must be an object", value)
        for key, item in value.items():
            _check_value(kind.fields_by_name["value"], item, f"{path}[{key!r}]")
    elif field.is_repeated:
        if not isinstance(value, list):
            raise _wrong(path, "must be a list", value)
        for index, item in enumerate(value):
            _check_value(field, item, f"{path}[{index}]")
    else:
        _check_value(field, value, path)


def _check_value(field: FieldDescriptor, value: Any, path: str) -> None:
    kind = field.cpp_type
    if field.message_type is not None:
        _check_message(field.message_type, value, path)
    elif field.enum_type is not None:
        if _is_int(value):
            _check_integer(value, path, *_INTEGERS[FieldDescriptor.CPPTYPE_INT32])
        elif not isinstance(value, str) or value not in field.enum_type.values_by_name:
            names = ", ".join(field.enum_type.values_by_name)
            raise _wrong(path, f"must be one of {names}", value)
    elif kind == FieldDescriptor.CPPTYPE_BOOL:
        if not isinstance(value, bool):
            raise _wrong(path, "must be true or false", value)
    elif kind in _INTEGERS:
        _check_integer(value, path, *_INTEGERS[kind])
    elif kind in _FLOATS:
        _check_float(value, path)
    elif not isinstance(value, str):
        raise _wrong(path, "must be a string", value)
    elif field.type == FieldDescriptor.TYPE_BYTES:
        _check_base64(value, path)
    else:
        _check_text(value, path)


def _check_integer(value: Any, path: str, least: int, most: int) -> None:
    number = value
    if isinstance(value, str) and value.removeprefix("-").isascii() and len(value) <= 20:
        number = int(value) if value.removeprefix("-").isdigit() else None
    elif isinstance(value, float) and value.is_integer():
        number = int(value)
    if not _is_int(number):
        raise _wrong(path, "must be a whole number", value)
    if not least <= number <= most:
        raise _wrong(path, f"must be a whole number from {least} to {most}", value)


def _is_int(value: Any) -> bool:
    """Whether `value` is an integer; to Python, true and false are too."""
    return isinstance(value, int) and not isinstance(value, bool)


def _check_float(value: Any, path: str) -> None:
    if value in _NON_FINITE:
        return
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise _wrong(path, "must be a number", value)
    try:
        finite = math.isfinite(number)
    except OverflowError:  # an integer beyond the largest double
        finite = False
    if not finite:
        raise InvalidArgument(f"{path} must be a finite number", field=path, reason="NON_FINITE")


def _check_base64(value: str, path: str) -> None:
    standard = value.replace("-", "+").replace("_", "/")
    try:
        base64.b64decode(standard + "=" * (-len(standard) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidArgument(f"{path} must be base64", field=path) from None


def _check_text(value: str, path: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"{path} holds half a surrogate pair", field=path) from None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _wrong(path: str, rule: str, value: Any) -> InvalidArgument:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    if value is None:
        what = "null"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        what = str(value)[:40]
    else:
        what = next(name for kind, name in kinds.items() if isinstance(value, kind))
    return InvalidArgument(f"{path or 'the body'} {rule}, not {what}", field=path)
