"""Neuronpedia's exports: features, sequences and explanations in files of gzipped lines."""

import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import FailedPrecondition, InvalidArgument, NotFound
from services.dataset.importers import importing, neuronpedia_export
from tests.dataset import helpers

OF = {"modelId": "gpt2-small", "layer": "10-res-jb"}


def feature(index: int, **changes: Any) -> dict[str, Any]:
    return {
        **OF,
        "index": str(index),
        "sourceSetName": "res-jb",
        "maxActApprox": 2.0,
        "hasVector": False,
        "vector": None,
        "frac_nonzero": 0.25,
        "pos_str": [" up", " more"],
        "pos_values": [1.5, 1.0],
        "neg_str": None,
        "neg_values": None,
        "freq_hist_data_bar_values": [0.5, 1.5],
        "freq_hist_data_bar_heights": [3, 1],
        **changes,
    }


def sequence(index: int, values: list[float], **changes: Any) -> dict[str, Any]:
    return {
        **OF,
        "id": f"a{index}-{values[0]}",
        "index": str(index),
        "tokens": [f" {index}t{number}" for number in range(len(values))],
        "values": values,
        "maxValue": max(values),
        "binMin": None,
        "binMax": None,
        "binContains": None,
        "dfaValues": [],
        **changes,
    }


