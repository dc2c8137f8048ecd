"""JSON as others have written it."""

import json
import re
from typing import Any

from services.common.errors import InvalidArgument

_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


def loads(content: bytes) -> Any:
    """The value. Half a character, which JSON can hold and text cannot, becomes U+FFFD.

    Raises InvalidArgument."""
    try:
        value = json.loads(content)
        if _HALF.search(content):
            text = json.dumps(value, ensure_ascii=False)
            value = json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except (ValueError, RecursionError):
        raise InvalidArgument("this is no JSON") from None
    return value
