"""What latents read, in every family: gradients of Hugging Face's own modules."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from services.common.addresses import Address, Kind
from services.inference.engine.dictionaries.dictionary import Dictionary
from services.inference.engine.dictionaries.sites import Point
from services.inference.engine.families import FAMILIES
from services.inference.engine.readouts import ReadOut, read_out
from tests.inference.families.models import (
    EXPERT_VARIANTS,
    HEADS,
    IDS,
    LAST,
    NEURONS,
    VARIANTS,
    VOCABULARY,
    WIDTH,
    KeepDouble,
    engine_of,
    reference_of,
)
from tests.inference.helpers import Engine, explained, shelf_of
from tests.inference.planted import random_dictionary
from tests.inference.test_latent_readouts import pre_activations
from tests.inference.test_readouts import as_vector

DOUBLE = torch.float64
LAYER = 1
NODES = [
    Address(Kind.LATENT, index=index, dictionary="D", position=token)
    for token, index in ((5, 2), (LAST, 7), (LAST, 3))
]
PLACES = [
    (Point.Z, False),
    (Point.ATTN_OUT, True),
    (Point.ATTN_OUT, False),
    (Point.MLP_ACT, False),
    (Point.MLP_OUT, True),
    (Point.MLP_OUT, False),
]
"""Sites, and whether a post-norm comes behind them."""


@contextmanager
def serving(engine: Engine, dictionary: Dictionary) -> Iterator[None]:
    before = engine.hooks.shelf
    engine.hooks.shelf = shelf_of([dictionary], engine.architecture, DOUBLE)
    try:
        yield
    finally:
        engine.hooks.shelf = before


def dictionary_at(variant: str, point: Point, before_post_norm: bool, layer: int) -> Dictionary:
    architecture = engine_of(variant, DOUBLE).architecture
    widths = {Point.Z: HEADS * architecture.head_width, Point.MLP_ACT: NEURONS}
    return random_dictionary(
        "D",
        point,
        layer,
        dtype=DOUBLE,
        before_post_norm=before_post_norm,
        width=lambda each: widths.get(each, WIDTH),
    )


def found(variant: str, dictionary: Dictionary) -> dict[Address, ReadOut]:
    engine = engine_of(variant, DOUBLE)
    with serving(engine, dictionary):
        (explanation,) = engine.explain(explained(IDS), dictionaries=["D"])
        return read_out(engine.architecture, explanation, NODES, VOCABULARY, VOCABULARY, 100)


class ByReference:
    """One pass of Hugging Face's model: the residual a sublayer reads, and a site behind it."""

    def __init__(self, variant: str, dictionary: Dictionary) -> None:
        reference = reference_of(variant, DOUBLE)
        family = FAMILIES[variant.partition("/")[0]]
        site = dictionary.header.site_in
        block = reference.blocks[site.layer]
        of_attention = site.point in (Point.Z, Point.ATTN_OUT)
        name = family.attn_norm if of_attention else family.mlp_norm
        post = family.attn_post_norm if of_attention else family.mlp_post_norm
        held = [block.get_submodule(each) for each in (name, post) if each]
        kind = {Point.Z: "z", Point.MLP_ACT: "neurons", Point.ATTN_OUT: "attn"}
        self.seen: dict[str, Tensor] = {}
        self.tokens = reference.model.get_input_embeddings()(torch.arange(VOCABULARY))
        scales = reference.scales(IDS)

        def leaf(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
            stream = args[0].detach().requires_grad_()
            self.seen["stream"] = stream
            return (stream, *args[1:])

        def inside(module: nn.Module, args: Any, output: Tensor) -> None:
            self.seen["site"] = output.view(len(IDS), -1)

        def remember(at: str, layer: int | None, values: Tensor) -> Tensor:
            wanted = kind.get(site.point, "mlp")
            if (at, layer) == (wanted, site.layer) and not self._inside(site):
                self.seen["site"] = values.reshape(len(IDS), -1)
            return values

        handles = [held[0].register_forward_pre_hook(leaf)]
        if self._inside(site):
            out = reference._out if of_attention else reference._down
            handles.append(block.get_submodule(out).register_forward_hook(inside))
        try:
            with torch.enable_grad():
                reference.run(IDS, remember, {module: scales[module] for module in held})
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def _inside(site: Any) -> bool:
        """Whether the site lies between the projection and a post-norm."""
        return site.before_post_norm and site.point in (Point.ATTN_OUT, Point.MLP_OUT)

    def input_scores(self, dictionary: Dictionary, node: Address) -> Tensor:
        with torch.enable_grad():
            value = pre_activations(dictionary, self.seen["site"])[node.position, node.index]
            (gradient,) = torch.autograd.grad(value, self.seen["stream"], retain_graph=True)
        scores: Tensor = self.tokens @ gradient.view(len(IDS), -1)[node.position]
        return scores


@pytest.mark.parametrize(("point", "before_post_norm"), PLACES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_inputs(variant: str, point: Point, before_post_norm: bool) -> None:
    with KeepDouble():
        dictionary = dictionary_at(variant, point, before_post_norm, LAYER)
        read = found(variant, dictionary)
        reference = ByReference(variant, dictionary)
        for node in NODES:
            expected = reference.input_scores(dictionary, node)
            assert expected.abs().max() > 1e-6
            assert torch.allclose(as_vector(read[node].input), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("variant", EXPERT_VARIANTS)
def test_inputs_behind_experts(variant: str) -> None:
    with KeepDouble():
        dictionary = dictionary_at(variant, Point.MLP_OUT, False, 0)
        read = found(variant, dictionary)
        reference = ByReference(variant, dictionary)
        for node in NODES:
            expected = reference.input_scores(dictionary, node)
            assert torch.allclose(as_vector(read[node].input), expected, rtol=1e-5, atol=1e-9)
