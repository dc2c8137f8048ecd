"""SAELens: `cfg.json` and `sae_weights.safetensors`, version 6 and the flat layouts before it.

    pre = (norm(x) - b_dec if apply_b_dec_to_input) @ W_enc + b_enc

A transcoder never subtracts b_dec and never undoes its norm. TopK with
`rescale_acts_by_decoder_norm` multiplies pre by |W_dec[i]| and divides f by it again, which is
folded. A gpt2-small dictionary may have been trained on centred weights
(`center_writing_weights`): the raw residual is centred first.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.common.errors import FailedPrecondition
from services.inference.engine.dictionaries import hooks
from services.inference.engine.dictionaries.dictionary import (
    Activation,
    Dictionary,
    Gated,
    InputNorm,
    JumpRelu,
    NormKind,
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

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"

_ARCHITECTURES = {
    "standard": "relu",
    "gated": "gated",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
# What changes a number in version 6; other keys that version writes are about training.
_MEANINGFUL = {
    "architecture",
    "d_in",
    "d_sae",
    "d_out",
    "k",
    "apply_b_dec_to_input",
    "normalize_activations",
    "reshape_activations",
    "rescale_acts_by_decoder_norm",
    "finetuning_scaling_factor",
    "metadata",
}
_TRAINING = {
    "sae_lens_version",
    "dtype",
    "device",
    "l1_coefficient",
    "lp_norm",
    "l1_warm_up_steps",
    "l0_coefficient",
    "l0_warm_up_steps",
    "decoder_init_norm",
    "jumprelu_init_threshold",
    "jumprelu_bandwidth",
    "jumprelu_sparsity_loss_mode",
    "jumprelu_tanh_scale",
    "pre_act_loss_coefficient",
    "aux_loss_coefficient",
    "use_sparse_activations",
    "topk_threshold_lr",
    "matryoshka_widths",
}
_CENTRED_POINTS = (
    Point.RESID_PRE,
    Point.RESID_MID,
    Point.RESID_POST,
    Point.ATTN_OUT,
    Point.MLP_OUT,
)


@dataclass(frozen=True)
class _Config:
    """The options of either layout, under version 6's names."""

    path: Path
    options: dict[str, Any]
    metadata: dict[str, Any]
    architecture: str

    @property
    def transcodes(self) -> bool:
        return "transcoder" in self.architecture

    @property
    def activation(self) -> str:
        return _ARCHITECTURES[self.architecture]

    @property
    def trained_with(self) -> dict[str, Any]:
        """How the model was processed before training."""
        return self.metadata.get("model_from_pretrained_kwargs") or {}

    def flag(self, key: str, default: bool) -> bool:
        value = self.options.get(key, default)
        if not isinstance(value, bool):
            raise refuse_option(self.path, key, value, "true or false")
        return value


