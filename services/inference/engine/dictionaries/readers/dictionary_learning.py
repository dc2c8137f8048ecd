"""saprmarks/dictionary_learning: `config.json` with a `trainer`, and `ae.pt` (or `.safetensors`).

`dict_class` gives the formula:

    AutoEncoder             relu((x - bias) @ encoder^T + b); f @ decoder^T + bias
    AutoEncoderNew          relu(x @ encoder^T + b); f @ decoder^T + b_dec
    AutoEncoderTopK         top k of relu((x - b_dec) @ encoder^T + b)
    BatchTopKSAE            relu(...) where above one threshold; so does MatryoshkaBatchTopKSAE
    JumpReluAutoEncoder     relu(x @ W_enc + b_enc) where above the threshold
    GatedAutoEncoder        gate and magnitude on (x - decoder_bias)

The last two return f times |decoder row| and divide by it again: that is folded, so f is in units
of its own write norm. `submodule_name` is `resid_post_layer_8` or the like, and modules end before
a post-norm.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from services.common.errors import FailedPrecondition
from services.inference.engine.dictionaries.dictionary import (
    Activation,
    Dictionary,
    Gated,
    InputNorm,
    JumpRelu,
    Relu,
    TopK,
)
from services.inference.engine.dictionaries.files import TensorFile, read_json
from services.inference.engine.dictionaries.readings import (
    Origin,
    Reading,
    checked_k,
    encoder,
    matrix,
    refuse_option,
)
from services.inference.engine.dictionaries.sites import Declared, Header, Point, Site

CONFIG, EVALUATION = "config.json", "eval_results.json"
WEIGHTS = ("ae.safetensors", "ae.pt")


@dataclass(frozen=True)
class _Class:
    """The tensors of a `dict_class`. Linear layers hold [out, in], parameters [in, out]."""

    activation: str
    encoder: str
    decoder: str
    b_dec: str
    vectors: tuple[str, ...]
    """Other required vectors of length N, the encoder's bias first if it has one."""
    subtracts: bool
    linear: bool = True
    optional: tuple[str, ...] = ()
    rescales: bool = False


_LINEAR = ("encoder.weight", "decoder.weight")
_PARAMETERS = ("W_enc", "W_dec")
_CLASSES = {
    "AutoEncoder": _Class("relu", *_LINEAR, "bias", ("encoder.bias",), True),
    "AutoEncoderNew": _Class("relu", *_LINEAR, "decoder.bias", ("encoder.bias",), False),
    "AutoEncoderTopK": _Class(
        "topk", *_LINEAR, "b_dec", ("encoder.bias",), True, optional=("k", "threshold")
    ),
    "BatchTopKSAE": _Class(
        "batchtopk", *_LINEAR, "b_dec", ("encoder.bias",), True, optional=("k", "threshold")
    ),
    "MatryoshkaBatchTopKSAE": _Class(
        "batchtopk",
        *_PARAMETERS,
        "b_dec",
        ("b_enc",),
        True,
        linear=False,
        optional=("k", "threshold", "group_sizes"),
    ),
    "JumpReluAutoEncoder": _Class(
        "jumprelu",
        *_PARAMETERS,
        "b_dec",
        ("b_enc", "threshold"),
        False,
        linear=False,
        rescales=True,
    ),
    "GatedAutoEncoder": _Class(
        "gated",
        *_LINEAR,
        "decoder_bias",
        ("gate_bias", "r_mag", "mag_bias"),
        True,
        rescales=True,
    ),
}
_SUBMODULE = re.compile(
    r"(resid_post|resid_out|resid_pre|resid_mid|mlp_out|attn_out)_layer_?(\d+)\Z"
)
_POINTS = {
    "resid_post": Point.RESID_POST,
    "resid_out": Point.RESID_POST,
    "resid_pre": Point.RESID_PRE,
    "resid_mid": Point.RESID_MID,
    "mlp_out": Point.MLP_OUT,
    "attn_out": Point.ATTN_OUT,
}


def matches(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in WEIGHTS)


