"""Documents from files: what is read, in which order, and what is refused in which words."""

import gzip
import json
from pathlib import Path

import pytest
from tdb.dataset.v1 import build_pb2

from services.common.errors import TdbError
from services.dataset.building.corpora import DemoCorpus, FilesCorpus


def files(folder: Path, path: str, field: str = "") -> FilesCorpus:
    return FilesCorpus(folder, build_pb2.CorpusFiles(path=path, field=field))


def test_a_folder_is_read_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "all"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_bytes("zwei\r\nZeilen, ä".encode())
    (folder / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "x": 1}\n')
    (folder / "sub" / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}'))
    (folder / "d.txt.gz").write_bytes(gzip.compress(b"four"))
    (folder / "picture.png").write_bytes(b"no text")
    corpus = files(tmp_path, "all")
    found = [(each.id, each.text) for each in corpus.documents()]
    assert found == [
        ("a.jsonl:1", "one"),
        ("a.jsonl:2", ""),
        ("a.jsonl:3", "two"),
        ("b.txt", "zwei\r\nZeilen, ä"),
        ("d.txt.gz", "four"),
        ("sub/c.jsonl.gz:1", "three"),
    ]
    assert list(corpus.documents()) == list(corpus.documents())
    before = corpus.identity()
    assert before == corpus.identity()
    (folder / "b.txt").write_text("other")
    assert corpus.identity() != before


def test_halves_of_characters_become_the_replacement(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x\ud800y \U0001f600"}))
    (found,) = files(tmp_path, "a.jsonl").documents()
    assert found.text == "x�y \U0001f600"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": 7}\n', "line 2: there is no text in 'text'"),
        ("a.jsonl", b'{"body": "one"}\n', "it has body"),
        ("a.jsonl", b'{"text": \n', "line 1: this is no JSON"),
        ("a.jsonl", b"[1]\n", "a JSON object is needed"),
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
        ("a.txt.gz", b"no gzip", "no whole gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "one"}', mtime=0)[:-3], "no whole gzip"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TdbError, match=says) as refusal:
        list(files(tmp_path, name).documents())
    assert name in refusal.value.message or "'text'" in refusal.value.message
    assert refusal.value.code == "FAILED_PRECONDITION"


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../secrets.txt", "a/../../b", "a//b", "./a"])
def test_nothing_outside_the_folder_can_be_named(tmp_path: Path, path: str) -> None:
    with pytest.raises(TdbError, match="must be a file or folder in `corpora`") as refusal:
        files(tmp_path / "corpora", path)
    assert (refusal.value.code, refusal.value.field) == ("INVALID_ARGUMENT", "path")


def test_what_is_not_there_and_what_has_no_fields(tmp_path: Path) -> None:
    with pytest.raises(TdbError, match="there is no news") as refusal:
        files(tmp_path, "news").identity()
    assert refusal.value.code == "NOT_FOUND"
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(TdbError, match="text files have no fields"):
        files(tmp_path, "a.txt", "body").identity()
    (tmp_path / "empty").mkdir()
    with pytest.raises(TdbError, match=r"has no file that ends in \.txt"):
        files(tmp_path, "empty").identity()


def test_the_demo_s_documents_are_the_same_each_time() -> None:
    request = build_pb2.DemoCorpus(seed="s")
    first = DemoCorpus(request).documents()
    second = DemoCorpus(request).documents()
    other = DemoCorpus(build_pb2.DemoCorpus()).documents()
    some = [next(first) for _ in range(5)]
    assert some == [next(second) for _ in range(5)]
    assert [each.text for each in some] != [next(other).text for _ in range(5)]
    assert some[3].id == "demo:3"
    for corpus in (first, second, other):
        corpus.close()