def matches(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read(folder: Path, origin: Origin) -> list[Reading]:
    """The one dictionary of the folder. Raises FailedPrecondition."""
    config = _config(folder / CONFIG)
    site_in, site_out = _sites(config, origin)
    file = TensorFile(folder / WEIGHTS)
    _check_tensors(file, config)
    bias = "b_gate" if config.activation == "gated" else "b_enc"
    latents, d_out = file.length(bias), file.length("b_dec")
    w_enc = encoder(file, "W_enc", latents, turned=False)
    w_dec = matrix(file, "W_dec", latents, d_out, turned=False)
    d_in = w_enc.rows
    skip = matrix(file, "W_skip", d_in, d_out, turned=True) if "W_skip" in file.shapes else None
    for key, size in (("d_in", d_in), ("d_sae", latents), ("d_out", d_out)):
        if config.options.get(key, size) != size:
            raise refuse_option(
                config.path, key, config.options[key], f"{size}, as in {file.path},"
            )
    if not config.transcodes and d_in != d_out:
        raise FailedPrecondition(
            f"{file.path}: W_enc reads {d_in} channels and b_dec writes {d_out}, yet "
            f"{config.path} says {config.architecture}, not a transcoder"
        )
    for name in ("b_enc", "b_gate", "r_mag", "b_mag", "threshold", "log_threshold"):
        if name in file.shapes:
            file.expect(name, latents, f"W_enc {list(file.shapes['W_enc'])}")
    if config.activation == "topk":
        checked_k(config.path, "k", config.options.get("k"), latents)
    subtracts = not config.transcodes and config.flag("apply_b_dec_to_input", True)
    norm = _norm(config, folder, site_in)
    header = Header(
        id="",
        site_in=site_in,
        site_out=site_out,
        d_in=d_in,
        d_out=d_out,
        latents=latents,
        activation=config.activation,
        declared=_declared(config, folder),
        provenance=origin.provenance("saelens", config.path, file.path),
        has_skip=skip is not None,
    )

    def load() -> Dictionary:
        encoding, decoding = w_enc.read(), w_dec.read()
        b_enc = file.read("b_enc") if "b_enc" in file.shapes else torch.zeros(latents)
        b_dec = file.read("b_dec")
        if (scaling := _scaling(file, config, latents)) is not None:
            decoding = decoding * scaling[:, None]
        if config.activation == "topk" and config.flag("rescale_acts_by_decoder_norm", False):
            lengths = decoding.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
            encoding, b_enc, decoding = (
                encoding * lengths,
                b_enc * lengths,
                decoding / lengths[:, None],
            )
        return Dictionary(
            header,
            encoding,
            decoding,
            b_enc,
            b_in=b_dec.clone() if subtracts else torch.zeros(d_in),
            b_dec=b_dec,
            activation=_activation(file, config),
            norm=norm,
            skip=None if skip is None else skip.read(),
        )

    return [Reading(folder, header, load)]


def _config(path: Path) -> _Config:
    raw = read_json(path)
    if isinstance(metadata := raw.get("metadata"), dict):
        if unknown := sorted(set(raw) - _MEANINGFUL - _TRAINING):
            raise FailedPrecondition(
                f"{path}: option {unknown[0]!r} is unknown; ignoring it could give wrong numbers"
            )
        options = raw
    else:
        options = {_RENAMED.get(key, key): value for key, value in raw.items()}
        metadata = options
    architecture = options.get("architecture") or "standard"
    function = options.get("activation_fn") or "relu"
    if function == "topk" and architecture in ("standard", "topk"):
        architecture = "topk"
        options = {"k": (options.get("activation_fn_kwargs") or {}).get("k"), **options}
    elif function != "relu":
        raise refuse_option(path, "activation_fn", function, "relu or topk")
    if architecture not in _ARCHITECTURES:
        raise refuse_option(path, "architecture", architecture, ", ".join(_ARCHITECTURES))
    if metadata.get("hook_head_index") is not None:
        raise refuse_option(
            path, "hook_head_index", metadata["hook_head_index"], "null (all heads)"
        )
    config = _Config(path, options, metadata, architecture)
    if architecture != "topk" and config.flag("rescale_acts_by_decoder_norm", False):
        raise refuse_option(path, "rescale_acts_by_decoder_norm", True, "false outside topk")
    if config.transcodes and config.options.get("apply_b_dec_to_input") is True:
        raise refuse_option(path, "apply_b_dec_to_input", True, "false in a transcoder")
    return config


def _sites(config: _Config, origin: Origin) -> tuple[Site, Site]:
    site_in = _site(config, "hook_name", "hf_hook_name", origin)
    site_out = site_in
    if config.transcodes:
        site_out = _site(config, "hook_name_out", "hf_hook_name_out", origin)
    reshape = config.options.get("reshape_activations", "none")
    if site_in is None or site_out is None:
        site_in, site_out = origin.place_unnamed(
            config.path,
            None,
            before_post_norm=False,
            looked=f"its hook_name is {config.metadata.get('hook_name')!r}",
        )
    else:
        site_in, site_out = origin.place(config.path, site_in, site_out)
    if reshape not in ("none", "hook_z") or (reshape == "hook_z" and site_in.point is not Point.Z):
        raise refuse_option(
            config.path, "reshape_activations", reshape, "none, or hook_z on a hook_z,"
        )
    return site_in, site_out


def _site(config: _Config, key: str, alternative: str, origin: Origin) -> Site | None:
    hook = config.metadata.get(key)
    site = hooks.transformer_lens(hook) if isinstance(hook, str) else None
    if site is None and isinstance(other := config.metadata.get(alternative), str):
        site = hooks.hugging_face(other)
    if site is None and origin.override is None:
        raise FailedPrecondition(
            f"{config.path}: {key} is {hook!r}, which is no point of ours (blocks.LAYER. and one "
            f"of {hooks.known_hooks()}); if it equals one, end the URI in #site=POINT.LAYER"
        )
    return site


def _norm(config: _Config, folder: Path, site_in: Site) -> InputNorm:
    value = config.options.get("normalize_activations")
    undone = not config.transcodes
    scaler = folder / SCALER
    factor = read_json(scaler).get("scaling_factor") if scaler.is_file() else None
    centred = _is_centred(config, site_in)
    match value:
        case None | False | "none":
            if factor is not None:
                raise FailedPrecondition(
                    f"{scaler} says {factor}, but {config.path} says that nothing is rescaled"
                )
            return InputNorm(NormKind.CENTRE) if centred else InputNorm()
        case "layer_norm":
            return InputNorm(NormKind.LAYER_NORM, eps=1e-5, undone=undone)
        case _ if centred:
            raise refuse_option(
                config.path, "normalize_activations", value, "none or layer_norm on centred weights"
            )
        case "constant_norm_rescale":
            return InputNorm(NormKind.CONSTANT_NORM, undone=undone)
        case True | "expected_average_only_in" if isinstance(factor, float | int):
            return InputNorm(NormKind.FACTOR, factor=float(factor), undone=undone)
        case True | "expected_average_only_in":
            raise FailedPrecondition(
                f"{config.path}: normalize_activations is {value!r}, but no file has the factor: "
                "fold it into the weights (fold_activation_norm_scaling_factor) and save again, or "
                f'put {SCALER} with {{"scaling_factor": ...}} beside it'
            )
        case _:
            raise refuse_option(
                config.path,
                "normalize_activations",
                value,
                "none, expected_average_only_in, constant_norm_rescale or layer_norm",
            )


def _declared(config: _Config, folder: Path) -> Declared:
    """`metadata` is the publisher's own: `l0` and `fvu` are taken for what they are called, and
    `dataset_path` for a file's name where there is one beside the dictionary or its folder."""
    sample = str(config.metadata.get("dataset_path") or "")
    beside = [place / sample for place in (folder, folder.parent)] if sample else []
    l0, fvu = (config.metadata.get(key) for key in ("l0", "fvu"))
    return Declared(
        l0=float(l0) if isinstance(l0, int | float) else None,
        fvu=float(fvu) if isinstance(fvu, int | float) else None,
        sample=sample,
        sample_file=next((p for p in beside if p.is_file() and Path(sample).name == sample), None),
        leave_out_first=slice(*(config.metadata.get("seqpos_slice") or [None])).start or 0,
    )


def _is_centred(config: _Config, site_in: Site) -> bool:
    """Whether x must be centred first. Raises where the model's processing cannot be undone."""
    how = config.trained_with
    if site_in.point is Point.Z:
        for key in ("fold_value_biases", "refactor_factored_attn_matrices"):
            if how.get(key):
                raise refuse_option(
                    config.path, f"model_from_pretrained_kwargs.{key}", True, "false"
                )
    if how.get("fold_ln") and site_in.point is Point.MLP_IN and not site_in.before_gain:
        raise refuse_option(config.path, "model_from_pretrained_kwargs.fold_ln", True, "false")
    if not how.get("center_writing_weights"):
        return False
    if config.transcodes:
        raise refuse_option(
            config.path, "model_from_pretrained_kwargs.center_writing_weights", True, "false"
        )
    return site_in.point in _CENTRED_POINTS


def _check_tensors(file: TensorFile, config: _Config) -> None:
    required = ["W_enc", "W_dec", "b_dec"]
    optional = ["scaling_factor", "finetuning_scaling_factor"]
    match config.activation:
        case "gated":
            required += ["b_gate", "r_mag", "b_mag"]
        case "jumprelu":
            log = "log_threshold" in file.shapes
            required += ["b_enc", "log_threshold" if log else "threshold"]
        case _:
            required.append("b_enc")
    if "skip" in config.architecture:
        required.append("W_skip")
    file.require(required, optional)


def _activation(file: TensorFile, config: _Config) -> Activation:
    match config.activation:
        case "topk":
            return TopK(config.options["k"])
        case "gated":
            return Gated(file.read("b_gate"), file.read("r_mag"), file.read("b_mag"))
        case "jumprelu" if "log_threshold" in file.shapes:
            return JumpRelu(file.read("log_threshold").exp())
        case "jumprelu":
            return JumpRelu(file.read("threshold"))
    return Relu()


def _scaling(file: TensorFile, config: _Config, latents: int) -> Tensor | None:
    """The finetuned scale of each latent before decoding; None where there is none."""
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name not in file.shapes:
            continue
        file.expect(name, latents, "b_enc")
        scaling = file.read(name)
        if torch.allclose(scaling, torch.ones_like(scaling)):
            return None
        if not config.options.get("finetuning_scaling_factor"):
            raise FailedPrecondition(
                f"{file.path}: {name!r} is not all ones, yet {config.path} does not say "
                "finetuning_scaling_factor"
            )
        return scaling
    return None
