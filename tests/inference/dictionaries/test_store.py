"""The budget, and who leaves first."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from services.common.errors import FailedPrecondition, NotFound
from services.inference.engine.dictionaries.dictionary import Dictionary
from services.inference.engine.dictionaries.sites import Header
from services.inference.engine.dictionaries.sources import Registered
from services.inference.engine.dictionaries.store import Store
from tests.inference.dictionaries.examples import example

CPU = torch.device("cpu")
SIZE = example("relu").nbytes


class Shelf:
    """Dictionaries a, b, c and how often each was read."""

    def __init__(self) -> None:
        self.reads: Counter[str] = Counter()

    def registered(self) -> list[Registered]:
        return [self._one(id) for id in "abc"]

    def _one(self, id: str) -> Registered:
        def read(_: Header) -> Dictionary:
            self.reads[id] += 1
            return example("relu", seed=ord(id))

        return Registered(example("relu").header, id, False, Path(id), read)

    def store(self, budget: int) -> Store:
        store = Store([], CPU, budget)
        store.registered = {each.set_name: each for each in self.registered()}
        return store


def test_nothing_is_read_before_its_first_use_and_then_once() -> None:
    shelf = Shelf()
    store = shelf.store(3 * SIZE)
    assert not shelf.reads
    assert not store.resident()
    assert store.get("a") is store.get("a")
    assert shelf.reads == {"a": 1}
    assert torch.equal(store.get("b").w_enc, example("relu", seed=ord("b")).w_enc)


def test_the_least_recently_used_leaves_first() -> None:
    shelf = Shelf()
    store = shelf.store(2 * SIZE + 1)
    for id in "abac":
        store.get(id)
    assert list(store.resident()) == ["a", "c"]
    assert sum(store.resident().values()) <= 2 * SIZE + 1
    store.get("b")
    assert shelf.reads == {"a": 1, "b": 2, "c": 1}


def test_one_that_alone_is_too_large_is_refused_with_both_numbers() -> None:
    store = Shelf().store(SIZE - 1)
    with pytest.raises(FailedPrecondition) as caught:
        store.get("a")
    assert f"a need {SIZE:,} bytes together, but {SIZE - 1:,} are available" in str(caught.value)
    assert caught.value.metadata == {
        "needed_bytes": str(SIZE),
        "available_bytes": str(SIZE - 1),
    }


def test_those_in_use_stay() -> None:
    shelf = Shelf()
    store = shelf.store(2 * SIZE)
    with store.using(["a", "b", "a"]) as (first, second, again):
        assert first is again
        assert second is not first
        with pytest.raises(FailedPrecondition, match="a, b, c need"), store.using(["c"]):
            pass
        assert set(store.resident()) == {"a", "b"}
    store.get("c")
    assert set(store.resident()) == {"b", "c"}
    with pytest.raises(FailedPrecondition, match="use fewer at once"), store.using(["a", "b", "c"]):
        pass


def test_a_failed_load_leaves_the_store_as_it_was() -> None:
    store = Shelf().store(SIZE)

    def fail(_: Header) -> Dictionary:
        raise FailedPrecondition("the file has changed")

    store.registered["bad"] = Registered(example("relu").header, "bad", False, Path("bad"), fail)
    store.get("a")
    with pytest.raises(FailedPrecondition, match="has changed"):
        store.get("bad")
    assert store.get("b").latents == 40


def test_an_unknown_id_names_those_there_are() -> None:
    with pytest.raises(NotFound, match="no dictionary 'x' is loaded; there are: a, b, c"):
        Shelf().store(SIZE).get("x")
    with pytest.raises(NotFound, match="there are: none"):
        Store([], CPU, SIZE).get("x")


def test_half_precision_halves_the_budget_used() -> None:
    store = Shelf().store(SIZE)
    half = Store([], CPU, SIZE, dtype=torch.bfloat16)
    half.registered = store.registered
    with half.using(["a", "b"]) as (a, _):
        assert a.w_enc.dtype is torch.bfloat16
    assert sum(half.resident().values()) == SIZE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_from_a_gpu_to_the_host_and_back() -> None:
    shelf = Shelf()
    store = Store([], torch.device("cuda:0"), SIZE, host_budget=SIZE)
    store.registered = {each.set_name: each for each in shelf.registered()}
    for id in "aba":
        assert store.get(id).w_enc.device.type == "cuda"
    assert shelf.reads == {"a": 1, "b": 1}
    for id in "ca":
        store.get(id)
    assert shelf.reads == {"a": 1, "b": 1, "c": 1}
