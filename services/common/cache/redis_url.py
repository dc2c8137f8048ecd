"""Where Redis is: `redis://[user:password@]host[:port][/database]`, `rediss://` for TLS.

The password is never shown: neither in an error, nor in a `repr`, nor as text.
"""

import re
from dataclasses import dataclass, field
from urllib.parse import SplitResult, unquote, urlsplit

DEFAULT_PORT = 6379


@dataclass(frozen=True)
class RedisUrl:
    """`str` of it is for people: without user and password."""

    host: str
    port: int
    database: int
    tls: bool
    user: str = field(repr=False)
    password: str = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> "RedisUrl":
        """Raises ValueError with a sentence that holds nothing of the text."""
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError:
            raise ValueError(
                "is not a URL: write redis://[user:password@]host[:port][/0]"
            ) from None
        if parts.scheme not in ("redis", "rediss"):
            raise ValueError("must begin with redis:// or, for TLS, rediss://")
        if not parts.hostname:
            raise ValueError("names no host: write redis://[user:password@]host[:port][/0]")
        if parts.query or parts.fragment:
            raise ValueError(
                "has a ? or # part, which is not read (in a password, write them as %3F and %23)"
            )
        return cls(
            host=parts.hostname,
            port=DEFAULT_PORT if port is None else port,
            database=_database(parts),
            tls=parts.scheme == "rediss",
            user=unquote(parts.username or ""),
            password=unquote(parts.password or ""),
        )

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        hidden = "***@" if self.user or self.password else ""
        scheme = "rediss" if self.tls else "redis"
        return f"{scheme}://{hidden}{host}:{self.port}/{self.database}"


def _database(parts: SplitResult) -> int:
    path = parts.path.strip("/")
    if not re.fullmatch(r"\d{0,4}", path, re.ASCII):
        raise ValueError("must end in the number of a database, such as /0, or in nothing")
    return int(path or 0)
