"""Others' records, real ones and every way in which one can be wrong."""

import json
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from services.common.addresses import Kind
from services.common.errors import FailedPrecondition, InvalidArgument, NotFound
from services.dataset import groups, records
from services.dataset.groups import Group
from services.dataset.importers import importing, openai_records
from services.dataset.importers.neuronpedia_batch import Batch
from services.dataset.reader import Record
from tests.dataset import helpers

NEURON = groups.parse("neuron.4")
HEAD = groups.parse("head.4")


def activation(tokens: list[str], activations: list[float]) -> dict[str, Any]:
    return {"tokens": tokens, "activations": activations, "dataclass_name": "ActivationRecord"}


def neuron(**changes: Any) -> dict[str, Any]:
    return {
        "neuron_id": {"neuron_index": 7, "layer_index": 4, "dataclass_name": "NeuronId"},
        "most_positive_activation_records": [
            activation(["a", " b"], [0.5, 1.0]),
            activation([" c", "d", "e"], [3.0, -1.0, 0.0]),
        ],
        "random_sample": [activation(["x"], [-2.0])],
        "random_sample_by_quantile": None,
        "quantile_boundaries": None,
        "mean": 0.25,
        "variance": None,
        "skewness": float("nan"),
        "kurtosis": 3,
        "dataclass_name": "NeuronRecord",
        **changes,
    }


def parse(document: Any, group: Group = NEURON) -> Record:
    return openai_records.parse(json.dumps(document).encode(), group, 7)


def test_a_neuron_record_becomes_ours() -> None:
    record = parse(neuron())
    assert record.component == "neuron.4.7"
    assert [list(each.token_texts) for each in record.top] == [[" c", "d", "e"], ["a", " b"]]
    assert list(record.top[0].activations) == [3.0, -1.0, 0.0]
    assert list(record.random[0].activations) == [-2.0]
    statistics = record.statistics
    assert (statistics.max, statistics.scale, statistics.mean, statistics.kurtosis) == (
        3,
        3,
        0.25,
        3,
    )
    for absent in ("variance", "skewness", "min", "fraction_active", "histogram"):
        assert not statistics.HasField(absent)


def test_old_names_and_missing_tags_are_understood() -> None:
    old = neuron(neuron_id={"idx": 7, "layer": "4"})
    del old["dataclass_name"], old["kurtosis"], old["random_sample"]
    assert parse(old).component == "neuron.4.7"


@pytest.mark.parametrize(
    ("boundaries", "ends"),
    [
        ([0.0, 1.0, 2.0, 4.0], [(2, 4), (1, 2), (0, 1)]),
        ([1.0, 2.0], [(2, None), (1, 2), (None, 1)]),
        (None, [(None, None)] * 3),
    ],
)
def test_quantiles_come_strongest_first(
    boundaries: list[float] | None, ends: list[tuple[float | None, float | None]]
) -> None:
    samples = [[activation([str(n)], [float(n)])] for n in range(3)]
    record = parse(neuron(random_sample_by_quantile=samples, quantile_boundaries=boundaries))
    assert [each.examples[0].token_texts[0] for each in record.quantiles] == ["2", "1", "0"]
    for quantile, (lower, upper) in zip(record.quantiles, ends, strict=True):
        assert (quantile.lower if quantile.HasField("lower") else None) == lower
        assert (quantile.upper if quantile.HasField("upper") else None) == upper


@pytest.mark.parametrize(("count", "width"), [(10, None), (9, 3), (7, 2), (4, 1)])
def test_the_width_of_a_head_s_pairs_is_told_from_their_count(
    count: int, width: int | None
) -> None:
    values = [float(number) for number in range(count)]
    head = neuron(most_positive_activation_records=[activation(list("abcd"), values)])
    head["random_sample"] = []
    (example,) = parse(head, HEAD).top
    assert list(example.pair_activations) == values
    assert (example.pair_width if example.HasField("pair_width") else None) == width
    head["most_positive_activation_records"][0]["activations"].append(1.0)
    if count + 1 not in (10, 9, 7, 4):
        with pytest.raises(InvalidArgument, match="values for 4 tokens"):
            parse(head, HEAD)


