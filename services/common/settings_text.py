"""The settings as people read them: `tdb config`, and docs/settings.md.

`python -m services.common.settings_text` writes the page anew; with `--check` it only says whether
that is due.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.common.settings import (
    DictionarySource,
    ImportSource,
    ModelSource,
    RemoteDataset,
    Secret,
    Settings,
    setting_fields,
)
from services.common.tokens import Tokens

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"

_HEAD = """\
# Settings

Every process reads its settings from environment variables when it starts. Flags of `tdb up` beat
their variable, which beats the default. `tdb config` prints the values in force. A value that
cannot be right stops the process with one sentence.

<!-- Written by `python -m services.common.settings_text`; edit services/common/settings.py. -->
"""


def as_lines(settings: Settings, env: Mapping[str, str]) -> list[str]:
    """One line per setting: `NAME=value`, and where the value comes from. Never a secret."""
    lines = []
    for field in setting_fields():
        variable = field.metadata["variable"]
        origin = "environment" if env.get(variable, "").strip() else "default"
        value = getattr(settings, field.name)
        if variable.endswith("_MIB") and isinstance(value, int):
            value //= 2**20  # kept in bytes
        lines.append(f"{variable}={_shown(value)}  # {origin}")
    return lines


def as_page() -> str:
    """The text of docs/settings.md."""
    parts = [_HEAD]
    for field in setting_fields():
        default = field.metadata["shown_default"]
        shown = f"`{default}`" if default else "empty"
        parts.append(f"## {field.metadata['variable']}\n")
        parts.append(f"{field.metadata['help']}\n\nDefault: {shown}.\n")
    return "\n".join(parts)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, Tokens):
        return f"(tokens of {', '.join(value.users)})" if value else ""
    if isinstance(value, Secret):
        return "(secret)" if value.value else ""
    if isinstance(value, tuple):
        return ",".join(_shown(item) for item in value)
    if isinstance(value, ModelSource):
        return f"{value.name}={value.source}"
    if isinstance(value, DictionarySource):
        return f"{value.name}={value.uri}" + (",unchecked" if value.unchecked else "")
    if isinstance(value, RemoteDataset):
        return f"{value.name}={value.shown}"
    if isinstance(value, ImportSource):
        return f"{value.name}={value.location}"
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)


def main() -> int:
    if "--check" not in sys.argv:
        PAGE.write_text(as_page())
    elif PAGE.read_text() != as_page():
        print(f"{PAGE} is behind: run python -m services.common.settings_text")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
