"""`tdb dataset build|list|cancel|delete` against the running service."""

import asyncio
from pathlib import Path

import pytest

from services.common.server import ServiceServer
from services.dataset import command
from tests.dataset.building import helpers

BUILD = ["--tokens", "200", "--length", "12", "--top", "3", "--groups", "neuron.0,head"]


@pytest.fixture
def here(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TDB_DATA_DIR", str(data))
    monkeypatch.setenv("TDB_DATASET_PORT", "0")
    return data


async def tdb(*arguments: str) -> int:
    return await asyncio.to_thread(command.main, list(arguments))


async def test_a_dataset_is_built_listed_and_deleted(
    here: Path,
    inference: ServiceServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = here.parent / "texts"
    texts.mkdir()
    (texts / "one.txt").write_text("\n".join(helpers.documents()))
    async with helpers.serving_at(here, inference.port) as port:
        monkeypatch.setenv("TDB_DATASET_PORT", str(port))
        assert await tdb("list") == 0
        assert "There is no dataset yet" in capsys.readouterr().out
        assert await tdb("build", "mine", "--files", str(texts), *BUILD) == 0
        said = capsys.readouterr()
        assert "mine: 68 records of tiny, " in said.out
        assert (here / "corpora" / "texts").readlink() == texts
        assert await tdb("build", "again", "--files", str(texts / "one.txt"), *BUILD) == 0
        assert await tdb("build", "third", "--files", "texts/one.txt", *BUILD, "--detach") == 0
        assert "`tdb dataset list` shows" in capsys.readouterr().out
        assert await tdb("delete", "mine") == 0
        assert "mine: deleted, " in capsys.readouterr().out
        assert await tdb("list") == 0
        listed = capsys.readouterr().out
        assert "again: 68 records of tiny" in listed
        assert "mine" not in listed
        assert await tdb("cancel", "again") == 1
        assert "no build of 'again' is under way" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["build", "x", "--files", "/nowhere", *BUILD], "/nowhere does not exist"),
        (["build", "x", "--demo", "--tokens", "0"], "must be in 1.."),
        (["build", "x", "--files", "news.jsonl", *BUILD], "there is no text in 'text'"),
        (["delete", "x"], "there is no dataset 'x' here"),
    ],
)
async def test_what_fails_is_one_sentence(
    here: Path,
    inference: ServiceServer,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    says: str,
) -> None:
    async with helpers.serving_at(here, inference.port) as port:
        monkeypatch.setenv("TDB_DATASET_PORT", str(port))
        assert await tdb(*arguments, "--address", f"127.0.0.1:{port}") in (0, 1)
        if "/nowhere" in arguments:  # it is the service that looks, where that is elsewhere
            capsys.readouterr()
            assert await tdb(*arguments) == 1
        last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("tdb: ")
    assert says in last


async def test_a_service_that_is_not_there(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert await tdb("list", "--address", "127.0.0.1:9") == 1
    assert "is `tdb up` running?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["build", "x", "--tokens", "5"],
        ["build", "x", "--demo"],
        ["build", "x", "--demo", "--hub", "y", "--tokens", "5"],
        ["delete"],
    ],
)
def test_wrong_usage_is_exit_code_2(here: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
