"""Dictionaries in the forward pass: nothing changes unedited, edits do exactly what they say."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from services.common.addresses import parse
from services.inference.engine.captured import Row
from services.inference.engine.dictionaries.dictionary import Dictionary, InputNorm, NormKind
from services.inference.engine.dictionaries.sites import Point
from services.inference.engine.interventions import (
    Intervention,
    Mean,
    Operation,
    Patch,
    Scale,
    SetTo,
    Source,
    Zero,
)
from tests.inference import plain
from tests.inference.helpers import FAMILIES, in_float64, random_engine, random_model
from tests.inference.planted import ACTIVATIONS, ByHand, random_dictionary

__all__ = ["in_float64"]

IDS = (3, 17, 4, 4, 25, 60, 8, 1)
DOUBLE = torch.float64
WRITERS = (Point.Z, Point.ATTN_OUT, Point.MLP_ACT, Point.MLP_OUT)
VIEWS = (Point.RESID_PRE, Point.RESID_MID, Point.RESID_POST)
PLAIN = {
    Point.Z: "z",
    Point.ATTN_OUT: "attn",
    Point.MLP_ACT: "neurons",
    Point.MLP_OUT: "mlp",
    Point.RESID_MID: "resid_mid",
    Point.RESID_POST: "resid_post",
}


def by_hand(
    model: Any,
    dictionary: Dictionary,
    change: Callable[[ByHand, Tensor, Tensor], Tensor],
    held: plain.Scales | None = None,
    seen: dict[str, Tensor] | None = None,
    ids: tuple[int, ...] = IDS,
) -> Tensor:
    """Logits [T, V] of the pass written by hand; `change(formulas, x, target)` is what is added
    at the dictionary's output site, [T, d_out]. `seen` gets what stands at each kind of site last.
    """
    formulas = ByHand(dictionary)
    seen = {} if seen is None else seen
    site_in, site_out = dictionary.header.site_in, dictionary.header.site_out
    kind, layer = PLAIN.get(site_out.point, "resid_post"), site_out.layer
    if site_out.point is Point.RESID_PRE:
        layer -= 1

    def site(name: str, at: int | None, values: Tensor) -> Tensor:
        if (name, at) == (kind, layer):
            target = values.flatten(1)
            x = seen["mlp_in"] if site_in.point is Point.MLP_IN else target
            values = (target + change(formulas, x, target)).view_as(values)
        seen[name] = values
        return values

    return plain.forward(model, ids, site, held)


def spliced(
    family: str, dictionary: Dictionary, *wanted: Intervention, dtype: torch.dtype = DOUBLE
) -> Tensor:
    """Logits [T, V] of the engine."""
    engine = random_engine(family, dtype, [dictionary])
    edits = engine.edits(*wanted, tokens=len(IDS))
    current = engine.hooks.run(
        [Row(IDS, edits)], range(len(IDS)), gradients=False, dictionaries=[dictionary.id]
    )
    return current.logits[0]


@pytest.mark.parametrize("point", [*WRITERS, *VIEWS])
@pytest.mark.parametrize("family", FAMILIES)
def test_reading_a_dictionary_changes_no_bit(family: str, point: Point) -> None:
    dictionary = random_dictionary("D", point, 1)
    engine = random_engine(family, dictionaries=[dictionary])
    without = engine.hooks.run([Row(IDS)], range(len(IDS)), gradients=True).logits
    read = engine.hooks.run([Row(IDS)], range(len(IDS)), gradients=True, dictionaries=["D"])
    assert torch.equal(read.logits, without)
    assert set(read.sites.found) == {"D"}


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("point", [*WRITERS, *VIEWS])
@pytest.mark.parametrize("family", FAMILIES[:2])
def test_ablating_latents_removes_exactly_what_they_write(
    family: str, point: Point, activation: str
) -> None:
    dictionary = random_dictionary("D", point, 1, activation, dtype=DOUBLE)
    wanted = [
        Intervention(parse("latent.D.3"), Zero()),
        Intervention(parse("latent.D.7~5"), SetTo(2.0)),
        Intervention(parse("latent.D.8~5"), Scale(-1.5)),
    ]

    def change(formulas: ByHand, x: Tensor, target: Tensor) -> Tensor:
        f = formulas.latents(x)
        edited = f.clone()
        edited[:, 3] = 0
        edited[5, 7] = 2.0
        edited[5, 8] = -1.5 * f[5, 8]
        return formulas.write(edited, x) - formulas.write(f, x)

    expected = by_hand(random_model(family, DOUBLE), dictionary, change)
    ours = spliced(family, dictionary, *wanted)
    assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-9)
    clean = by_hand(random_model(family, DOUBLE), dictionary, lambda _, __, t: torch.zeros_like(t))
    assert not torch.allclose(clean, expected, rtol=1e-3)


PARTS: list[tuple[str, Operation]] = [
    ("error.D", Zero()),
    ("error.D~4", Scale(0.5)),
    ("bias.D", Zero()),
    ("skip.D", Scale(2.0)),
]


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("kind", [NormKind.NONE, NormKind.LAYER_NORM, NormKind.CENTRE])
@pytest.mark.parametrize(("target", "operation"), PARTS)
def test_error_bias_and_skip_are_edited(target: str, operation: Operation, kind: NormKind) -> None:
    dictionary = random_dictionary(
        "D", Point.MLP_OUT, 1, norm=InputNorm(kind), reads=Point.MLP_IN, skip=True, dtype=DOUBLE
    )
    factor = operation.factor if isinstance(operation, Scale) else 0.0
    address = parse(target)

    def change(formulas: ByHand, x: Tensor, target: Tensor) -> Tensor:
        write = {
            "error": formulas.error(x, target),
            "bias": formulas.bias(x),
            "skip": formulas.skipped(x),
        }[address.kind.value].expand_as(target)
        at = slice(None) if address.position is None else slice(address.position, 5)
        added = torch.zeros_like(target)
        added[at] = (factor - 1) * write[at]
        return added

    expected = by_hand(random_model("llama", DOUBLE), dictionary, change)
    ours = spliced("llama", dictionary, Intervention(address, operation))
    assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("in_float64")
def test_the_input_norm_scales_what_a_latent_writes() -> None:
    dictionary = random_dictionary(
        "D", Point.ATTN_OUT, 1, norm=InputNorm(NormKind.LAYER_NORM), dtype=DOUBLE
    )

    def change(formulas: ByHand, x: Tensor, target: Tensor, *, scaled: bool = True) -> Tensor:
        f = formulas.latents(x)
        scale = formulas.scale_and_mean(x)[0] if scaled else 1.0
        return (2.0 - f[:, 3:4]) * dictionary.w_dec[3] * scale

    model = random_model("gpt2", DOUBLE)
    ours = spliced("gpt2", dictionary, Intervention(parse("latent.D.3"), SetTo(2.0)))
    assert torch.allclose(ours, by_hand(model, dictionary, change), rtol=1e-9, atol=1e-9)
    unscaled = by_hand(model, dictionary, lambda *of: change(*of, scaled=False))
    assert not torch.allclose(ours, unscaled, rtol=1e-3)


def test_rows_keep_their_own_edits() -> None:
    dictionary = random_dictionary("D", Point.MLP_OUT, 1)
    engine = random_engine("gpt2", dictionaries=[dictionary])
    edits = engine.edits(Intervention(parse("latent.D.3"), SetTo(4.0)), tokens=len(IDS))
    rows = [Row(IDS), Row(IDS, edits), Row(IDS[:5])]
    together = engine.hooks.run(rows, [4], gradients=False).logits
    for number, row in enumerate(rows):
        alone = engine.hooks.run([row], [4], gradients=False).logits[0]
        assert torch.allclose(together[number], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[0], together[1], rtol=1e-3)


def test_receipts_say_what_was_done() -> None:
    dictionary = random_dictionary("D", Point.MLP_OUT, 1)
    engine = random_engine("gpt2", dictionaries=[dictionary])
    edits = engine.edits(
        Intervention(parse("latent.D.3~2"), SetTo(4.0)),
        Intervention(parse("error.D"), Zero()),
        tokens=len(IDS),
    )
    current = engine.hooks.run([Row(IDS, edits)], [0], gradients=False)
    of_latent, of_error = current.receipts(0)
    site = current.sites.found["D"]
    clean = site.clean(0, len(IDS))
    assert of_latent.before == pytest.approx(float(clean[2, 3]))
    assert of_latent.after == 4.0
    error = ByHand(dictionary).error(site.x[0], site.target[0])
    assert of_error.delta_norm == pytest.approx(float(error.norm()), rel=1e-5)
    assert of_error.sites == len(IDS)


def test_latents_take_means_and_values_of_other_runs() -> None:
    """Read by the encoder in those runs, before and after an edit there."""
    dictionary = random_dictionary("D", Point.MLP_OUT, 1)
    engine = random_engine(dictionaries=[dictionary])
    name = "latent.D.3"
    others = ((5, 6, 7), (40, 3, 3, 9))

    def latent(ids: tuple[int, ...]) -> Tensor:
        current = engine.hooks.run([Row(ids)], [0], gradients=False, dictionaries=[dictionary.id])
        return current.sites.found[dictionary.id].clean(0, len(ids))[:, 3]

    mean = torch.cat([latent(ids) for ids in others]).mean()
    source = Source(others[1], (Intervention(parse(f"{name}~2"), Scale(3.0)),))
    wanted = (
        Intervention(parse(f"{name}~4"), Mean(tuple(map(Source, others)))),
        Intervention(parse(f"{name}~6"), Patch(source, ((6, 2),))),
    )
    row = Row(IDS, engine.edits(*wanted, tokens=len(IDS)))
    averaged, patched = engine.hooks.run([row], [7], gradients=False).receipts(0)
    assert averaged.after == pytest.approx(float(mean), rel=1e-5, abs=1e-6)
    assert patched.after == pytest.approx(3 * float(latent(others[1])[2]), rel=1e-5, abs=1e-6)
    assert mean.abs() > 1e-3
