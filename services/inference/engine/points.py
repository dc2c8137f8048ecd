"""Points: the named places of a forward pass whose activations can be read whole.

    embed   resid_post.3   attn_probs.2   mlp_act.0   latents.D   logits

One registry says what each point is; requests are parsed with it, shapes are computed from it and
docs/points.md is written from it. Values are those after interventions. A point of the residual
stream is the place that an intervention's address of the same name edits.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from services.common.addresses import DictionaryShape
from services.common.errors import InvalidArgument
from services.inference.engine.architecture import Architecture

RESIDUAL = ("embed", "resid_mid", "resid_post")
"""The points of the residual stream; `resid_pre.L` is another name for the one before it."""


@dataclass(frozen=True)
class PointKind:
    """What a point's name stands for."""

    name: str
    meaning: str
    axes: tuple[str, ...]
    """Outermost first."""
    of: str = "L"
    """What there is one of for each: layers, `L`, or dictionaries, `D`; empty: there is one."""


_RESIDUAL_AXES = ("token", "channel")
_HEAD_AXES = ("token", "head", "head_channel")
_PATTERN_AXES = ("head", "query", "key")

KINDS = (
    PointKind(
        "embed",
        "Input of the first block: token and position embedding, with the embedding's scale and "
        "norm where the model has them.",
        _RESIDUAL_AXES,
        of="",
    ),
    PointKind(
        "resid_pre",
        "The residual stream that layer L reads: the same as `resid_post.(L-1)`, and for L = 0 as "
        "`embed`. Answers use those names.",
        _RESIDUAL_AXES,
    ),
    PointKind(
        "resid_mid",
        "The residual stream between layer L's attention and its MLP. Models whose attention and "
        "MLP read the same stream have none.",
        _RESIDUAL_AXES,
    ),
    PointKind("resid_post", "The residual stream after layer L.", _RESIDUAL_AXES),
    PointKind(
        "q",
        "Query vectors as the scores use them: after QK-norm and rotary embedding.",
        _HEAD_AXES,
    ),
    PointKind(
        "k",
        "Key vectors as the scores use them, once per query head that reads them.",
        _HEAD_AXES,
    ),
    PointKind(
        "v", "Value vectors, bias included, once per query head that reads them.", _HEAD_AXES
    ),
    PointKind(
        "attn_scores",
        "Scaled products of query and key, before soft cap and mask. Masked pairs hold their "
        "product too, so every number is finite: `attn_probs` says which pairs are masked.",
        _PATTERN_AXES,
    ),
    PointKind(
        "attn_probs",
        "Attention probabilities that the values are summed with, after edits of pairs and zeroed "
        "rows. 0 where masked.",
        _PATTERN_AXES,
    ),
    PointKind("z", "Output of each head before the output projection.", _HEAD_AXES),
    PointKind(
        "attn_out",
        "What layer L's attention adds to the residual stream, bias included, after a post-norm "
        "where the model has one.",
        _RESIDUAL_AXES,
    ),
    PointKind(
        "mlp_in", "What layer L's MLP reads: the output of the norm before it.", _RESIDUAL_AXES
    ),
    PointKind(
        "mlp_act",
        "Neuron activations: the input of the MLP's down projection; of a gated MLP act(gate) * "
        "up.",
        ("token", "neuron"),
    ),
    PointKind(
        "mlp_out",
        "What layer L's MLP adds to the residual stream, bias included, after a post-norm where "
        "the model has one.",
        _RESIDUAL_AXES,
    ),
    PointKind("final_norm", "Output of the norm before the unembedding.", _RESIDUAL_AXES, of=""),
    PointKind(
        "latents",
        "Activations of every latent of dictionary D, 0 where it is not active.",
        ("token", "latent"),
        of="D",
    ),
    PointKind(
        "logits",
        "The model's logits, after its soft cap.",
        ("token", "vocabulary"),
        of="",
    ),
)
_BY_NAME = {kind.name: kind for kind in KINDS}
_NO_DICTIONARIES: Mapping[str, DictionaryShape] = {}
_LAYER = re.compile(r"0|[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class Point:
    """One place of one model."""

    name: str
    layer: int | None = None
    dictionary: str = ""
    latents: int = 0
    """How many the dictionary has."""

    @property
    def axes(self) -> tuple[str, ...]:
        return _BY_NAME[self.name].axes

    def __str__(self) -> str:
        if self.dictionary:
            return f"{self.name}.{self.dictionary}"
        return self.name if self.layer is None else f"{self.name}.{self.layer}"


def parse(
    text: str,
    architecture: Architecture,
    dictionaries: Mapping[str, DictionaryShape] = _NO_DICTIONARIES,
) -> Point:
    """Reads a point of this model; `resid_pre.L` comes back as its canonical name.

    Raises InvalidArgument that names the part that is wrong.
    """
    name, dot, layer = text.partition(".")
    kind = _BY_NAME.get(name)
    if kind is None:
        raise InvalidArgument(
            f"{_quote(text)} is not a point; the points are {', '.join(map(_spelling, KINDS))}"
        )
    if kind.of == "D":
        return _of_dictionary(name, layer, text, dictionaries)
    if not kind.of:
        if dot:
            raise InvalidArgument(f"{_quote(text)}: there is one {name}, so it has no layer")
        return Point(name)
    layers = len(architecture.layers)
    if not _LAYER.fullmatch(layer):
        raise InvalidArgument(f"{_quote(text)}: a layer is required, for example {name}.0")
    if int(layer) >= layers:
        raise InvalidArgument(
            f"{_quote(text)}: layer {layer} does not exist; valid is 0..{layers - 1}"
        )
    if name == "resid_mid" and architecture.parallel:
        raise InvalidArgument(
            f"{_quote(text)}: attention and MLP of this model's layers read the same residual "
            f"stream, so there is no resid_mid; resid_post.0..{layers - 1} exist"
        )
    if name == "mlp_act" and int(layer) in architecture.experts:
        raise InvalidArgument(
            f"{_quote(text)}: the MLP of layer {layer} is a mixture of experts, which has no "
            f"neurons; read mlp_in.{layer} or mlp_out.{layer}"
        )
    point = Point(name, int(layer))
    if name == "resid_pre":
        return residual_before(int(layer))
    return point


def _of_dictionary(
    name: str, dictionary: str, text: str, dictionaries: Mapping[str, DictionaryShape]
) -> Point:
    found = dictionaries.get(dictionary)
    if found is None:
        served = ", ".join(f"{name}.{each}" for each in sorted(dictionaries)) or "none"
        raise InvalidArgument(
            f"{_quote(text)}: the id of a dictionary served with this model is required; there "
            f"are {served}"
        )
    return Point(name, dictionary=dictionary, latents=found.latents)


def residual_before(layer: int) -> Point:
    """The residual stream that a layer reads, by its canonical name."""
    return Point("embed") if layer == 0 else Point("resid_post", layer - 1)


def shape(point: Point, architecture: Architecture, tokens: int) -> tuple[int, ...]:
    """Length of each of the point's axes on a prompt of `tokens` tokens."""
    lengths = {
        "token": tokens,
        "query": tokens,
        "key": tokens,
        "head": architecture.n_heads,
        "head_channel": architecture.head_width,
        "channel": architecture.width,
        "neuron": architecture.neurons,
        "latent": point.latents,
        "vocabulary": architecture.vocabulary,
    }
    return tuple(lengths[axis] for axis in point.axes)


def _spelling(kind: PointKind) -> str:
    return f"{kind.name}.{kind.of}" if kind.of else kind.name


def _quote(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def as_page() -> str:
    """The text of docs/points.md."""
    rows = [
        f"| `{_spelling(kind)}` | {kind.meaning} | [{', '.join(kind.axes)}] |" for kind in KINDS
    ]
    return "\n".join([_HEAD, *rows, ""])


_HEAD = """\
# Points

The places of a forward pass that `Run{activations}` and `StreamActivations` give whole, as tensors
in the model's data type, row-major and little-endian. L is a layer, counted from 0, D the id of a
dictionary. Values are those after the run's interventions, of the prompt's tokens only: where
latents at `z` or `mlp_act` are edited, what the next projection really reads. `Run` answers up to
1 MiB of them, `StreamActivations` up to 1 GiB.

The logit lens reads `embed`, `resid_pre.L`, `resid_mid.L` and `resid_post.L`.

<!-- Written by `python -m services.inference.points_page`; edit engine/points.py. -->

| point | meaning | axes |
|---|---|---|"""
