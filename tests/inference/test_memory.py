"""Estimates of memory against what the allocator gave: never less than that, and at most twice as
much, or what a test says.

The peaks are torch's own, over passes of random models of sizes at which tensors outweigh what is
fixed; nothing here shares a formula with the engine.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from services.common.addresses import parse
from services.inference.engine import (
    attention,
    integrated,
    memory,
    needs,
    table_memory,
    tables,
    verification,
)
from services.inference.engine.architecture import resolve
from services.inference.engine.asked import AskedRun, ReadPoints
from services.inference.engine.attribution import ExplainedRun, NormMode, explain
from services.inference.engine.batches import Batches
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import Row
from services.inference.engine.columns import Column
from services.inference.engine.dictionaries.sites import Point as SitePoint
from services.inference.engine.forward import Hooks
from services.inference.engine.interventions import Edit, Intervention, Mask, Zero
from services.inference.engine.memory import Batch, Latents, Sizes
from services.inference.engine.needs import Rows
from services.inference.engine.objectives import LogitDiff
from services.inference.engine.points import Point
from services.inference.engine.readouts import read_out
from services.inference.engine.room import UNLIMITED
from services.inference.engine.table_memory import Listing
from services.inference.engine.verification import Ablation
from tests.inference import planted
from tests.inference.helpers import Engine, shelf_of
from tests.inference.peak import peak_bytes

WIDTH, HEADS, LAYERS, NEURONS, VOCABULARY = 64, 4, 3, 256, 300
SHARED = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "hidden_size": WIDTH,
    "intermediate_size": NEURONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _config(family: str) -> PretrainedConfig:
    match family:
        case "gpt2":
            return GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=512,
                n_embd=WIDTH,
                n_layer=LAYERS,
                n_head=HEADS,
                bos_token_id=None,
                eos_token_id=None,
            )
        case "llama":
            return LlamaConfig(**SHARED)
        case "gpt_neox":
            return GPTNeoXConfig(**{k: v for k, v in SHARED.items() if k != "num_key_value_heads"})
        case "gemma2":
            return Gemma2Config(**SHARED, head_dim=32)
        case "qwen3":
            return Qwen3Config(**SHARED, head_dim=16)
        case _:
            return MixtralConfig(**SHARED, num_local_experts=4, num_experts_per_tok=2)


@cache
def engine_of(family: str, dtype: torch.dtype = torch.float32) -> Engine:
    torch.manual_seed(0)
    config = _config(family)
    config._attn_implementation = attention.IMPLEMENTATION
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)
    architecture = resolve(model)
    return Engine(Hooks(model, architecture), architecture)


def run_of(tokens: int, edits: Sequence[Edit] = ()) -> ExplainedRun:
    ids = tuple(number % VOCABULARY for number in range(tokens))
    return ExplainedRun(ids, tuple(edits), LogitDiff((5,), (9,), tokens - 1))


def zeroed(engine: Engine, tokens: int, *targets: str) -> tuple[Edit, ...]:
    return engine.edits(*(Intervention(parse(each), Zero()) for each in targets), tokens=tokens)


def ratio(estimate: int, work: Callable[[], Any]) -> float:
    return estimate / peak_bytes(work)


def of_pass(family: str, rows: int, tokens: int, logits: int = 1, branches: bool = False) -> float:
    engine = engine_of(family)
    sizes = Sizes.of(engine.architecture)
    batch = Batch(rows, tokens, logits=logits, branches=branches)
    return ratio(
        memory.passed(sizes, batch),
        lambda: engine.hooks.run(
            [Row(run_of(tokens).token_ids)] * rows,
            range(logits),
            gradients=False,
            branches=branches,
        ),
    )


def tabled(
    engine: Engine,
    runs: Sequence[ExplainedRun],
    column: Column | None = Column.TOTAL_EFFECT,
    norm_mode: NormMode = NormMode.FINAL_NORM_FROZEN,
    dictionaries: Sequence[str] = (),
    read_outs: int = 0,
    top_k: int = 20,
) -> Callable[[], Any]:
    def work() -> Any:
        modes = [norm_mode] * len(runs)
        explanations, _ = explain(
            engine.hooks, engine.architecture, runs, modes, CancelToken(), dictionaries
        )
        table = tables.build(explanations[:2], tables.Ranking(column, top_k))
        nodes = [row.node for row in table.rows[:read_outs]]
        found = read_out(engine.architecture, explanations[0], nodes, 5, 300) if nodes else {}
        return explanations, table, found

    return work


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("rows", "tokens", "logits"), [(1, 12, 12), (3, 40, 1), (2, 200, 8)])
def test_passes_without_gradients(family: str, rows: int, tokens: int, logits: int) -> None:
    assert 1 <= of_pass(family, rows, tokens, logits, branches=tokens == 40) < 2


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2", "qwen3", "mixtral"])
@pytest.mark.parametrize(("rows", "tokens"), [(2, 24), (1, 256)])
def test_tables(family: str, rows: int, tokens: int) -> None:
    engine = engine_of(family)
    sizes = Sizes.of(engine.architecture)
    column = Column.TOTAL_EFFECT if rows > 1 else None
    mode = NormMode.FINAL_NORM_FROZEN if column else NormMode.ALL_NORMS_FROZEN
    listing = Listing(20, 1 if column else 4)
    estimate = table_memory.table(sizes, Batch(rows, tokens, gradients=True), listing)
    # How many tokens each expert gets is not known beforehand.
    most = 2.2 if family == "mixtral" else 2
    assert 1 <= ratio(estimate, tabled(engine, [run_of(tokens)] * rows, column, mode)) < most


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tables_in_half_precision(family: str) -> None:
    """Softmax and norms are float32 there too in Llama, not in GPT-2."""
    engine = engine_of(family, torch.bfloat16)
    sizes = Sizes.of(engine.architecture)
    estimate = table_memory.table(sizes, Batch(2, 64, gradients=True), Listing(20))
    assert 1 <= ratio(estimate, tabled(engine, [run_of(64)] * 2)) < 2.5


def test_without_the_quadratic_term_long_prompts_are_underestimated() -> None:
    engine, tokens = engine_of("gpt2"), 384
    sizes = Sizes.of(engine.architecture)
    peak = peak_bytes(tabled(engine, [run_of(tokens)]))
    short = table_memory.table(sizes, Batch(1, 12, gradients=True), Listing(20))
    linear = short * tokens // 12
    whole = table_memory.table(sizes, Batch(1, tokens, gradients=True), Listing(20))
    assert linear < peak <= whole


def test_tables_of_edited_runs() -> None:
    """Copies of edited sites, patterns kept twice, a mask that runs its layer's attention twice."""
    engine, tokens = engine_of("llama"), 96
    sizes = Sizes.of(engine.architecture)
    edits = (
        *zeroed(engine, tokens, "head.0.1", "head.1.2~7-3", "attn.0", "resid_post.1", "neuron.2.5"),
        *engine.edits(Intervention(parse("head.2.1~9-4"), Mask()), tokens=tokens),
    )
    estimate = table_memory.table(sizes, Batch(1, tokens, gradients=True, edits=edits), Listing(20))
    assert 1 <= ratio(estimate, tabled(engine, [run_of(tokens, edits)])) < 2


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_tables_with_dictionaries(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted, "LATENTS", 1024)
    engine, tokens = engine_of("gpt2"), 40
    sizes = Sizes.of(engine.architecture)
    dictionaries = [
        planted.random_dictionary(
            f"{point}-{layer}", point, layer, activation, width=lambda point: WIDTH
        )
        for layer in range(LAYERS)
        for point in (SitePoint.MLP_OUT, SitePoint.ATTN_OUT)
    ]
    shelf = shelf_of(dictionaries, engine.architecture, torch.float32)
    monkeypatch.setattr(engine.hooks, "shelf", shelf)
    # TOPK takes 6 of 1024; without a self-test all are taken to be active.
    l0 = 6.0 if activation == "topk" else None
    latents = tuple(Latents.of(each.header, l0) for each in dictionaries)
    estimate = table_memory.table(
        sizes, Batch(1, tokens, gradients=True, dictionaries=latents), Listing(20)
    )
    names = [each.id for each in dictionaries]
    work = tabled(engine, [run_of(tokens)], dictionaries=names)
    assert 1 <= ratio(estimate, work) < 3


