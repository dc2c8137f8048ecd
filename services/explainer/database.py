"""The SQLite file that holds explanations, scores, ratings, jobs and paid replies.

One writer at a time, any number of readers (write-ahead log). A change of the schema is one more
of `STEPS`, applied in order when the service starts, after the file was copied.
"""

import asyncio
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar

from services.common.errors import FailedPrecondition, ResourceExhausted

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]

ROOM_BYTES, DISK_BYTES = 2**20, 64 * 2**20
"""Left in the file, and on its disk, when work begins whose result is to be stored."""

STORE_FULL = "STORE_FULL"
BUSY_S = 10.0
"""How long a change waits for the one before it, another process's included."""

STEPS = (
    """
    CREATE TABLE explanation (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        model_id TEXT NOT NULL,
        weights_hash TEXT NOT NULL,
        -- Of a latent, the hash of its dictionary.
        dictionary_hash TEXT NOT NULL DEFAULT '',
        component TEXT NOT NULL,
        component_group TEXT NOT NULL,
        text TEXT NOT NULL,
        method TEXT NOT NULL,
        explainer_model TEXT NOT NULL,
        provider TEXT NOT NULL,
        prompt_hash TEXT NOT NULL,
        seed INTEGER,
        dataset TEXT NOT NULL,
        dataset_hash TEXT NOT NULL,
        code_version TEXT NOT NULL,
        author TEXT NOT NULL,
        based_on TEXT NOT NULL,
        published_method TEXT NOT NULL DEFAULT '',
        created_ms INTEGER NOT NULL,
        -- What makes it the same explanation when it comes again (an import, a job's component).
        source_key TEXT UNIQUE
    ) STRICT;
    -- All that choosing among explanations reads of them.
    CREATE INDEX explanation_of_component ON explanation (
        component, model_id, weights_hash, dictionary_hash, component_group, number, id, method,
        created_ms, based_on
    );
    CREATE INDEX explanation_searched
        ON explanation (model_id, component_group, method, weights_hash, dictionary_hash);
    CREATE TABLE explanation_document (
        explanation INTEGER NOT NULL REFERENCES explanation ON DELETE CASCADE,
        document TEXT NOT NULL,
        PRIMARY KEY (explanation, document)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE score (
        number INTEGER PRIMARY KEY,
        explanation INTEGER NOT NULL REFERENCES explanation ON DELETE CASCADE,
        scorer TEXT NOT NULL,
        measure TEXT NOT NULL,
        measure_name TEXT NOT NULL,
        value REAL,
        low REAL,
        high REAL,
        n INTEGER NOT NULL,
        failures TEXT NOT NULL,
        seed INTEGER,
        judge TEXT NOT NULL,
        dataset TEXT NOT NULL,
        dataset_hash TEXT NOT NULL,
        code_version TEXT NOT NULL,
        created_ms INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX score_of_explanation ON score (explanation, number);
    -- What choice goes by, so that a table of 10,000 components need not read every score.
    CREATE INDEX score_of_choice
        ON score (explanation, number, judge, measure_name, value, created_ms)
        WHERE measure = '' OR (measure = 'auc' AND scorer IN ('detection', 'head_pairs'));
    CREATE TABLE rating (
        explanation INTEGER NOT NULL REFERENCES explanation ON DELETE CASCADE,
        user TEXT NOT NULL,
        rating INTEGER NOT NULL CHECK (rating BETWEEN 1 AND 5),
        created_ms INTEGER NOT NULL,
        PRIMARY KEY (explanation, user)
    ) STRICT, WITHOUT ROWID;
    CREATE VIRTUAL TABLE explanation_text USING fts5 (
        text, content = 'explanation', content_rowid = 'number', tokenize = 'unicode61'
    );
    CREATE TRIGGER explanation_added AFTER INSERT ON explanation BEGIN
        INSERT INTO explanation_text (rowid, text) VALUES (new.number, new.text);
    END;
    CREATE TRIGGER explanation_removed AFTER DELETE ON explanation BEGIN
        INSERT INTO explanation_text (explanation_text, rowid, text)
            VALUES ('delete', old.number, old.text);
    END;
    -- Numbers only grow, so that what is new can be read alone.
    CREATE TABLE embedding (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        explanation INTEGER NOT NULL REFERENCES explanation ON DELETE CASCADE,
        model TEXT NOT NULL,
        -- float32, little-endian, of length 1.
        vector BLOB NOT NULL,
        UNIQUE (explanation, model)
    ) STRICT;
    CREATE TABLE embeddings_removed (count INTEGER NOT NULL) STRICT;
    INSERT INTO embeddings_removed VALUES (0);
    CREATE TRIGGER embedding_removed AFTER DELETE ON embedding BEGIN
        UPDATE embeddings_removed SET count = count + 1;
    END;
    CREATE TABLE reply (
        key TEXT PRIMARY KEY,
        value BLOB NOT NULL,
        created_ms INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX reply_by_age ON reply (created_ms);
    CREATE TABLE job (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        state TEXT NOT NULL,
        request TEXT NOT NULL,
        user TEXT NOT NULL,
        message TEXT NOT NULL,
        calls INTEGER NOT NULL,
        cached_calls INTEGER NOT NULL,
        bounded_calls INTEGER NOT NULL,
        prompt_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        created_ms INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE job_component (
        job INTEGER NOT NULL REFERENCES job ON DELETE CASCADE,
        position INTEGER NOT NULL,
        component TEXT NOT NULL,
        state TEXT NOT NULL,
        explanation_id TEXT NOT NULL,
        reason TEXT NOT NULL,
        PRIMARY KEY (job, position)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX job_component_of_state ON job_component (job, state, reason);
    """,
)
"""What brings the schema from version N to N + 1; never edited once released, only added to."""


