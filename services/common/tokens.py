"""Bearer tokens: who may call, and under which name.

A token list is `name:token` entries, in the setting itself (separated by commas or white space) or
in a file (one per line, `#` starts a comment). The name is the user that logs and the scheduler
know; a user may hold several tokens, so that one can be replaced without a gap. No token is ever
shown: neither in an error, nor in a `repr`.
"""

import hmac
import re
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]*\Z")
TOKEN = re.compile(r"[\x21-\x2b\x2d-\x7e]+\Z")  # visible ASCII without the comma
_BEARER = "bearer "


@dataclass(frozen=True, repr=False)
class Tokens:
    """The (user, token) pairs; empty means that no token is asked for."""

    pairs: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, value: str) -> "Tokens":
        """Reads a list or a file's path. Raises ValueError with a sentence that holds no token."""
        if not value.strip():
            return cls()
        path = Path(value.strip()).expanduser()
        if _is_file(path):
            lines = [line.partition("#")[0] for line in path.read_text().splitlines()]
            entries = [line.strip() for line in lines if line.strip()]
        elif ":" in value:
            entries = value.replace(",", " ").split()
        else:
            raise ValueError("is neither a list of name:token entries nor the path of a file")
        pairs: list[tuple[str, str]] = []
        for number, entry in enumerate(entries, start=1):
            name, _, token = entry.partition(":")
            if not _NAME.match(name) or not TOKEN.match(token):
                raise ValueError(f"has an entry that is not name:token (number {number})")
            if any(token == other for _, other in pairs):
                raise ValueError(f"gives the token of entry {number} twice")
            pairs.append((name, token))
        if not pairs:
            raise ValueError("names a file without any name:token entry")
        return cls(tuple(pairs))

    def __bool__(self) -> bool:
        return bool(self.pairs)

    def __repr__(self) -> str:
        return f"Tokens({', '.join(self.users)})"

    @property
    def users(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name, _ in self.pairs))

    def user_of(self, authorization: str) -> str | None:
        """The user of an `Authorization: Bearer ...` value; None when it is absent or wrong."""
        if authorization[: len(_BEARER)].lower() != _BEARER:
            return None
        given = authorization[len(_BEARER) :].strip().encode()
        user = None
        # No early exit: the time taken must not tell which token came close.
        for name, token in self.pairs:
            if hmac.compare_digest(given, token.encode()):
                user = name
        return user


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a long token list is not a legal file name
        return False