def test_read_outs() -> None:
    engine, tokens = engine_of("llama"), 24
    sizes = Sizes.of(engine.architecture)
    estimate = table_memory.table(
        sizes, Batch(1, tokens, gradients=True), Listing(400, read_out_rows=400)
    )
    work = tabled(engine, [run_of(tokens)], read_outs=400, top_k=400)
    assert 1 <= ratio(estimate, work) < 2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("targets", "position"), [("head.{}.{}", 127), ("neuron.{}.{}~90", 120)])
def test_verification(family: str, targets: str, position: int) -> None:
    """A recording, and chunks that go on from it."""
    engine = engine_of(family)
    sizes = Sizes.of(engine.architecture)
    run = replace(run_of(128), objective=LogitDiff((5,), (9,), position))
    names = [targets.format(layer, index) for layer in range(LAYERS) for index in range(4)]
    edits = zeroed(engine, 128, *names)
    ablations = [Ablation(parse(name), edit) for name, edit in zip(names, edits, strict=True)]
    begun: list[verification.Verification] = []

    def begin() -> None:
        begun.append(verification.begin(engine.hooks, run, ablations, CancelToken(), 10**6))

    recording = memory.recorded(sizes, 128) + memory.running(sizes, Batch(1, 128))
    assert 1 <= ratio(recording, begin) < 2
    (started,) = begun
    number, chunk = next(each for each in enumerate(started.chunks) if each[1].start)
    batch = Batch(len(chunk.ablations), position + 1, edits=edits)
    estimate = memory.resumed(sizes, batch, first=chunk.first)
    # The layers before the first change are not run, which the estimate does not count on.
    assert 1 <= ratio(estimate, lambda: started.chunk(number, CancelToken())) < 3