def explanation(index: int, text: str, **changes: Any) -> dict[str, Any]:
    return {
        **OF,
        "id": f"e{index}",
        "index": str(index),
        "description": text,
        "typeName": "oai_token-act-pair",
        "explanationModelName": "gpt-4o-mini",
        "authorId": "someone",
        "embedding": [0.5, 0.25],
        "notes": None,
        **changes,
    }


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Features in the order of their text, sequences in other files than their features."""
    folder = tmp_path / "v1" / "gpt2-small" / "10-res-jb"
    write(folder / "features" / "batch-0.jsonl.gz", [feature(0), feature(10), feature(11)])
    dead = feature(2, maxActApprox=0, frac_nonzero=0)
    dead |= {"freq_hist_data_bar_values": [], "freq_hist_data_bar_heights": []}
    write(folder / "features" / "batch-1.jsonl.gz", [dead, feature(1)])
    sampled = {"binMin": 0.5, "binMax": 1.0, "binContains": 0.125}
    write(
        folder / "activations" / "batch-0.jsonl.gz",
        [
            sequence(11, [0.5, 2.0]),
            sequence(0, [1.0, 0.0, 0.25]),
            sequence(0, [0.75], **sampled),
            sequence(1, [0.5]),
        ],
    )
    write(
        folder / "activations" / "batch-1.jsonl.gz",
        [
            sequence(0, [3.0], binMin=-1, binMax=3.0, binContains=-1),
            sequence(10, [1.0]),
        ],
    )
    write(
        folder / "explanations" / "batch-0.jsonl.gz",
        [explanation(11, "eleven \u2014"), explanation(2, "two"), explanation(2, "two again")],
    )
    (folder / "source.jsonl").write_text("{}\n")
    return folder


@pytest.fixture(params=[1024, 2])
def shard_records(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(importing, "EXPORT_SHARD_RECORDS", request.param)
    return int(request.param)


def test_an_export_becomes_a_dataset(source: Path, tmp_path: Path, shard_records: int) -> None:
    manifest = importing.import_neuronpedia(source, tmp_path / "d")
    assert len(manifest.shards) == (1 if shard_records > 5 else 3)
    assert manifest.header.model.id == "gpt2-small"
    reader = helpers.opened(tmp_path / "d")
    found = {record.component: record for record in map(reader.read, range(reader.records))}
    assert list(found) == [f"latent.10-res-jb.{index}" for index in (0, 1, 2, 10, 11)]
    first = found["latent.10-res-jb.0"]
    assert [list(each.activations) for each in first.top] == [[3.0], [1.0, 0.0, 0.25]]
    (quantile,) = first.quantiles
    assert (quantile.lower, quantile.upper, quantile.fraction) == (0.5, 1.0, 0.125)
    assert list(quantile.examples[0].activations) == [0.75]
    assert first.statistics.max == first.statistics.scale == 3
    assert first.statistics.fraction_active == 0.25
    assert list(first.statistics.histogram.edges) == [0.0, 1.0, 2.0]
    assert [(each.text, each.score) for each in first.promoted] == [(" up", 1.5), (" more", 1.0)]
    assert list(first.suppressed) == []
    assert list(found["latent.10-res-jb.11"].top[0].token_texts) == [" 11t0", " 11t1"]
    dead = found["latent.10-res-jb.2"]
    assert not dead.top
    assert dead.statistics.max == 0


def test_explanations_are_kept_beside_the_records(source: Path, tmp_path: Path) -> None:
    importing.import_neuronpedia(source, tmp_path / "d", "mine")
    lines = (tmp_path / "d" / "explanations.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [(each["component"], each["text"]) for each in found] == [
        ("latent.mine.2", "two"),
        ("latent.mine.2", "two again"),
        ("latent.mine.11", "eleven \u2014"),
    ]
    assert found[0] == {
        "component": "latent.mine.2",
        "text": "two",
        "method": "oai_token-act-pair",
        "model": "gpt-4o-mini",
        "author": "someone",
        "id": "e2",
    }
    shutil.rmtree(source / "explanations")
    importing.import_neuronpedia(source, tmp_path / "e")
    assert not (tmp_path / "e" / "explanations.jsonl").exists()


def test_an_import_that_was_cut_off_goes_on_and_ends_the_same(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "EXPORT_SHARD_RECORDS", 2)
    importing.import_neuronpedia(source, tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(*progress: Any) -> None:
        raise Killed

    with pytest.raises(Killed):
        importing.import_neuronpedia(source, tmp_path / "d", progress=kill)
    asked: list[int] = []
    original = neuronpedia_export.Export.records

    def counted(self: Any, group: Any, indices: list[int]) -> Iterator[Any]:
        asked.extend(indices)
        return original(self, group, indices)

    monkeypatch.setattr(neuronpedia_export.Export, "records", counted)
    importing.import_neuronpedia(source, tmp_path / "d")
    assert asked == [2, 10, 11]
    assert helpers.bytes_of(tmp_path / "d") == helpers.bytes_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "lines", "says"),
    [
        ("features/batch-2", [feature(0)], "feature 0 is there twice"),
        ("features/batch-2", [feature(20)], "activations up to 2.0 and no file"),
        ("features/batch-2", [feature(20, layer="9-res-jb")], "import one source at a time"),
        ("features/batch-2", [feature(20, modelId="other")], "import one source at a time"),
        ("features/batch-2", [feature(20) | {"index": "-1"}], r"line 1\.index: is a number from 0"),
        ("features/batch-2", [feature(20) | {"index": None}], r"line 1\.index: is a number from 0"),
        ("activations/batch-2", [sequence(21, [1.0])], "sequences of feature 21, which no file"),
        ("activations/batch-2", [sequence(0, [1.0], tokens=[])], "is a list of text, never empty"),
        ("activations/batch-2", [sequence(0, [1.0], tokens=["a", "b"])], "1 values for 2 tokens"),
        ("activations/batch-2", [sequence(0, [float("nan")])], "a list of finite numbers"),
        ("explanations/batch-2", [explanation(2, "")], "description: is text, never empty"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(
    source: Path, tmp_path: Path, name: str, lines: list[dict[str, Any]], says: str
) -> None:
    write(source / f"{name}.jsonl.gz", lines)
    with pytest.raises(InvalidArgument, match=says) as caught:
        importing.import_neuronpedia(source, tmp_path / "d")
    assert "batch-" in str(caught.value)
    assert not (tmp_path / "d" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (gzip.compress(json.dumps(feature(20)).encode() * 50)[:-30], "cut off or damaged"),
        (b"<?xml version='1.0'?><Error/>", "cut off or damaged"),
        (gzip.compress(b'{"modelId": "gpt2-sm'), "line 1 is no JSON"),
        (gzip.compress(b"[]\n"), "line 1 is no JSON object"),
    ],
    ids=["cut off", "another format", "half a line", "no object"],
)
def test_half_a_file_is_none(source: Path, tmp_path: Path, content: bytes, says: str) -> None:
    (source / "features" / "batch-2.jsonl.gz").write_bytes(content)
    with pytest.raises(InvalidArgument, match=says):
        importing.import_neuronpedia(source, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_an_export_without_features_is_none(source: Path, tmp_path: Path) -> None:
    for path in (source / "features").iterdir():
        path.unlink()
    shutil.rmtree(source / "activations")
    with pytest.raises(NotFound, match="holds no features"):
        importing.import_neuronpedia(source, tmp_path / "d")


def test_a_disk_that_is_nearly_full_is_said_before_work_starts(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(FailedPrecondition, match="there are 1 MiB: make room first") as caught:
        importing.import_neuronpedia(source, tmp_path / "d")
    assert caught.value.reason == "DISK_FULL"
    assert not (tmp_path / "d").exists()