class Database:
    """One file, used from several threads: one connection each."""

    def __init__(self, path: Path, most_bytes: int | None = None) -> None:
        """Opens the file, and brings it to this version's schema. It does not grow beyond
        `most_bytes`. Raises FailedPrecondition."""
        self.path = path
        self._most_bytes = most_bytes
        self._local = threading.local()
        self._opened: list[sqlite3.Connection] = []
        self._opening = threading.Lock()
        self._writers = ThreadPoolExecutor(1, thread_name_prefix="explanations-write")
        self._readers = ThreadPoolExecutor(4, thread_name_prefix="explanations-read")
        try:
            path.touch(mode=0o600)
            migrate(path)
        except (OSError, sqlite3.DatabaseError) as error:
            raise FailedPrecondition(
                f"{path} cannot be used ({error}): restore a copy, or move it away to start anew",
                reason="STORE_UNREADABLE",
            ) from error

    async def read(self, work: Work[T]) -> T:
        """`work` on a connection, off the event loop; what it sees is of one moment."""
        return await self._run(self._readers, work, write=False)

    async def check_room(self) -> None:
        """Asked before work whose result is to be stored. Raises FailedPrecondition."""

        def room(connection: sqlite3.Connection) -> int:
            pages, most, unused, size = (
                connection.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("page_count", "max_page_count", "freelist_count", "page_size")
            )
            return int((most - pages + unused) * size)

        free = await asyncio.to_thread(lambda: shutil.disk_usage(self.path.parent).free)
        if await self.read(room) < ROOM_BYTES or free < DISK_BYTES:
            raise _full()

    async def write(self, work: Work[T]) -> T:
        """`work` as one transaction: all of it is stored, or nothing. It ends once it has begun."""
        return await self._run(self._writers, work, write=True)

    def close(self) -> None:
        self._writers.shutdown()
        self._readers.shutdown()
        for connection in self._opened:
            connection.close()

    async def _run(self, threads: ThreadPoolExecutor, work: Work[T], *, write: bool) -> T:
        def run() -> T:
            with _transaction(self._connection(), write=write) as connection:
                return work(connection)

        loop = asyncio.get_running_loop()
        return await asyncio.shield(loop.run_in_executor(threads, run))

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = connect(self.path)
            if self._most_bytes is not None:
                _bound(connection, self._most_bytes)
            with self._opening:
                self._opened.append(connection)
        return connection


def connect(path: Path) -> sqlite3.Connection:
    """A connection whose transactions are begun by hand, and which may be closed by any thread."""
    connection = sqlite3.connect(
        path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
    )
    connection.row_factory = sqlite3.Row
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def migrate(path: Path) -> None:
    """Brings the file to the newest schema. Raises FailedPrecondition where it is newer still."""
    with closing(connect(path)) as connection:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > len(STEPS):
            raise FailedPrecondition(
                f"{path} has schema {version}, and this version knows {len(STEPS)}: it was written "
                "by a newer version of tdb; start that one, or move the file away",
                reason="STORE_NEWER",
            )
        if 0 < version < len(STEPS):
            copy = path.with_name(f"{path.name}.schema{version}")
            copy.touch(mode=0o600)
            with closing(sqlite3.connect(copy)) as target:
                connection.backup(target)
        for number, step in enumerate(STEPS[version:], start=version + 1):
            connection.executescript(
                f"BEGIN IMMEDIATE; {step} PRAGMA user_version = {number}; COMMIT;"
            )


def _full() -> FailedPrecondition:
    return FailedPrecondition(
        "the store of explanations is full: delete explanations, raise TDB_EXPLANATIONS_MIB, or "
        "make room on the disk; nothing was stored",
        reason=STORE_FULL,
    )


def _bound(connection: sqlite3.Connection, most_bytes: int) -> None:
    (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
    connection.execute(f"PRAGMA max_page_count = {max(1, most_bytes // page_bytes)}")


@contextmanager
def _transaction(connection: sqlite3.Connection, *, write: bool) -> Iterator[sqlite3.Connection]:
    try:
        connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
        try:
            yield connection
        except BaseException:
            if connection.in_transaction:  # a full disk may have ended it
                connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
    except sqlite3.OperationalError as error:
        if "full" in str(error):
            raise _full() from error
        if "locked" in str(error):
            raise ResourceExhausted(
                f"the store of explanations cannot be written now ({error}): nothing was stored",
                retry_after_s=5,
            ) from error
        raise