XML = b'<?xml version="1.0"?><Error><Code>BlobNotFound</Code></Error>'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (XML, "XML or HTML"),
        (b"", "no JSON"),
        (json.dumps(neuron()).encode()[:-20], "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "is a JSON object"),
        (b"{}", "neuron id is a JSON object"),
    ],
)
def test_half_a_file_is_none(content: bytes, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        openai_records.parse(content, NEURON, 7)


def test_halves_of_characters_become_the_replacement() -> None:
    tokens = ["\ud800", "x\udfff", "\U0001f600"]
    record = parse(neuron(random_sample=[activation(tokens, [0.0, 1.0, 2.0])]))
    assert list(record.random[0].token_texts) == ["\ufffd", "x\ufffd", "\U0001f600"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"neuron_id": {"neuron_index": 8, "layer_index": 4}}, "neuron_id"),
        ({"neuron_id": {"neuron_index": 7, "layer_index": 3}}, "neuron_id"),
        ({"neuron_id": {"neuron_index": "x", "layer_index": 4}}, "neuron_id"),
        ({"surprise": 1}, ""),
        ({"mean": float("inf")}, "mean"),
        ({"mean": "0"}, "mean"),
        ({"random_sample": 3}, "random_sample"),
        ({"random_sample": [{"tokens": ["a"]}]}, "random_sample[0].activations"),
        ({"random_sample": [activation([], [])]}, "random_sample[0].tokens"),
        ({"random_sample": [activation(["a"], [1.0, 2.0])]}, "random_sample[0].activations"),
        ({"random_sample": [activation(["a"], [float("nan")])]}, "random_sample[0].activations"),
        ({"random_sample": [activation(["a"], [True])]}, "random_sample[0].activations"),
        (
            {"random_sample_by_quantile": [[]], "quantile_boundaries": [1.0]},
            "quantile_boundaries",
        ),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(neuron(**changes))
    assert caught.value.field == field


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "kind"), [("mlp_post_act", Kind.NEURON), ("attn_write_norm", Kind.HEAD)]
)
def test_openai_s_records_import(shared_data: Path, tmp_path: Path, name: str, kind: Kind) -> None:
    source = shared_data / "parity" / "records" / name
    manifest = importing.import_openai(source, tmp_path / "d", kind, "parity")
    paths = sorted(source.glob("*/*.json"))
    assert manifest.records == len(paths) > 0
    assert not manifest.has_token_ids
    reader = helpers.opened(tmp_path / "d")
    for path in paths:
        document = json.loads(path.read_bytes())
        group = Group(kind, int(path.parent.name))
        place = reader.place(group, int(path.stem))
        assert place is not None
        record = reader.read(place)
        theirs = document["most_positive_activation_records"]
        theirs = sorted(theirs, key=lambda each: -max(each["activations"]))
        for ours, their in zip(
            [*record.top, *record.random], [*theirs, *document["random_sample"]], strict=True
        ):
            assert list(ours.token_texts) == their["tokens"]
            values = ours.pair_activations if kind is Kind.HEAD else ours.activations
            assert list(values) == pytest.approx(their["activations"], rel=1e-6)
            assert not ours.HasField("pair_width")