@pytest.mark.parametrize("name", ["attn_scores", "mlp_act", "logits"])
def test_runs_whose_points_are_read(name: str) -> None:
    engine, tokens = engine_of("llama"), 96
    points = [Point(name)] if name == "logits" else [Point(name, n) for n in range(LAYERS)]
    ids = run_of(tokens).token_ids
    lens = (Point("resid_post", 1),)
    asked = AskedRun(ids, (), tuple(range(tokens)), 5, (), ReadPoints(lens, tuple(points)))
    estimate = needs.of_runs(engine.hooks, [asked])
    batches = Batches(engine.hooks, VOCABULARY)
    assert 1 <= ratio(estimate, lambda: batches.run([asked], CancelToken())) < 2.5


def test_integration() -> None:
    """A recording, sums in float64 of all sublayers at most, and one point of the way."""
    engine, tokens = engine_of("gpt2"), 96
    nodes = [parse("head.1.2~50-3"), parse("neuron.0.3~9"), parse("embed~3")]
    run = run_of(tokens)
    engine.hooks.room.budget = 1  # one point at a time

    def integrate() -> integrated.Integration:
        begun = integrated.begin(engine.hooks, run, nodes, 2, CancelToken())
        for number in range(len(begun.chunks)):
            begun.chunk(number, CancelToken())
        return begun

    estimate = needs.integration(engine.hooks, Rows((tokens,)), starts=False)
    try:
        assert 1 <= ratio(estimate, integrate) < 2.5
    finally:
        engine.hooks.room.budget = UNLIMITED


def test_what_autograd_saves_of_an_activation() -> None:
    """Input and output of one kernel; of a composed function its steps."""
    assert memory.saved_by(torch.nn.functional.relu) == 2
    assert memory.saved_by(torch.nn.functional.silu) == 2
    assert memory.saved_by(lambda x: 0.5 * x * (1 + torch.tanh(x + x.pow(3)))) == 5
