"""What is written is what is read, and damage is told from it."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tdb.dataset.v1 import record_pb2

from services.common.errors import FailedPrecondition, InvalidArgument, NotFound
from services.dataset import groups, shards
from services.dataset.damage import Damaged
from services.dataset.library import Library
from services.dataset.manifest import Manifest, ManifestError
from services.dataset.storage import LocalFile
from services.dataset.store import DatasetWriter
from tests.dataset import helpers

RECORDS = helpers.random_records(1, helpers.COMPONENTS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    helpers.write(tmp_path / "small", RECORDS)
    return tmp_path / "small"


def read_all(folder: Path) -> list[record_pb2.ComponentRecord | Damaged]:
    reader = helpers.opened(folder)
    found: list[record_pb2.ComponentRecord | Damaged] = []
    while len(found) < reader.records:
        for item in reader.read_many(len(found), 3, 10**6):
            found.append(item if isinstance(item, Damaged) else reader.parse(len(found), item))
    return found


def test_every_record_comes_back_by_place_by_name_and_in_runs(folder: Path) -> None:
    reader = helpers.opened(folder)
    assert reader.records == len(RECORDS)
    assert [reader.component(place) for place in range(reader.records)] == [*helpers.COMPONENTS]
    for place, record in enumerate(RECORDS):
        assert reader.read(place) == record
        assert reader.place(*groups.parse_component(record.component)) == place
    assert read_all(folder) == RECORDS
    for absent in ("neuron.0.20", "neuron.1.3", "neuron.2.0", "head.1.0", "latent.other.0"):
        assert reader.place(*groups.parse_component(absent)) is None


def test_the_files_are_as_documented(folder: Path) -> None:
    index = (folder / "neuron.1.00000.index").read_bytes()
    packed = (folder / "neuron.1.00000.records").read_bytes()
    assert index[:8] == b"TDBINDEX"
    count = int.from_bytes(index[12:16], "little")
    offsets = np.frombuffer(index, "<u8", count + 1, 48)
    checksums = np.frombuffer(index, "<u4", count, 48 + 8 * (count + 1))
    wanted = [record for record in RECORDS if record.component.startswith("neuron.1.")]
    assert count == len(wanted) == 6
    for row, record in enumerate(wanted):
        one = packed[offsets[row] : offsets[row + 1]]
        assert zlib.crc32(one) == checksums[row]
        assert zlib.decompress(one) == record.SerializeToString()
    document = json.loads((folder / "manifest.json").read_bytes())
    assert document["records"] == len(RECORDS)
    shard = next(each for each in document["shards"] if each["name"] == "neuron.1.00000")
    assert shard["runs"] == [[0, 2], [7, 8], [19, 19]]
    import hashlib

    for each in document["shards"]:
        for file in each["files"]:
            content = (folder / file["name"]).read_bytes()
            assert len(content) == file["bytes"]
            assert hashlib.sha256(content).hexdigest() == file["sha256"]
    assert not [path for path in folder.iterdir() if path.suffix in (".done", ".partial", ".lock")]


def test_equal_records_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    helpers.write(tmp_path / "again", RECORDS)
    assert helpers.bytes_of(tmp_path / "again") == helpers.bytes_of(folder)


def test_a_byte_that_flipped_costs_one_record(folder: Path) -> None:
    path = folder / "neuron.0.00001.records"
    place = 7 + 3
    reader = helpers.opened(folder)
    content = bytearray(path.read_bytes())
    offsets = np.frombuffer((folder / "neuron.0.00001.index").read_bytes(), "<u8", 8, 48)
    content[int(offsets[3]) + 20] ^= 1
    path.write_bytes(content)
    with pytest.raises(Damaged) as caught:
        reader.read(place)
    assert caught.value.metadata == {"file": path.name, "component": "neuron.0.10"}
    assert "neuron.0.10 in neuron.0.00001.records does not match its checksum" in str(caught.value)
    found = read_all(folder)
    assert isinstance(found[place], Damaged)
    assert found[:place] + found[place + 1 :] == RECORDS[:place] + RECORDS[place + 1 :]


def test_a_shard_that_was_cut_keeps_what_is_left(folder: Path) -> None:
    path = folder / "neuron.0.00000.records"
    path.write_bytes(path.read_bytes()[:-200])
    found = read_all(folder)
    assert isinstance(found[6], Damaged)
    assert "is shorter than its index says" in str(found[6])
    assert found[0] == RECORDS[0]
    assert found[7:] == RECORDS[7:]


@pytest.mark.parametrize("suffix", [".index", ".records"])
def test_a_missing_file_costs_its_shard(folder: Path, suffix: str) -> None:
    (folder / f"head.0.00000{suffix}").unlink()
    found = read_all(folder)
    heads = [place for place, each in enumerate(RECORDS) if each.component.startswith("head")]
    for place, each in enumerate(found):
        if place in heads:
            assert isinstance(each, Damaged)
            assert each.component == RECORDS[place].component
            assert f"head.0.00000{suffix}" in str(each)
        else:
            assert each == RECORDS[place]


@pytest.mark.parametrize("position", [0, 9, 13, 30, 60, -30, -1])
def test_a_damaged_index_is_noticed_wherever_it_is_hit(folder: Path, position: int) -> None:
    path = folder / "neuron.10.00000.index"
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)
    reader = helpers.opened(folder)
    place = next(n for n, each in enumerate(RECORDS) if each.component == "neuron.10.1")
    with pytest.raises(Damaged, match=r"neuron.10.1 in neuron.10.00000.index"):
        reader.read(place)
    assert reader.read(0) == RECORDS[0]


def test_records_of_another_shard_are_not_taken_for_its_own(folder: Path) -> None:
    for suffix in (".index", ".records"):
        other = (folder / f"neuron.0.00001{suffix}").read_bytes()
        (folder / f"neuron.0.00000{suffix}").write_bytes(other)
    with pytest.raises(Damaged, match="another record than its index says"):
        helpers.opened(folder).read(0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text[:-40], "is damaged"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 2'), "version 2"),
        (lambda text: text.replace("tdb-dataset", "other"), "its format is not tdb-dataset"),
        (lambda text: text.replace('"records": 43', '"records": 44'), "do not add up"),
        (lambda text: "[]", "is damaged"),
        (lambda text: text.replace('"neuron.0.00001"', '"../../x"'), "not named for its group"),
        (lambda text: text.replace('"head.0.00000.records"', '"/etc/x"'), "other files than"),
        (
            lambda text: text.replace('"name": "vocabulary"', '"name": "../x"'),
            "not called vocabulary",
        ),
    ],
)
def test_a_manifest_that_cannot_be_read_is_said(folder: Path, change: object, says: str) -> None:
    path = folder / "manifest.json"
    path.write_text(change(path.read_text()))  # type: ignore[operator]
    with pytest.raises(ManifestError, match=says):
        Manifest.read(folder)
    with pytest.raises(FailedPrecondition, match="cannot be served"):
        Library(folder.parent).open("small")


def test_a_folder_without_a_manifest_is_no_dataset(tmp_path: Path) -> None:
    group = groups.parse("neuron.0")
    with DatasetWriter(tmp_path / "half", helpers.header()) as writer:
        writer.write(group, 0, RECORDS[:3])
        library = Library(tmp_path)
        assert library.names() == []
        with pytest.raises(NotFound, match="there is none yet"):
            library.open("half")
        writer.finish()
    assert library.names() == ["half"]
    assert library.open("half").records == 3


def test_one_writer_at_a_time_and_one_dataset_per_name(tmp_path: Path) -> None:
    folder, group = tmp_path / "one", groups.parse("neuron.0")
    with DatasetWriter(folder, helpers.header(), {"seed": 1}) as writer:
        with (
            pytest.raises(FailedPrecondition, match="being written by another process"),
            DatasetWriter(folder, helpers.header(), {"seed": 1}),
        ):
            pass
        writer.write(group, 0, RECORDS[:3])
    with (
        pytest.raises(FailedPrecondition, match="begun from something else"),
        DatasetWriter(folder, helpers.header(), {"seed": 2}),
    ):
        pass
    with DatasetWriter(folder, helpers.header(), {"seed": 1}) as writer:
        assert writer.has(group, 0)
        assert not writer.has(group, 1)
        writer.finish()
    with (
        pytest.raises(FailedPrecondition, match="there is a dataset 'one' already"),
        DatasetWriter(folder, helpers.header(), {"seed": 1}),
    ):
        pass


def changed(**fields: object) -> record_pb2.ComponentRecord:
    copy = record_pb2.ComponentRecord()
    copy.CopyFrom(RECORDS[0])
    for path, value in fields.items():
        target: Any = copy
        *parents, name = path.split("__")
        for parent in parents:
            target = target[int(parent)] if parent.isdigit() else getattr(target, parent)
        if isinstance(value, list):
            target.ClearField(name)
            getattr(target, name).extend(value)
        else:
            setattr(target, name, value)
    return copy


NAN = float("nan")


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (changed(component="neuron.0.0~3"), "component"),
        (changed(component="embed"), "component"),
        (changed(component="mlp.0"), "component"),
        (changed(component=""), "component"),
        (changed(top__0__activations=[1.0]), "top[0].activations"),
        (changed(top__0__activations=[NAN] * 8), "top[0].activations"),
        (changed(random__1__token_ids=[]), "random[1]"),
        (changed(random__1__token_ids=[-1] * 8), "random[1].token_ids"),
        (changed(random__1__token_texts=["a"] * 8), "random[1]"),
        (changed(quantiles__0__examples__0__pair_width=3), "quantiles[0].examples[0].pair_activ"),
        (changed(top__2__activations=[9.0] * 8), "top"),
        (changed(random__0__document_offset=-1), "random[0].document_offset"),
        (changed(statistics__mean=float("inf")), "statistics.mean"),
        (changed(statistics__fraction_active=1.5), "statistics.fraction_active"),
        (changed(statistics__variance=-1.0), "statistics.variance"),
        (changed(statistics__scale=0.0), "statistics.scale"),
        (changed(token_statistics__1__mean=9.0), "token_statistics"),
        (changed(token_statistics__0__mean=NAN), "token_statistics"),
        (changed(token_statistics__0__count=0), "token_statistics"),
        (changed(token_statistics__0__token_id=-1), "token_statistics"),
        (changed(token_statistics__0__token_id=1), "token_statistics"),
        (changed(token_statistics__0__token_text="a"), "token_statistics"),
        (changed(key_token_statistics=list(RECORDS[0].token_statistics)), "key_token_stat"),
        (changed(statistics__histogram__counts=[1]), "statistics.histogram"),
        (changed(statistics__histogram__edges=[0.0, 0.0, 1.0]), "statistics.histogram"),
    ],
)
def test_a_record_that_is_not_whole_is_never_written(
    tmp_path: Path, record: record_pb2.ComponentRecord, field: str
) -> None:
    with (
        DatasetWriter(tmp_path / "d", helpers.header()) as writer,
        pytest.raises(InvalidArgument) as caught,
    ):
        writer.write(groups.parse("neuron.0"), 0, [record])
    assert caught.value.field.startswith(field)
    assert not writer.has(groups.parse("neuron.0"), 0)
    assert not list((tmp_path / "d").glob("*.partial"))


def test_heads_have_the_triangle_or_its_band() -> None:
    from services.dataset import records

    for tokens, width in ((1, None), (5, None), (5, 1), (5, 3), (5, 4)):
        pairs = [
            (q, k) for q in range(tokens) for k in range(q + 1) if width is None or q - k < width
        ]
        assert records.pair_count(tokens, width) == len(pairs)
        query, key = records.pair_places(tokens, width)
        assert list(zip(query.tolist(), key.tolist(), strict=True)) == pairs


def test_long_addresses_are_read_as_others(tmp_path: Path) -> None:
    names = [f"latent.{'d' * length}.7" for length in (1, 119, 120, 130, 190)]
    made = helpers.random_records(3, names)
    assert max(len(name) for name in names) > 128
    helpers.write(tmp_path / "d", made)
    assert read_all(tmp_path / "d") == made


def test_order_and_groups_are_held(tmp_path: Path) -> None:
    group = groups.parse("neuron.0")
    with DatasetWriter(tmp_path / "d", helpers.header()) as writer:
        with pytest.raises(InvalidArgument, match=r"neuron\.0\.1 comes after neuron\.0\.1"):
            writer.write(group, 0, [RECORDS[1], RECORDS[1]])
        with pytest.raises(InvalidArgument, match=r"does not belong to neuron\.1"):
            writer.write(groups.parse("neuron.1"), 0, RECORDS[:1])
        with pytest.raises(InvalidArgument, match="would be empty"):
            writer.write(group, 0, [])
        writer.write(group, 0, RECORDS[3:5])
        writer.write(group, 1, RECORDS[4:6])
        with pytest.raises(InvalidArgument, match="overlap"):
            writer.finish()


def test_ids_and_text_do_not_mix(tmp_path: Path) -> None:
    text = changed(component="neuron.0.1", random=[], top=[], quantiles=[])
    text.top.add(token_texts=["a", "b"], activations=[1.0, 2.0])
    group = groups.parse("neuron.0")
    with DatasetWriter(tmp_path / "d", helpers.header()) as writer:
        with pytest.raises(InvalidArgument, match="some examples have token ids"):
            writer.write(group, 0, [RECORDS[0], text])
        writer.write(group, 0, RECORDS[:1])
        writer.write(group, 1, [text])
        with pytest.raises(InvalidArgument, match="some shards have token ids"):
            writer.finish()


def test_a_disk_that_refuses_is_a_sentence_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = groups.parse("neuron.0")
    with DatasetWriter(tmp_path / "d", helpers.header()) as writer:
        writer.write(group, 0, RECORDS[:3])

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr("services.dataset.files.os.fsync", full)
            with pytest.raises(FailedPrecondition, match="No space left on device"):
                writer.write(group, 1, RECORDS[3:6])
        assert writer.has(group, 0)
        assert not writer.has(group, 1)
        writer.write(group, 1, RECORDS[3:6])
        writer.finish()
    assert read_all(tmp_path / "d") == RECORDS[:6]


def test_open_shards_are_bounded_and_closed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr("services.dataset.reader.OPEN_SHARDS", 2)
    before = psutil.Process().num_fds()
    reader = helpers.opened(folder)
    for place in range(reader.records):
        reader.read(place)
    assert psutil.Process().num_fds() <= before + 2
    del reader
    assert psutil.Process().num_fds() == before


def test_a_bomb_is_not_unpacked(folder: Path) -> None:
    bomb = zlib.compress(bytes(64 * 2**20))
    (folder / "neuron.0.00000.records").write_bytes(bomb)
    index = bytearray((folder / "neuron.0.00000.index").read_bytes())
    index[48 : 48 + 64] = np.array([0] + [len(bomb)] * 7, "<u8").tobytes()
    index[112:116] = zlib.crc32(bomb).to_bytes(4, "little")
    index[-4:] = zlib.crc32(bytes(index[:-4])).to_bytes(4, "little")
    (folder / "neuron.0.00000.index").write_bytes(index)
    file = LocalFile(folder / "neuron.0.00000.records")
    shard = shards.Shard("neuron.0.00000", bytes(index), file)
    with pytest.raises(Damaged):
        shard.read(0, "neuron.0.0")


def test_the_page_s_program_reads_a_record(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text()
    program = page.partition("```python\n")[2].partition("```")[0]
    given = '"~/.local/share/tdb/datasets/gpt2-neurons"'
    assert given in program
    found: dict[str, Any] = {}
    exec(program.replace(given, repr(str(folder))), found)
    assert found["record"] == RECORDS[3]
