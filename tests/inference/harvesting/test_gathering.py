"""Running states against brute force, fed with made-up activations: no model in between."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.addresses import Kind
from services.common.errors import FailedPrecondition
from services.common.harvest import bins, reading
from services.common.harvest.state import Keep, State, merge
from services.inference.engine.harvesting import gathering, kept
from services.inference.engine.harvesting.counts import binned
from services.inference.engine.harvesting.gathering import Gathering
from services.inference.engine.harvesting.groups import Group
from services.inference.engine.harvesting.scratch import Scratch
from services.inference.engine.harvesting.token_sums import Located
from tests.inference.harvesting import brute
from tests.inference.harvesting.brute import Seen

GROUP = Group(Kind.NEURON, 2, "", 5)
KEEP = Keep(top=3, random=2, strata=2, per_stratum=2, seed=11)
TOKENS = (1, 4, 7)
EXACT = (
    *("sequences", "lengths", "smallest", "largest", "histogram", "maxima"),
    *("top_keys", "top_activations", "random_keys", "random_activations"),
    *("strata_keys", "strata_activations", "tokens", "token_counts"),
)


def gathered(
    seen: Sequence[Seen],
    batch: int = 3,
    keep: Keep = KEEP,
    longest: int | None = None,
    group: Group = GROUP,
) -> State:
    """The state of sequences in batches of equal length, in the order given."""
    longest = longest or max(len(each.ids) for each in seen)
    indices = torch.tensor([each.index for each in seen])
    scratch = Scratch(torch.device("cpu"))
    state = Gathering(group, keep, indices, longest, torch.tensor(TOKENS), scratch)
    for length in sorted({len(each.ids) for each in seen}):
        same = [each for each in seen if len(each.ids) == length]
        for first in range(0, len(same), batch):
            part = same[first : first + batch]
            values = torch.from_numpy(np.stack([each.activations for each in part]))
            state.add(
                values,
                torch.tensor([each.index for each in part]),
                {"token": Located(torch.tensor(TOKENS), torch.tensor([each.ids for each in part]))},
            )
    ordered = sorted(seen, key=lambda each: each.index)
    return state.finish(
        torch.tensor([each.index for each in ordered]),
        torch.tensor([len(each.ids) for each in ordered]),
    )


def normal(count: int, tokens: int = 6, seed: int = 0, components: int = 5) -> list[Seen]:
    random = np.random.default_rng(seed)
    return [
        Seen(
            int(index),
            tuple(random.integers(0, 9, tokens)),
            random.normal(size=(tokens, components)).astype(np.float32),
        )
        for index in random.permutation(3 * count)[:count]
    ]


SPECIAL = [0.0, -0.0, 1.0, -1.0, 1.5, 0.75, 2.0**-16, -(2.0**-16), 2.0**20, -(2.0**21), 3e-9, 7.25]
VALUES = st.sampled_from(SPECIAL) | st.floats(-1e6, 1e6, width=32)


@st.composite
def corpora(draw: Any, most: int = 9) -> list[Seen]:
    indices = draw(st.lists(st.integers(0, 40), min_size=2, max_size=most, unique=True))
    found = []
    for index in indices:
        tokens = draw(st.integers(1, 3))
        values = draw(st.lists(VALUES, min_size=5 * tokens, max_size=5 * tokens))
        ids = tuple(draw(st.lists(st.integers(0, 8), min_size=tokens, max_size=tokens)))
        found.append(Seen(index, ids, np.array(values, np.float32).reshape(tokens, 5)))
    return found


def same(one: State, other: State) -> None:
    assert (one.group, one.keep, one.count, one.window) == (
        other.group,
        other.keep,
        other.count,
        other.window,
    )
    assert one.arrays.keys() == other.arrays.keys()
    for name in EXACT:
        assert np.array_equal(one[name], other[name]), name
    size = np.maximum(np.abs(one["smallest"]), np.abs(one["largest"])).astype(np.float64)
    for name, power in (("mean", 1), ("m2", 2), ("m3", 3), ("m4", 4)):
        scale = one.count ** (power > 1) * size**power + 1e-300
        assert (np.abs(one[name] - other[name]) <= 1e-12 * scale).all(), name
    np.testing.assert_allclose(one["token_sums"], other["token_sums"], rtol=1e-9, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(corpora())
def test_a_state_is_what_brute_force_finds(seen: list[Seen]) -> None:
    brute.check(gathered(seen), seen)


def test_many_sequences_in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_AT_ONCE", "_MAXIMA_AT_ONCE"):
        monkeypatch.setattr(gathering, name, 20)
    monkeypatch.setattr(kept, "_AT_ONCE", 20)
    seen = normal(200)
    state = gathered(seen)
    brute.check(state, seen)
    assert state["top_keys"].shape == (5, 3)


@settings(deadline=None, max_examples=60)
@given(corpora(), st.data())
def test_any_split_merges_to_the_state_of_all(seen: list[Seen], data: st.DataObject) -> None:
    longest = max(len(each.ids) for each in seen)
    cut = data.draw(st.integers(1, len(seen) - 1))
    shuffled = data.draw(st.permutations(seen))
    first, second = gathered(shuffled[:cut]), gathered(shuffled[cut:])
    whole = gathered(seen, longest=longest)
    same(merge(first, second), whole)
    same(merge(second, first), whole)


def test_many_segments_merge_in_any_order() -> None:
    seen = normal(90, seed=3)
    parts = [gathered(seen[first : first + 10]) for first in range(0, 90, 10)]
    forwards, backwards = parts[0], parts[-1]
    for part in parts[1:]:
        forwards = merge(forwards, part)
    for part in parts[-2::-1]:
        backwards = merge(part, backwards)
    whole = gathered(seen)
    same(forwards, whole)
    same(backwards, whole)
    brute.check(forwards, seen)


@settings(deadline=None, max_examples=30)
@given(corpora(), st.data())
def test_the_order_of_sequences_is_irrelevant(seen: list[Seen], data: st.DataObject) -> None:
    same(gathered(data.draw(st.permutations(seen)), batch=1), gathered(seen, batch=4))


def test_what_does_not_go_together_does_not_merge() -> None:
    seen = normal(8)
    one, other = gathered(seen[:4]), gathered(seen[4:])
    with pytest.raises(ValueError, match=f"sequence {one['sequences'][0]} is in both"):
        merge(one, one)
    with pytest.raises(ValueError, match="different group"):
        merge(one, replace(other, group="neuron.1"))
    with pytest.raises(ValueError, match="different keep"):
        merge(one, gathered(seen[4:], keep=replace(KEEP, seed=12)))
    tokens = {**other.arrays, "tokens": np.array([1, 4, 8], np.int32)}
    with pytest.raises(ValueError, match="different tokens"):
        merge(one, replace(other, arrays=tokens))


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    seen = [replace(each, activations=each.activations + 1000) for each in normal(60)]
    state = gathered(seen)
    brute.check(state, seen)
    # The sums of plain powers would be off by more than the whole of the fourth moment.
    values = np.concatenate([each.activations for each in seen])[:, 0]
    s = [float((values.astype(np.float32) ** power).sum()) / len(values) for power in range(5)]
    plain = s[4] - 4 * s[1] * s[3] + 6 * s[1] ** 2 * s[2] - 3 * s[1] ** 4
    variance = reading.statistics(state).variance[0]
    assert abs(plain / variance**2 - reading.statistics(state).kurtosis[0]) > 1


@pytest.mark.parametrize("scale", [1e-15, 1e-9, 1e12, 1e30])
def test_moments_of_any_size(scale: float) -> None:
    seen = [replace(each, activations=each.activations * np.float32(scale)) for each in normal(40)]
    for each in seen:
        each.activations[:, 1] /= np.float32(scale)  # a usual one beside them
    state = gathered(seen)
    ours, plain = reading.statistics(state), reading.statistics(gathered(normal(40)))
    np.testing.assert_allclose(ours.kurtosis, plain.kurtosis, rtol=1e-4)
    np.testing.assert_allclose(ours.skewness, plain.skewness, rtol=1e-4, atol=1e-5)


def test_what_is_not_finite_is_refused() -> None:
    seen = normal(4)
    seen[2].activations[1, 3] = np.nan
    with pytest.raises(FailedPrecondition, match=r"neuron\.2 are not finite"):
        gathered(seen)


def test_bins_are_read_off_bits_as_by_the_edges() -> None:
    random = np.random.default_rng(0)
    edges = bins.EDGES[1:-1].astype(np.float32)
    values = np.concatenate(
        [
            edges,
            np.nextafter(edges, np.float32(np.inf)),
            np.nextafter(edges, np.float32(-np.inf)),
            (random.normal(size=500) * 10 ** random.uniform(-9, 9, 500)).astype(np.float32),
        ]
    )
    expected = [brute.bin_of(float(value)) for value in values]
    assert bins.of(values).tolist() == expected
    assert binned(torch.from_numpy(values)).tolist() == expected
    assert (min(expected), max(expected)) == (0, bins.BINS - 1)


def test_draws_are_uniform_and_differ_between_components() -> None:
    keep = Keep(top=1, random=20, strata=0, seed=5)
    group = replace(GROUP, components=200)
    seen = [Seen(index, (1,), np.full((1, 200), index, np.float32)) for index in range(100)]
    state = gathered(seen, 10, keep, group=group)
    drawn = [[each.sequence for each in reading.random(state, n)] for n in range(200)]
    assert all(len(set(each)) == 20 for each in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=100)
    # 200 components draw 20 of 100: 40 each, with a deviation of 5.7.
    assert counts.min() > 20
    assert counts.max() < 60
    assert len({tuple(each) for each in drawn}) == 200
    other = gathered(seen, 10, replace(keep, seed=6), group=group)
    assert [each.sequence for each in reading.random(other, 0)] != drawn[0]


def test_sums_by_token() -> None:
    seen = normal(30)
    state = gathered(seen)
    ids = np.concatenate([each.ids for each in seen])
    values = np.concatenate([each.activations for each in seen]).astype(np.float64)
    for component in range(5):
        found = reading.tokens(state, component)
        assert {each.token for each in found} == set(TOKENS)
        for each in found:
            here = values[ids == each.token, component]
            assert each.count == len(here)
            assert each.mean == pytest.approx(here.mean(), abs=1e-7)
        assert found == sorted(found, key=lambda each: -each.total)


def held(thing: object, seen: set[int]) -> int:
    """Bytes of all tensors that an object refers to."""
    if isinstance(thing, torch.Tensor):
        storage = thing.untyped_storage()
        known = storage.data_ptr() in seen
        seen.add(storage.data_ptr())
        return 0 if known else storage.nbytes()
    parts = thing.values() if isinstance(thing, dict) else vars(thing).values()
    return sum(held(part, seen) for part in parts if holds_tensors(part))


def holds_tensors(thing: object) -> bool:
    ours = type(thing).__module__.startswith(gathering.__name__.rpartition(".")[0])
    return ours or isinstance(thing, torch.Tensor | dict)


@pytest.mark.parametrize("kind", [Kind.NEURON, Kind.HEAD])
def test_memory_is_what_is_said_and_does_not_grow_with_sequences(kind: Kind) -> None:
    group = Group(kind, 0, "", 64)
    for sequences in (100, 100_000):
        tokens = torch.arange(50)
        scratch = Scratch(tokens.device)
        found = held(Gathering(group, Keep(), torch.arange(sequences), 16, tokens, scratch), set())
        said = group.bytes(Keep(), sequences, 16, 50)
        assert found <= said <= 1.2 * found
        assert said == group.bytes(Keep(), 100, 16, 50)


def test_intervals_split_the_positive_maxima_by_quantile() -> None:
    seen = normal(300, tokens=2)
    keep = Keep(top=1, random=0, strata=64, per_stratum=3)
    state = gathered(seen, 16, keep)
    for component in range(5):
        maxima = {each.index: float(each.activations[:, component].max()) for each in seen}
        positive = sorted(value for value in maxima.values() if value > 0)
        found = reading.intervals(state, component, 4)
        assert 2 <= len(found) <= 4
        assert sum(each.sequences for each in found) == len(positive)
        for number in range(1, 4):  # each boundary by brute force
            boundary = next(
                edge
                for edge in bins.EDGES
                if sum(value < edge for value in positive) >= len(positive) * number / 4
            )
            assert boundary in {each.lower for each in found} | {found[0].upper}
        values = np.concatenate([each.activations[:, component] for each in seen])
        for each in found:
            inside = [index for index, value in maxima.items() if each.lower <= value < each.upper]
            if each is found[0]:
                inside.append(max(maxima, key=lambda index: maxima[index]))
            assert each.sequences == len(set(inside))
            drawn = sorted(
                set(inside),
                key=lambda index: (
                    brute.draw(0, "neuron.2", "strata", component, index) >> 40,
                    index,
                ),
            )
            assert [example.sequence for example in each.examples] == drawn[:3]
            upper = np.inf if each is found[0] else each.upper
            share = ((values >= each.lower) & (values < upper)).mean()
            assert each.fraction == pytest.approx(share)
    dead = [replace(each, activations=np.minimum(each.activations, 0)) for each in seen]
    assert reading.intervals(gathered(dead, 16, keep), 0, 4) == []


def test_histograms_are_cut_to_where_values_are() -> None:
    seen = normal(50)
    seen[0].activations[0, 0] = 2.0**22
    edges, counts = reading.histogram(gathered(seen), 0)
    values = np.concatenate([each.activations for each in seen])[:, 0]
    assert (counts[0] > 0, counts[-1]) == (True, 1)
    assert edges[-1] == 2.0**22
    assert (np.diff(edges) > 0).all()
    assert np.isfinite(edges).all()
    assert counts.sum() == len(values)
    constant = [replace(each, activations=0 * each.activations - 2.0**20) for each in seen]
    edges, counts = reading.histogram(gathered(constant), 0)
    assert (np.diff(edges) > 0).all()
    assert counts.tolist() == [300]
