"""Files that are right, at sites that are wrong: the self-test on a real forward pass tells.

A Gemma-2 with random weights. The dictionary spans the directions that its MLP's output has after
the post-norm, in Gemma Scope's layout, and is measured before that norm, too.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model

from services.inference.engine.dictionaries import self_test
from services.inference.engine.dictionaries.dictionary import Dictionary
from services.inference.engine.dictionaries.self_test import Trial, measure
from services.inference.engine.dictionaries.sites import Point, Site
from services.inference.engine.dictionaries.widths import Widths
from tests.inference.dictionaries.opening import opened, save_npz

LAYER, D = 1, 32
WIDTHS = Widths(layers=2, residual=D, neurons=24, heads=16)


@pytest.fixture(scope="module")
def sites() -> dict[Site, Tensor]:
    """Activations [n, d] by site, taken from Hugging Face's modules."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=50,
        hidden_size=D,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.4,
    )
    model = Gemma2Model(config).eval()
    block = model.layers[LAYER]
    gain = block.post_feedforward_layernorm.weight.data.normal_(-0.9, 0.05)
    gain[:2] = 12  # it lets two channels through and little of the others
    kept: dict[Site, Tensor] = {}

    def keep(site: Site) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            kept[site] = (output[0] if isinstance(output, tuple) else output).reshape(-1, D)

        return hook

    block.mlp.register_forward_hook(keep(Site(Point.MLP_OUT, LAYER, before_post_norm=True)))
    block.post_feedforward_layernorm.register_forward_hook(keep(Site(Point.MLP_OUT, LAYER)))
    block.register_forward_hook(keep(Site(Point.RESID_POST, LAYER)))
    with torch.no_grad():
        model(torch.randint(50, (8, 25)))
    return kept


@pytest.fixture
def dictionary(sites: dict[Site, Tensor], tmp_path: Path) -> Dictionary:
    x = sites[Site(Point.MLP_OUT, LAYER)]
    _, _, directions = torch.linalg.svd(x - x.mean(0))
    both = torch.cat([directions[:2], -directions[:2]])
    folder = tmp_path / "gemma-scope-2b-pt-mlp" / f"layer_{LAYER}" / "width_4" / "average_l0_2"
    folder.mkdir(parents=True)
    tensors = {
        "W_enc": both.T,
        "b_enc": -both @ x.mean(0),
        "W_dec": both,
        "b_dec": x.mean(0),
        "threshold": torch.zeros(4),
    }
    save_npz(folder / "params.npz", tensors)
    (registered,) = opened(folder, widths=WIDTHS)
    return registered.load()


def test_it_fits_after_the_post_norm_and_not_before(
    sites: dict[Site, Tensor], dictionary: Dictionary
) -> None:
    right, wrong = (Site(Point.MLP_OUT, LAYER, before) for before in (False, True))
    assert dictionary.header.site_in == right
    for site, fits in ((right, True), (wrong, False)):
        measured = measure(dictionary, sites[site], sites[site], "random tokens")
        assert (not self_test.faults(dictionary.header, measured)) is fits


def test_a_file_put_before_the_post_norm_is_refused_with_the_site_that_fits(
    sites: dict[Site, Tensor], dictionary: Dictionary
) -> None:
    wrong = Site(Point.MLP_OUT, LAYER, before_post_norm=True)
    header = replace(dictionary.header, site_in=wrong, site_out=wrong)
    pairs = [pair for pair in self_test.candidates(header, WIDTHS) if pair[0] in sites]
    tried = [
        Trial(*pair, measure(dictionary, sites[pair[0]], sites[pair[0]], "random tokens"))
        for pair in pairs
    ]
    measured = measure(dictionary, sites[wrong], sites[wrong], "random tokens")
    message = self_test.refusal(header, measured, tried).message
    assert "does not fit mlp_out.1.before" in message
    assert "it fits mlp_out.1.after: end its URI in #site=mlp_out.1.after" in message
