"""Parquet and the Hub: read where their packages are, refused in a sentence where they are not."""

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors as hub_errors
from tdb.dataset.v1 import build_pb2

from services.common.errors import TdbError
from services.dataset.building import hub
from services.dataset.building.corpora import FilesCorpus
from services.dataset.building.hub import HubCorpus


def test_parquet_files_are_read_by_column(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"body": ["one", None, "three"], "n": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "a.parquet")
    request = build_pb2.CorpusFiles(path="a.parquet", field="body")
    found = [(each.id, each.text) for each in FilesCorpus(tmp_path, request).documents()]
    assert found == [("a.parquet:0", "one"), ("a.parquet:1", ""), ("a.parquet:2", "three")]
    for field, says in (("text", "has no column 'text'; it has body, n"), ("n", "holds no text")):
        request = build_pb2.CorpusFiles(path="a.parquet", field=field)
        with pytest.raises(TdbError, match=says):
            list(FilesCorpus(tmp_path, request).documents())
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(TdbError, match="is no Parquet file"):
        list(FilesCorpus(tmp_path, request).documents())


def test_a_folder_that_datasets_has_saved_is_read_by_column(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    folder = tmp_path / "saved" / "train"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text("{}")
    table = pyarrow.table({"n": [1, 2, 3], "text": ["one", None, "three"]})
    path = folder / "data-00000-of-00001.arrow"
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    request = build_pb2.CorpusFiles(path="saved")
    name = "train/data-00000-of-00001.arrow"
    found = [(each.id, each.text) for each in FilesCorpus(tmp_path, request).documents()]
    assert found == [(f"{name}:0", "one"), (f"{name}:1", ""), (f"{name}:2", "three")]
    for field, says in (("body", "has no column 'body'; it has n, text"), ("n", "holds no text")):
        request = build_pb2.CorpusFiles(path="saved", field=field)
        with pytest.raises(TdbError, match=says):
            list(FilesCorpus(tmp_path, request).documents())
    for content in (b"no arrow", path.read_bytes()[:-200]):
        path.write_bytes(content)
        with pytest.raises(TdbError, match="is no Arrow file that can be read"):
            list(FilesCorpus(tmp_path, build_pb2.CorpusFiles(path="saved")).documents())


def test_without_pyarrow_parquet_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TdbError, match=r"pip install 'transformer-debugger\[parquet\]'"):
        list(FilesCorpus(tmp_path, build_pb2.CorpusFiles(path="a.parquet")).documents())


class FakeHub:
    """What of huggingface_hub is used: one dataset at one revision."""

    errors = hub_errors

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.opened: list[str] = []
        self.is_away = False

    def HfApi(self) -> Any:
        def dataset_info(id: str, revision: str | None, timeout: float) -> Any:
            if self.is_away:
                raise ConnectionError("no route")
            if id != "org/news":
                kind = hub_errors.RepositoryNotFoundError
                raise kind.__new__(kind)  # it is made from a response
            siblings = [SimpleNamespace(rfilename=name) for name in self.files]
            return SimpleNamespace(sha="abc123", siblings=siblings)

        return SimpleNamespace(dataset_info=dataset_info)

    def HfFileSystem(self) -> Any:
        @contextmanager
        def open(path: str, mode: str) -> Iterator[io.BytesIO]:
            self.opened.append(path)
            if self.is_away:
                raise OSError("connection lost")
            yield io.BytesIO(self.files[path.removeprefix("datasets/org/news@abc123/")])

        return SimpleNamespace(open=open)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    lines = "".join(json.dumps({"body": text}) + "\n" for text in ("one", "two"))
    made = FakeHub(
        {
            "README.md": b"",
            "data/b.jsonl": lines.encode(),
            "data/a.jsonl": b'{"body": "zero"}',
            "other/c.jsonl": b'{"body": "no"}',
        }
    )
    monkeypatch.setattr(hub, "_hub", lambda: made)
    return made


def corpus(**more: str) -> HubCorpus:
    return HubCorpus(build_pb2.HubCorpus(id=more.pop("id", "org/news"), field="body", **more))


def test_a_dataset_of_the_hub_stays_with_its_revision(fake: FakeHub) -> None:
    found = corpus(folder="data")
    assert (found.name, found.identity()) == ("org/news/data", "abc123")
    assert [(each.id, each.text) for each in found.documents()] == [
        ("data/a.jsonl:1", "zero"),
        ("data/b.jsonl:1", "one"),
        ("data/b.jsonl:2", "two"),
    ]
    assert all("@abc123/" in path for path in fake.opened)


def test_what_the_hub_does_not_give_is_said(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TdbError, match="the Hub has no dataset 'org/none'") as refusal:
        corpus(id="org/none").identity()
    assert refusal.value.code == "NOT_FOUND"
    with pytest.raises(TdbError, match="made by code of their own"):
        corpus(folder="nothing").identity()
    there = corpus()
    there.identity()
    fake.is_away = True
    with pytest.raises(TdbError, match="cannot be read now") as refusal:
        list(there.documents())
    assert refusal.value.code == "UNAVAILABLE", "a build waits for it"
    with pytest.raises(TdbError, match="the Hub cannot be asked for 'org/news': ConnectionError"):
        corpus().identity()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TdbError, match="HF_HUB_OFFLINE is set"):
        corpus().identity()
    with pytest.raises(TdbError, match="the id of a dataset is required"):
        corpus(id="")


def test_without_its_package_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(TdbError, match=r"pip install 'transformer-debugger\[hub\]'"):
        corpus().identity()
