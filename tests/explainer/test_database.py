"""The file of explanations: private, bounded, all or nothing, and readable while it is written."""

import asyncio
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest

from services.common.errors import FailedPrecondition, ResourceExhausted
from services.explainer import database as module
from services.explainer.database import Database, connect


def keep(connection: sqlite3.Connection, key: str, size: int) -> None:
    connection.execute("INSERT INTO reply VALUES (?, ?, 0)", (key, b"x" * size))


def count(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT count(*) FROM reply").fetchone()[0])


async def test_what_fails_is_taken_back(tmp_path: Path) -> None:
    database = Database(tmp_path / "x.sqlite3")

    def fail(connection: sqlite3.Connection) -> None:
        keep(connection, "a", 1)
        raise KeyError("a")

    with pytest.raises(KeyError):
        await database.write(fail)
    assert await database.read(count) == 0
    await database.write(lambda connection: keep(connection, "a", 1))
    assert await database.read(count) == 1
    database.close()
    assert stat.S_IMODE((tmp_path / "x.sqlite3").stat().st_mode) == 0o600


async def test_it_does_not_grow_beyond_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite3"
    Database(path).close()
    most = path.stat().st_size + 2**20
    database = Database(path, most)
    await database.write(lambda connection: keep(connection, "a", 2**18))
    with pytest.raises(FailedPrecondition, match="TDB_EXPLANATIONS_MIB") as refused:
        await database.write(lambda connection: keep(connection, "b", 2**20))
    assert refused.value.reason == "STORE_FULL"
    await database.write(lambda connection: keep(connection, "c", 2**18))
    with pytest.raises(FailedPrecondition, match="TDB_EXPLANATIONS_MIB"):
        await database.check_room()
    await database.write(lambda connection: connection.execute("DELETE FROM reply WHERE key = 'c'"))
    # What is there is read, what fits is written, and room can be made.
    assert await database.read(count) == 1
    await database.write(lambda connection: keep(connection, "c", 2**18))
    await database.write(lambda connection: connection.execute("DELETE FROM reply"))
    await database.write(lambda connection: keep(connection, "b", 2**19))
    assert path.stat().st_size <= most
    database.close()


async def test_work_does_not_begin_on_a_disk_that_is_nearly_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(tmp_path / "x.sqlite3")
    await database.check_room()
    monkeypatch.setattr(module, "DISK_BYTES", 2**60)
    with pytest.raises(FailedPrecondition) as refused:
        await database.check_room()
    assert refused.value.reason == "STORE_FULL"
    database.close()


async def test_another_writer_is_waited_for_and_then_refused_for_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BUSY_S", 0.05)
    database = Database(tmp_path / "x.sqlite3")
    with closing(connect(tmp_path / "x.sqlite3")) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ResourceExhausted) as refused:
            await database.write(lambda connection: keep(connection, "a", 1))
        assert refused.value.retry_after_s
        assert await database.read(count) == 0  # readers do not wait
        other.execute("COMMIT")
    await database.write(lambda connection: keep(connection, "a", 1))
    database.close()


async def test_a_change_whose_caller_has_gone_is_whole(tmp_path: Path) -> None:
    database = Database(tmp_path / "x.sqlite3")
    writes = [
        asyncio.ensure_future(
            database.write(lambda connection, key=key: keep(connection, str(key), 1))  # type: ignore[misc]
        )
        for key in range(20)
    ]
    await asyncio.sleep(0)
    for write in writes:
        write.cancel()
    await asyncio.gather(*writes, return_exceptions=True)
    await database.write(lambda connection: keep(connection, "last", 1))
    assert await database.read(count) == 21
    database.close()


def test_an_older_file_is_copied_before_it_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.sqlite3"
    Database(path).close()
    with closing(connect(path)) as connection:
        keep(connection, "a", 1)
    before = len(module.STEPS)
    added = (*module.STEPS, "ALTER TABLE reply ADD COLUMN more TEXT;")
    monkeypatch.setattr(module, "STEPS", added)
    Database(path).close()
    with closing(connect(path)) as connection:
        assert connection.execute("SELECT key, more FROM reply").fetchall()[0]["key"] == "a"
        assert connection.execute("PRAGMA user_version").fetchone()[0] == before + 1
    copy = tmp_path / f"x.sqlite3.schema{before}"
    with closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("SELECT * FROM reply").fetchall() == [("a", b"x", 0)]
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600


def test_a_step_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.sqlite3"
    Database(path).close()
    wrong = "ALTER TABLE reply ADD COLUMN more TEXT; ALTER TABLE nothing ADD COLUMN more TEXT;"
    monkeypatch.setattr(module, "STEPS", (*module.STEPS, wrong))
    with pytest.raises(FailedPrecondition, match="cannot be used"):
        Database(path)
    with closing(connect(path)) as connection:
        columns = [each["name"] for each in connection.execute("PRAGMA table_info(reply)")]
        assert "more" not in columns
