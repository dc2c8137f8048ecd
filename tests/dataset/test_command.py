"""`tdb dataset import`, from the command line to what is served."""

import json
from pathlib import Path

import pytest
from tdb.dataset.v1 import read_pb2

from services.dataset import command
from tests.dataset import helpers
from tests.dataset.test_importers import batch, neuron


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TDB_DATA_DIR", str(tmp_path / "data"))
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "7.json").write_text(json.dumps(neuron()))
    (tmp_path / "batch-0.json").write_bytes(batch())
    return tmp_path


OPENAI = ["--format", "openai", "--components", "neuron", "--model", "gpt2"]


async def test_what_is_imported_is_served(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets = data / "data" / "datasets"
    datasets.mkdir(parents=True)
    async with helpers.connected(datasets) as stub:
        assert command.main(["import", "ours", str(data), *OPENAI]) == 0
        said = capsys.readouterr()
        assert said.out.startswith("ours: 1 records, ")
        assert "neuron.4: 1 of 1" in said.err
        found = await stub.GetRecord(
            read_pb2.GetRecordRequest(dataset="ours", component="neuron.4.7")
        )
        assert found.record.statistics.kurtosis == 3
        assert command.main(["import", "pedia", str(data), "--format", "neuronpedia"]) == 0
        request = read_pb2.GetRecordRequest(dataset="pedia", component="latent.0-a-b.3")
        assert (await stub.GetRecord(request)).record.promoted[0].text == "x"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["../x", ".", *OPENAI], "cannot be the name of a dataset"),
        (["d", "/nowhere", *OPENAI], "holds no LAYER/INDEX.json"),
        (["d", "/nowhere", "--format", "neuronpedia"], "holds no batch-N.json"),
    ],
)
def test_what_fails_is_one_sentence(
    data: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert command.main(["import", *arguments]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert says in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["import", "d"], "FOLDER"),
        (["import", "d", "."], "--format"),
        (["import", "d", ".", "--format", "openai"], "need --components and --model"),
        (["import", "d", ".", *OPENAI, "--dictionary", "x"], "goes with --components latent"),
        (["import", "d", ".", "--format", "neuronpedia", "--model", "m"], "name the components"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    data: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


def test_a_name_is_taken_once(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["import", "d", str(data), *OPENAI]) == 0
    assert command.main(["import", "d", str(data), *OPENAI]) == 1
    assert "there is a dataset 'd' already" in capsys.readouterr().err