@pytest.mark.shared
def test_neuronpedia_s_batches_import(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "neuronpedia-records"
    manifest = importing.import_neuronpedia(source, tmp_path / "d")
    assert manifest.header.model.id == "gpt2-small"
    assert manifest.header.corpus.name == "Skylion007/openwebtext"
    reader = helpers.opened(tmp_path / "d")
    assert [str(group) for group in reader.groups] == ["latent.0-res-jb"]
    found = [reader.read(place) for place in range(reader.records)]
    assert [record.component for record in found] == [f"latent.0-res-jb.{n}" for n in range(4)]
    theirs = [
        feature
        for number in range(2)
        for feature in json.loads((source / f"batch-{number}.json").read_bytes())["features"]
    ]
    for record, feature in zip(found, theirs, strict=True):
        statistics = record.statistics
        assert statistics.fraction_active == feature["frac_nonzero"]
        tops = [each for each in feature["activations"] if each["bin_contains"] == -1]
        sequences = {tuple(each["tokens"]) for each in tops if max(each["values"]) > 0}
        assert {tuple(example.token_texts) for example in record.top} == sequences
        assert len(record.top) == len(sequences)
        assert sum(len(each.examples) for each in record.quantiles) == (
            len(feature["activations"]) - len(tops)
        )
        lowers = [quantile.lower for quantile in record.quantiles]
        assert lowers == sorted(lowers, reverse=True)
        assert [each.text for each in record.promoted] == feature["pos_str"]
        assert [each.score for each in record.suppressed] == feature["neg_values"]
        assert list(statistics.histogram.counts) == feature["freq_hist_data_bar_heights"]
        if record.component.endswith(".1"):  # it never fires
            assert not record.top
            assert statistics.max == 0
            assert not statistics.HasField("histogram")
            continue
        assert statistics.max == pytest.approx(feature["activations"][0]["bin_max"])
        edges = statistics.histogram.edges
        middles = [(a + b) / 2 for a, b in pairwise(edges)]
        assert middles == pytest.approx(feature["freq_hist_data_bar_values"], abs=1e-3)
        assert edges[-1] == pytest.approx(statistics.max, abs=1e-2)


def batch(**changes: Any) -> bytes:
    feature = {
        "feature_index": 3,
        "activations": [
            {"tokens": ["a"], "values": [1.0], "bin_min": -1, "bin_max": 1.0, "bin_contains": -1}
        ],
        "frac_nonzero": 0.5,
        "freq_hist_data_bar_values": [0.25, 0.75],
        "freq_hist_data_bar_heights": [3, 1],
        "pos_str": ["x"],
        "pos_values": [1.0],
        "neg_str": [],
        "neg_values": [],
        "dataset": "corpus",
        **changes,
    }
    return json.dumps(
        {"model_id": "m", "layer": 0, "sae_set": "a b", "features": [feature]}
    ).encode()


def test_a_batch_names_its_dictionary_in_characters_of_addresses() -> None:
    parsed = Batch.parse(batch())
    assert parsed.dictionary == "0-a-b"
    assert [record.component for record in parsed.records()] == ["latent.0-a-b.3"]
    assert [record.component for record in parsed.records("other")] == ["latent.other.3"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"feature_index": -1}, "features[0].feature_index"),
        ({"feature_index": None}, "features[0].feature_index"),
        ({"activations": None}, "features[0].activations"),
        (
            {"activations": [{"tokens": ["a"], "values": [1, 2]}]},
            "features[0].activations[0].values",
        ),
        ({"activations": [{"tokens": ["a"], "values": [1]}]}, "features[0].activations[0].bin_min"),
        ({"frac_nonzero": "1"}, "features[0].frac_nonzero"),
        ({"frac_nonzero": 2}, "features[0].statistics.fraction_active"),
        ({"pos_values": []}, "features[0].pos_str"),
        ({"freq_hist_data_bar_heights": [1]}, "features[0].freq_hist_data_bar_heights"),
    ],
)
def test_what_is_wrong_in_a_batch_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        list(Batch.parse(batch(**change)).records())
    assert caught.value.field == field


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    for layer, index in ((4, 7), (4, 12), (4, 2), (10, 0)):
        path = folder / str(layer) / f"{index}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(neuron(neuron_id={"idx": index, "layer": layer})))
    return folder


