"""Addresses: one canonical spelling, and every part that is not understood refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.addresses import Address, Kind, Shape, parse
from services.common.errors import InvalidArgument

NUMBERS = st.integers(0, 999)
LAYERED = [Kind.ATTN, Kind.MLP, Kind.RESID_MID, Kind.RESID_POST, Kind.BIAS_ATTN, Kind.BIAS_MLP]


@st.composite
def addresses(draw: st.DrawFn) -> Address:
    kind = draw(st.sampled_from(Kind))
    position = draw(st.none() | NUMBERS)
    dictionary = draw(st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True))
    match kind:
        case Kind.EMBED:
            return Address(kind, position=position)
        case Kind.HEAD:
            key = None if position is None else draw(st.none() | st.integers(0, position))
            return Address(kind, draw(NUMBERS), draw(NUMBERS), position=position, key=key)
        case Kind.QUERY | Kind.KEY | Kind.VALUE | Kind.NEURON:
            return Address(kind, draw(NUMBERS), draw(NUMBERS), position=position)
        case Kind.LATENT:
            return Address(kind, None, draw(NUMBERS), dictionary, position)
        case Kind.BIAS | Kind.SKIP | Kind.ERROR:
            return Address(kind, dictionary=dictionary, position=position)
        case Kind.RESID_PRE:
            return Address(Kind.RESID_POST, draw(NUMBERS), position=position)
        case _:
            return Address(kind, draw(NUMBERS), position=position)


@given(addresses())
def test_text_and_address_round_trip(address: Address) -> None:
    text = str(address)
    assert parse(text) == address
    assert set(text) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_~")


@pytest.mark.parametrize(
    ("text", "canonical"),
    [("resid_pre.0", "embed"), ("resid_pre.3~2", "resid_post.2~2"), ("head.2.3~13-1",) * 2],
)
def test_canonical_spelling(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "an address is required"),
        ("neuron.3", "is not an address"),
        ("neurons.3.1", "is not an address"),
        ("head.2.3.x~1", "is not an address"),
        ("latent.a b.1", "is not an address"),
        ("neuron.03.1", "the layer '03' is not a number"),
        ("neuron.3.+1", "the neuron '\\+1' is not a number"),
        ("neuron.3.٣", "the neuron '٣' is not a number"),
        ("neuron.3.17~", "never negative or empty"),
        ("neuron.3.17~-1", "never negative or empty"),
        ("neuron.3.17~5-2", "only a head has query-key pairs"),
        ("head.2.3~1-5", "the key must be in 0..1"),
        ("head.2.3~5-", "the key position '' is not a number"),
        ("head.2.3~1-2-3", "the key position '2-3' is not a number"),
        ("x" * 300, "at most 200 characters"),
    ],
)
def test_what_is_not_understood_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        parse(text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("neuron.4.0", r"layer 4 does not exist; valid is 0\.\.3"),
        ("neuron.0.64", r"neuron 64 does not exist; valid is 0\.\.63"),
        ("head.0.2", r"head 2 does not exist; valid is 0\.\.1"),
        ("head.0.1~9", r"token position 9 does not exist; valid is 0\.\.8"),
        ("latent.mine.3", "no dictionary 'mine' is loaded"),
    ],
)
def test_what_names_nothing_is_refused_with_the_valid_range(text: str, sentence: str) -> None:
    shape = Shape(layers=4, heads=2, neurons=64)
    shape.check(parse("neuron.3.63~8"), tokens=9)
    with pytest.raises(InvalidArgument, match=sentence):
        shape.check(parse(text), tokens=9)
