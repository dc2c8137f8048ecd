"""The figures against their definitions, and verdicts on dictionaries at right and wrong sites."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from services.common.errors import FailedPrecondition
from services.inference.engine.dictionaries import overrides, self_test
from services.inference.engine.dictionaries.dictionary import Dictionary, Relu
from services.inference.engine.dictionaries.self_test import Measured, Meter, Trial, measure
from services.inference.engine.dictionaries.sites import Declared, Point, Site
from services.inference.engine.dictionaries.widths import Widths
from tests.inference.dictionaries.examples import example, header
from tests.inference.dictionaries.opening import D, drawn, tokens

WIDTHS = Widths(layers=3, residual=D, neurons=20, heads=D)


def flat(seed: int) -> Tensor:
    """Tokens close to a plane."""
    random = drawn(seed)
    return random(40, 2) @ random(2, D) + 0.05 * random(40, D) + random(D)


def good(x: Tensor, k: int) -> Dictionary:
    """+-1 times the k largest principal directions: explains what they hold, half is active."""
    _, _, directions = torch.linalg.svd(x - x.mean(0))
    both = torch.cat([directions[:k], -directions[:k]])
    d = example("relu", latents=2 * k)
    return replace(
        d,
        header=header(latents=2 * k),
        w_enc=both.T.contiguous(),
        w_dec=both,
        b_enc=torch.zeros(2 * k),
        b_in=x.mean(0),
        b_dec=x.mean(0),
        activation=Relu(),
    )


def test_the_figures_are_their_definitions() -> None:
    d = replace(example("jumprelu"), header=header(activation="jumprelu"))
    x = tokens()
    f = d.encode(x)
    recon = d.decode(f, torch.ones(40, 1), torch.zeros(40, 1))
    measured = measure(d, x, x, "a text")
    assert measured.fvu == pytest.approx(
        float((x - recon).square().sum() / (x - x.mean(0)).square().sum()), rel=1e-5
    )
    assert measured.l0 == pytest.approx(float((f != 0).sum(-1).float().mean()))
    assert measured.dead == pytest.approx(float((f == 0).all(0).float().mean()))
    assert (measured.tokens, measured.sample) == (40, "a text")


def test_a_sample_may_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    d, x = example("relu"), tokens()
    meter = Meter(d, "a text")
    for piece in (x[:1], x[1:17], x[17:]):
        meter.add(piece, piece)
    whole = measure(d, x, x, "a text")
    monkeypatch.setattr(self_test, "_CHUNK_BYTES", 4 * d.latents * 7)
    for one in (meter.measured(), measure(d, x, x, "a text")):
        assert (one.tokens, one.l0, one.dead) == (whole.tokens, whole.l0, whole.dead)
        assert one.fvu == pytest.approx(whole.fvu)


def test_positions_that_training_left_out_are_left_out() -> None:
    d = replace(example("relu"), header=header(declared=Declared(leave_out_first=4)))
    x = tokens()
    x[:4] = 1e4
    positions = torch.arange(40)
    assert measure(d, x, x, "s", positions) == measure(d, x[4:], x[4:], "s")
    assert measure(d, x, x, "s").fvu != measure(d, x, x, "s", positions).fvu
    with pytest.raises(FailedPrecondition, match="no token that dictionary mine was trained for"):
        measure(d, x[:4], x[:4], "s", positions[:4])


def test_a_transcoder_is_measured_against_the_output() -> None:
    d = example("relu", d_out=9, skip=True)
    d = replace(d, header=header(d_out=9, site_in=Site(Point.MLP_IN, 1), has_skip=True))
    x = tokens()
    exact = d.decode(d.encode(x), torch.ones(40, 1), torch.zeros(40, 1)) + d.skip_write(x)
    assert measure(d, x, exact, "s").fvu == pytest.approx(0, abs=1e-6)
    assert measure(d, x, exact + torch.randn(40, 9) * exact.std(), "s").fvu > 0.2


def test_a_silent_site_explains_nothing() -> None:
    d, x = example("relu"), torch.zeros(5, D)
    assert measure(d, x, x, "s").fvu == math.inf
    assert self_test.faults(d.header, measure(d, x, x, "s"))


def test_a_good_dictionary_passes_and_a_moved_one_does_not() -> None:
    x, elsewhere = flat(1), flat(2)
    d = good(x, k=2)
    assert self_test.faults(d.header, measure(d, x, x, "s")) == []
    assert self_test.faults(d.header, measure(d, elsewhere, elsewhere, "s"))
    turned = replace(d, w_enc=d.w_enc.roll(1, 0))
    assert self_test.faults(d.header, measure(turned, x, x, "s"))


@pytest.mark.parametrize(
    ("declared", "measured", "fault"),
    [
        (Declared(), (0.899, 50.0), None),
        (Declared(), (0.901, 50.0), "FVU is 0.901, above 0.9"),
        (Declared(), (math.nan, 50.0), "FVU is nan, above 0.9"),
        (Declared(l0=82), (0.3, 160.0), None),
        (Declared(l0=82), (0.3, 165.0), "L0 is 165, where its files declare 82"),
        (Declared(l0=82), (0.3, 40.0), "L0 is 40, where its files declare 82"),
        (Declared(l0=82), (0.3, 0.0), "L0 is 0, where its files declare 82"),
        (Declared(l0=1.5), (0.3, 3.4), None),
        (Declared(fvu=0.2), (0.39, 50.0), None),
        (Declared(fvu=0.2), (0.41, 50.0), "FVU is 0.41, where its files declare 0.2"),
        (Declared(fvu=0.2), (0.01, 50.0), None),
    ],
)
def test_how_far_is_far_off(
    declared: Declared, measured: tuple[float, float], fault: str | None
) -> None:
    figures = Measured("s", 4000, measured[0], measured[1], 0.1)
    found = self_test.faults(header(declared=declared), figures)
    assert found == ([fault] if fault else [])


def test_the_refusal_names_both_numbers_what_was_tried_and_the_site_that_fits() -> None:
    wrong = Measured("wikitext", 4032, 1.43, 812, 0.2)
    facts = header(declared=Declared(l0=82))
    elsewhere = Site(Point.RESID_POST, 1)
    other_side = Site(Point.MLP_OUT, 1, before_post_norm=True)
    tried = [
        Trial(other_side, other_side, Measured("wikitext", 4032, 0.31, 80, 0.1)),
        Trial(elsewhere, elsewhere, Measured("wikitext", 4032, 1.2, 700, 0.1)),
    ]
    refusal = self_test.refusal(facts, wrong, tried)
    assert refusal.reason == "DICTIONARY_DOES_NOT_FIT"
    assert refusal.message == (
        "dictionary mine does not fit mlp_out.1.after: FVU is 1.43, above 0.9 and L0 is 812, where "
        "its files declare 82 (FVU 1.43, L0 812, 20% dead on 4,032 tokens of wikitext); tried "
        "instead: mlp_out.1.before (FVU 0.31, L0 80), resid_post.1 (FVU 1.2, L0 700); it fits "
        "mlp_out.1.before: end its URI in #site=mlp_out.1.before; to serve it all the same, end it "
        "in ,unchecked"
    )
    assert "none of them fits" in self_test.refusal(facts, wrong, tried[1:]).message
    assert "no other site was tried" in self_test.refusal(facts, wrong).message


def test_the_suffix_that_is_suggested_is_understood() -> None:
    for site_in, site_out in (
        (Site(Point.MLP_IN, 2), Site(Point.MLP_OUT, 2, before_post_norm=True)),
        (Site(Point.MLP_IN, 2, before_gain=True), Site(Point.MLP_OUT, 2)),
        (Site(Point.ATTN_OUT, 0), Site(Point.ATTN_OUT, 0)),
        (Site(Point.Z, 1), Site(Point.Z, 1)),
    ):
        uri = "folder" + overrides.spelled(site_in, site_out)
        location, override = overrides.split(uri)
        assert location == "folder"
        assert override is not None
        elsewhere = Site(Point.RESID_MID, 9)
        assert override.reads.in_place_of(elsewhere) == site_in
        assert override.writes.in_place_of(elsewhere) == site_out
        assert override.writes.site(None, before_post_norm=False) == site_out


def test_candidates_are_sites_of_the_same_width() -> None:
    sites = [site for site, _ in self_test.candidates(header(), WIDTHS)]
    assert sites[0] == Site(Point.MLP_OUT, 1, before_post_norm=True)
    assert Site(Point.RESID_POST, 1) in sites
    assert Site(Point.MLP_OUT, 0) in sites
    assert Site(Point.MLP_ACT, 1) not in sites
    assert Site(Point.MLP_OUT, 1) not in sites
    assert len(sites) == len(set(sites))
    last = header(site_in=Site(Point.MLP_OUT, 2), site_out=Site(Point.MLP_OUT, 2))
    assert Site(Point.MLP_OUT, 3) not in [site for site, _ in self_test.candidates(last, WIDTHS)]
    transcoder = header(site_in=Site(Point.MLP_IN, 1))
    assert (Site(Point.RESID_MID, 1), Site(Point.MLP_OUT, 1)) in self_test.candidates(
        transcoder, WIDTHS
    )


def test_what_unchecked_results_say() -> None:
    bad, fine = Measured("s", 4000, 1.4, 50, 0.1), Measured("s", 4000, 0.4, 50, 0.1)
    assert self_test.warning(header(), bad) == (
        "dictionary mine was loaded unchecked although it fails its self-test: FVU is 1.4, above "
        "0.9"
    )
    assert self_test.warning(header(), None).endswith("without a self-test")
    assert self_test.warning(header(), fine) == ""