def test_layers_and_indices_are_numbers(source: Path, tmp_path: Path) -> None:
    importing.import_openai(source, tmp_path / "d", Kind.NEURON, "m")
    reader = helpers.opened(tmp_path / "d")
    names = [reader.component(place) for place in range(reader.records)]
    assert names == ["neuron.4.2", "neuron.4.7", "neuron.4.12", "neuron.10.0"]


def test_dictionaries_are_named_by_layer(source: Path, tmp_path: Path) -> None:
    def run(name: str) -> list[str]:
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        importing.import_openai(source, tmp_path / "d", Kind.LATENT, "m", name)
        return [str(group) for group in helpers.opened(tmp_path / "d").groups]

    assert run("ae-{layer}") == ["latent.ae-10", "latent.ae-4"]
    with pytest.raises(InvalidArgument, match=r"must hold \{layer\}"):
        run("ae")
    with pytest.raises(InvalidArgument, match="is not a group of components"):
        run("a b {layer}")


def test_a_broken_file_stops_the_import_which_then_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "SHARD_RECORDS", 1)
    whole = tmp_path / "whole"
    importing.import_openai(source, whole, Kind.NEURON, "m")
    path = source / "4" / "12.json"
    stat, content = path.stat(), path.read_bytes()
    path.write_bytes(b"<" + content[1:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(InvalidArgument, match=r"4/12\.json: this is XML"):
        importing.import_openai(source, tmp_path / "d", Kind.NEURON, "m")
    assert sorted(path.stem for path in (tmp_path / "d").glob("*.done")) == [
        "neuron.4.00000",
        "neuron.4.00001",
    ]
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    parsed: list[int] = []
    original: Callable[..., Record] = openai_records.parse

    def counted(content: bytes, group: Group, index: int) -> Record:
        parsed.append(index)
        return original(content, group, index)

    monkeypatch.setattr(openai_records, "parse", counted)
    importing.import_openai(source, tmp_path / "d", Kind.NEURON, "m")
    assert parsed == [12, 0]
    for each in whole.iterdir():
        assert (tmp_path / "d" / each.name).read_bytes() == each.read_bytes()


def test_files_that_changed_meanwhile_are_another_import(source: Path, tmp_path: Path) -> None:
    (source / "4" / "2.json").write_text("{}")
    with pytest.raises(InvalidArgument):
        importing.import_openai(source, tmp_path / "d", Kind.NEURON, "m")
    (source / "4" / "2.json").write_text(json.dumps(neuron(neuron_id={"idx": 2, "layer": 4})))
    with pytest.raises(FailedPrecondition, match="begun from something else"):
        importing.import_openai(source, tmp_path / "d", Kind.NEURON, "m")


def test_nothing_to_import_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no LAYER/INDEX\.json"):
        importing.import_openai(tmp_path, tmp_path / "d", Kind.NEURON, "m")
    with pytest.raises(NotFound, match=r"no batch-N\.json"):
        importing.import_neuronpedia(tmp_path / "nowhere", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_batches_of_several_dictionaries_keep_their_names(tmp_path: Path) -> None:
    for number, layer in ((0, 1), (1, 0)):
        document = json.loads(batch())
        document["layer"] = layer
        (tmp_path / f"batch-{number}.json").write_text(json.dumps(document))
    importing.import_neuronpedia(tmp_path, tmp_path / "d")
    assert [str(group) for group in helpers.opened(tmp_path / "d").groups] == [
        "latent.0-a-b",
        "latent.1-a-b",
    ]
    with pytest.raises(InvalidArgument, match="which one name cannot tell"):
        importing.import_neuronpedia(tmp_path, tmp_path / "e", "one")


def test_records_that_were_imported_are_whole(source: Path, tmp_path: Path) -> None:
    importing.import_openai(source, tmp_path / "d", Kind.NEURON, "m")
    reader = helpers.opened(tmp_path / "d")
    for place in range(reader.records):
        records.check(reader.read(place))
