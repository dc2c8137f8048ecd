"""Replies of language models that were paid for, on disk: no question is paid for twice.

A row is the hash of endpoint, model and question, and the compressed reply; neither the question
nor who asked is in it. When there is more than there may be, the oldest go.
"""

import sqlite3
import time
import zlib

from services.explainer.database import Database


class ReplyStore:
    """The engine's `ResponseCache` in a database, at most `most_bytes` of replies."""

    def __init__(self, database: Database, most_bytes: int) -> None:
        self._database = database
        self._most = most_bytes
        self._size: int | None = None

    async def get(self, key: str) -> str | None:
        def work(connection: sqlite3.Connection) -> str | None:
            row = connection.execute("SELECT value FROM reply WHERE key = ?", (key,)).fetchone()
            return None if row is None else zlib.decompress(row["value"]).decode()

        return await self._database.read(work)

    async def put(self, key: str, value: str) -> None:
        """Once begun it ends, whether or not its caller waits for it."""

        def work(connection: sqlite3.Connection) -> None:
            size, self._size = self._size, None
            if size is None:
                found = connection.execute("SELECT coalesce(sum(length(value)), 0) FROM reply")
                size = int(found.fetchone()[0])
            known = connection.execute("SELECT length(value) FROM reply WHERE key = ?", (key,))
            data = zlib.compress(value.encode())
            size += len(data) - sum(row[0] for row in known.fetchall())
            connection.execute(
                "INSERT OR REPLACE INTO reply VALUES (?, ?, ?)",
                (key, data, time.time_ns() // 1_000_000),
            )
            self._size = _without_the_oldest(connection, size, self._most)

        await self._database.write(work)


def _without_the_oldest(connection: sqlite3.Connection, size: int, most: int) -> int:
    """The size once what is beyond `most` bytes has gone."""
    while size > most:
        rows = connection.execute(
            "DELETE FROM reply WHERE key = (SELECT key FROM reply ORDER BY created_ms, key LIMIT 1)"
            " RETURNING length(value)"
        ).fetchall()
        if not rows:
            return 0
        size -= rows[0][0]
    return size
