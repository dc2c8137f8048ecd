"""What no request may hold, checked by descriptor for any message.

protobuf accepts fields it does not know, enum numbers without a name, NaN and infinity. All three
would be ignored or computed with, and give a wrong answer to a question nobody asked. Here they
are refused with the path of the field. So are requests of more messages than any that can be
answered: looking at each would take seconds.
"""

import math
from collections.abc import Iterator

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from services.common.errors import InvalidArgument

MAX_MESSAGES = 250_000  # 100,000 selections of a range each are

# Integers, booleans, text and bytes are what they are; long lists of them are not walked.
_CHECKED = frozenset(
    {
        FieldDescriptor.CPPTYPE_MESSAGE,
        FieldDescriptor.CPPTYPE_ENUM,
        FieldDescriptor.CPPTYPE_DOUBLE,
        FieldDescriptor.CPPTYPE_FLOAT,
    }
)


def check(message: Message) -> None:
    """Raises InvalidArgument for the first thing in `message` that is not allowed."""
    _Check().message(message, "")


class _Check:
    def __init__(self) -> None:
        self._messages = 0

    def message(self, message: Message, path: str) -> None:
        self._messages += 1
        if self._messages > MAX_MESSAGES:
            raise InvalidArgument(
                f"the request has more than {MAX_MESSAGES:,} messages within; ask for less at a "
                "time",
                reason="TOO_LARGE",
            )
        unknown_fields = UnknownFieldSet(message)
        if len(unknown_fields):
            raise InvalidArgument(
                f"{message.DESCRIPTOR.full_name} has no field number "
                f"{unknown_fields[0].field_number}; is the client newer than the server?",
                field=path,
                reason="UNKNOWN_FIELD",
            )
        for field, value in message.ListFields():
            if field.cpp_type not in _CHECKED:
                continue
            name = f"{path}.{field.name}" if path else field.name
            for item_path, item_field, item in _items(field, value, name):
                if isinstance(item, Message):
                    self.message(item, item_path)
                else:
                    _check_value(item_field, item, item_path)


def _items(
    field: FieldDescriptor, value: object, path: str
) -> Iterator[tuple[str, FieldDescriptor, object]]:
    """The single values of a field: itself, or each one of a repeated field or map."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        entry = field.message_type.fields_by_name["value"]
        for key in value:  # type: ignore[attr-defined]
            yield f"{path}[{key!r}]", entry, value[key]  # type: ignore[index]
    elif field.is_repeated:
        for index, item in enumerate(value):  # type: ignore[arg-type, var-annotated]
            yield f"{path}[{index}]", field, item
    else:
        yield path, field, value


def _check_value(field: FieldDescriptor, value: object, path: str) -> None:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidArgument(
                f"{path} is {value}; it must be a finite number", field=path, reason="NON_FINITE"
            )
    elif field.enum_type is not None and value not in field.enum_type.values_by_number:
        raise InvalidArgument(
            f"{path} is {value}, which {field.enum_type.full_name} does not define",
            field=path,
            reason="UNKNOWN_ENUM_VALUE",
        )