def read(folder: Path, origin: Origin) -> list[Reading]:
    """The one dictionary of the folder. Raises FailedPrecondition."""
    path = folder / CONFIG
    config = read_json(path)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        raise refuse_option(path, "trainer", trainer, "a mapping with dict_class")
    name = trainer.get("dict_class")
    if name not in _CLASSES:
        raise refuse_option(path, "trainer.dict_class", name, ", ".join(_CLASSES))
    kind = _CLASSES[name]
    site_in, site_out = _sites(path, config, trainer, folder, origin)

    file = TensorFile(next(folder / each for each in WEIGHTS if (folder / each).is_file()))
    optional = kind.optional if kind.activation != "batchtopk" else ("k", "group_sizes")
    required = [kind.encoder, kind.decoder, kind.b_dec, *kind.vectors]
    if kind.activation == "batchtopk":
        required.append("threshold")
    file.require(required, optional)
    latents, width = file.length(kind.vectors[0]), file.length(kind.b_dec)
    w_enc = encoder(file, kind.encoder, latents, turned=kind.linear)
    matrix(file, kind.encoder, width, latents, turned=kind.linear)
    w_dec = matrix(file, kind.decoder, latents, width, turned=kind.linear)
    for vector in kind.vectors[1:]:
        file.expect(vector, latents, kind.vectors[0])
    for key, size in (("activation_dim", width), ("dict_size", latents)):
        if trainer.get(key, size) != size:
            raise refuse_option(path, f"trainer.{key}", trainer[key], f"{size}, as in {file.path},")
    counted = kind.activation in ("topk", "batchtopk")
    k = _k(path, trainer, file, latents) if counted else 0
    evaluation = folder / EVALUATION
    header = Header(
        id="",
        site_in=site_in,
        site_out=site_out,
        d_in=width,
        d_out=width,
        latents=latents,
        activation="jumprelu" if kind.activation == "batchtopk" else kind.activation,
        declared=_declared(evaluation, float(k) if kind.activation == "batchtopk" else None),
        provenance=origin.provenance("dictionary_learning", file.path, path),
    )

    def load() -> Dictionary:
        b_dec = file.read(kind.b_dec)
        plain = Dictionary(
            header,
            w_enc.read(),
            w_dec.read(),
            torch.zeros(latents) if kind.activation == "gated" else file.read(kind.vectors[0]),
            b_in=b_dec.clone() if kind.subtracts else torch.zeros(width),
            b_dec=b_dec,
            activation=_activation(file, kind, k, latents),
            norm=InputNorm(),
        )
        return _in_units_of_writes(plain) if kind.rescales else plain

    return [Reading(folder, header, load)]


def _activation(file: TensorFile, kind: _Class, k: int, latents: int) -> Activation:
    match kind.activation:
        case "topk":
            return TopK(k)
        case "batchtopk":
            threshold = file.number("threshold")
            if threshold < 0:
                raise FailedPrecondition(
                    f"{file.path}: the threshold is {threshold:g}, so training ended before there "
                    "was one, and without it a token's latents depend on the rest of the batch"
                )
            return JumpRelu(torch.full((latents,), threshold))
        case "jumprelu":
            return JumpRelu(file.read("threshold"))
        case "gated":
            return Gated(file.read("gate_bias"), file.read("r_mag"), file.read("mag_bias"))
    return Relu()


def _in_units_of_writes(d: Dictionary) -> Dictionary:
    """The dictionary with f multiplied, and decoder rows divided, by the rows' lengths."""
    lengths = d.w_dec.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    activation = d.activation
    w_enc, b_enc = d.w_enc, d.b_enc
    if isinstance(activation, Gated):
        activation = Gated(
            activation.b_gate, activation.r_mag + lengths.log(), activation.b_mag * lengths
        )
    elif isinstance(activation, JumpRelu):
        activation = JumpRelu(activation.threshold * lengths)
        w_enc, b_enc = w_enc * lengths, b_enc * lengths
    return Dictionary(
        d.header,
        w_enc,
        d.w_dec / lengths[:, None],
        b_enc,
        d.b_in,
        d.b_dec,
        activation,
        d.norm,
        d.skip,
    )


def _k(path: Path, trainer: dict[str, Any], file: TensorFile, latents: int) -> int:
    k = trainer.get("k")
    held = int(file.number("k")) if "k" in file.shapes else None
    k = checked_k(path, "trainer.k", held if k is None else k, latents)
    if held not in (None, k):
        raise refuse_option(path, "trainer.k", k, f"{held}, as in {file.path},")
    return k


def _declared(evaluation: Path, l0: float | None) -> Declared:
    """What the evaluation beside the weights measured; else k, for a threshold learnt from it."""
    results = read_json(evaluation) if evaluation.is_file() else {}
    measured, explained = results.get("l0"), results.get("frac_variance_explained")
    return Declared(
        l0=float(measured) if isinstance(measured, int | float) else l0,
        fvu=1 - float(explained) if isinstance(explained, int | float) else None,
    )


def _sites(
    path: Path, config: dict[str, Any], trainer: dict[str, Any], folder: Path, origin: Origin
) -> tuple[Site, Site]:
    buffer = config.get("buffer")
    io = buffer.get("io", "out") if isinstance(buffer, dict) else "out"
    layer = trainer.get("layer")
    named = [str(trainer.get("submodule_name") or ""), *reversed(folder.parts)]
    found = next((match for name in named if (match := _SUBMODULE.match(name))), None)
    if found is None or io != "out":
        return origin.place_unnamed(
            path,
            layer if isinstance(layer, int) else None,
            before_post_norm=True,
            looked=f"submodule_name is {trainer.get('submodule_name')!r} and io {io!r}",
        )
    if isinstance(layer, int) and layer != int(found[2]):
        raise refuse_option(path, "trainer.layer", layer, f"{found[2]}, as in {found[0]},")
    site = Site(_POINTS[found[1]], int(found[2]), before_post_norm=True)
    return origin.place(path, site, site)
