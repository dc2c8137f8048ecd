"""Harvests of trained models, their heads and latents, against plain hooks on Hugging Face's model
and plain formulas; segments merge to the same."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from services.common.harvest import reading
from services.common.harvest.state import Keep, State, merge
from services.common.settings import DictionarySource, ModelSource
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.harvesting import groups
from services.inference.engine.harvesting.harvest import AskedHarvest, CorpusSequence, Harvest
from services.inference.engine.model import Model
from services.inference.server import load_model
from tests.inference.harvesting import brute
from tests.inference.harvesting.brute import Seen

DEMO = Path(__file__).parents[3] / "demo"
KEEP = Keep(top=5, random=4, strata=6, per_stratum=2, seed=3)
TOKENS = 32
ROUNDING = 1e-5


def harvested(
    model: Model, names: Sequence[str], corpus: Sequence[CorpusSequence]
) -> dict[str, State]:
    asked = AskedHarvest(groups.all_of(names, model.shape), KEEP, tuple(corpus))
    harvest = Harvest(model.hooks, asked)
    for number in range(len(harvest.batches)):
        harvest.batch(number, CancelToken())
    return {str(group): harvest.finish(group, CancelToken()) for group in asked.groups}


def in_segments(
    model: Model, names: Sequence[str], corpus: Sequence[CorpusSequence]
) -> dict[str, State]:
    """The same, of three segments that are merged."""
    parts = [harvested(model, names, corpus[first::3]) for first in range(3)]
    return {
        name: merge(merge(*(part[name] for part in parts[:2])), parts[2][name]) for name in names
    }


def corpus_of(ids: Sequence[int], sequences: int) -> list[CorpusSequence]:
    return [
        CorpusSequence(7 * number, tuple(ids[number * TOKENS : (number + 1) * TOKENS]))
        for number in range(sequences)
    ]


class HasIds(Protocol):
    @property
    def ids(self) -> tuple[int, ...]: ...


def stood(
    folder: Path, corpus: Sequence[HasIds], modules: dict[str, str]
) -> dict[str, list[Tensor]]:
    """What came out of modules, by the names they are asked for, one sequence at a time; of names
    that begin with `into `, what went in. Attention patterns as `pattern L`."""
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    for name, path in modules.items():

        def keep(_: Any, args: Any, output: Any, name: str = name) -> None:
            value = args[0] if name.startswith("into ") else output
            found[name].append((value[0] if isinstance(value, tuple) else value)[0].detach())

        plain.get_submodule(path).register_forward_hook(keep)
    with torch.no_grad():
        for each in corpus:
            output = plain(torch.tensor([each.ids]), output_attentions=True)
            for layer, pattern in enumerate(output.attentions):
                found.setdefault(f"pattern {layer}", []).append(pattern[0])
    return found


def seen(corpus: Sequence[CorpusSequence], activations: Sequence[Tensor]) -> list[Seen]:
    return [
        Seen(each.index, each.ids, values.numpy())
        for each, values in zip(corpus, activations, strict=True)
    ]


def magnitudes(pattern: Tensor, values: Tensor, w_o: Tensor) -> Tensor:
    """[H, T, T], [T, H, dh], [H, dh, d] -> [pairs, H]"""
    lengths = torch.einsum("khw,hwd->khd", values, w_o).norm(dim=-1)
    rows, columns = np.tril_indices(values.shape[0])
    found: Tensor = (pattern * lengths.T[:, None]).permute(1, 2, 0)[rows, columns]
    return found


@pytest.fixture(scope="module")
def demo() -> Model:
    names = ("demo-mlp_out-2", "demo-attn_out-1")
    sources = [DictionarySource(name, str(DEMO / "dictionaries" / name), False) for name in names]
    return load_model(ModelSource("demo", str(DEMO / "model")), None, sources)


@pytest.fixture(scope="module")
def corpus(demo: Model) -> list[CorpusSequence]:
    text = (DEMO / "dictionaries" / "sample.txt").read_text()
    return corpus_of(demo.vocabulary.encode(text, None), 30)


def test_the_demo_s_neurons_and_heads(demo: Model, corpus: list[CorpusSequence]) -> None:
    modules = {"into down": "transformer.h.3.mlp.c_proj", "qkv": "transformer.h.2.attn.c_attn"}
    found = stood(DEMO / "model", corpus, modules)
    states = in_segments(demo, ["neuron.3", "head.2"], corpus)
    brute.check(states["neuron.3"], seen(corpus, found["into down"]), ROUNDING, every_nth=16)
    weights = load_file(DEMO / "model" / "model.safetensors")
    w_o = weights["transformer.h.2.attn.c_proj.weight"].float().view(8, -1, 128)
    pairs = [
        magnitudes(pattern, qkv.chunk(3, dim=-1)[2].reshape(TOKENS, 8, -1), w_o)
        for pattern, qkv in zip(found["pattern 2"], found["qkv"], strict=True)
    ]
    brute.check(states["head.2"], seen(corpus, pairs), ROUNDING)
    # The pattern alone is another number.
    rows, columns = np.tril_indices(TOKENS)
    bare = [pattern.permute(1, 2, 0)[rows, columns] for pattern in found["pattern 2"]]
    with pytest.raises(AssertionError):
        brute.check(states["head.2"], seen(corpus, bare), ROUNDING)


@pytest.mark.parametrize(("name", "module"), [("mlp_out-2", "mlp"), ("attn_out-1", "attn")])
def test_the_demo_s_latents(
    demo: Model, corpus: list[CorpusSequence], name: str, module: str
) -> None:
    layer = name[-1]
    tensors = load_file(DEMO / "dictionaries" / f"demo-{name}" / "sae_weights.safetensors")
    config = (DEMO / "dictionaries" / f"demo-{name}" / "cfg.json").read_text()
    k = int(config.partition('"k":')[2].partition(",")[0])
    latents = []
    for x in stood(DEMO / "model", corpus, {"x": f"transformer.h.{layer}.{module}"})["x"]:
        pre = (x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
        ordered = pre.sort(dim=-1, descending=True).values
        assert (ordered[:, k - 1] - ordered[:, k]).min() > 1e-6  # or rounding decides who is in
        latents.append(torch.where(pre >= ordered[:, k - 1 : k], pre.clamp_min(0), 0))
    group = f"latent.demo-{name}"
    state = in_segments(demo, [group], corpus)[group]
    brute.check(state, seen(corpus, latents), ROUNDING, every_nth=23)
    dead = np.nonzero(state["largest"] == 0)[0]
    assert len(dead)
    assert reading.intervals(state, int(dead[0]), 4) == []
    assert reading.statistics(state).variance[dead].max() == 0


@pytest.mark.shared
def test_stories_neurons_and_grouped_heads(shared_data: Path) -> None:
    folder = shared_data / "stories260k"
    model = load_model(ModelSource("stories", str(folder)), None)
    text = (folder / "EXPECTED-greedy-from-BOS.txt").read_text()
    ids = model.vocabulary.encode(text, None)
    corpus = corpus_of(ids, len(ids) // TOKENS)
    assert len(corpus) > 5
    layer = model.architecture.shape.layers - 1
    prefix = f"model.layers.{layer}"
    modules = {"into down": f"{prefix}.mlp.down_proj", "v": f"{prefix}.self_attn.v_proj"}
    found = stood(folder, corpus, modules)
    states = in_segments(model, [f"neuron.{layer}", f"head.{layer}"], corpus)
    brute.check(states[f"neuron.{layer}"], seen(corpus, found["into down"]), ROUNDING)
    heads, width = model.architecture.n_heads, model.architecture.head_width
    plain: Any = AutoModelForCausalLM.from_pretrained(folder)
    w_o = plain.get_submodule(f"{prefix}.self_attn.o_proj").weight.detach()
    w_o = w_o.T.reshape(heads, width, -1)
    groups_of = heads // model.architecture.n_key_value_heads
    pairs = [
        magnitudes(pattern, v.view(TOKENS, -1, width).repeat_interleave(groups_of, 1), w_o)
        for pattern, v in zip(found[f"pattern {layer}"], found["v"], strict=True)
    ]
    brute.check(states[f"head.{layer}"], seen(corpus, pairs), ROUNDING)
