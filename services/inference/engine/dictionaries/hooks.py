"""The names other libraries give to points, as sites of ours.

TransformerLens takes `hook_mlp_out` and `hook_attn_out` after a post-norm, Hugging Face's
`mlp` and `self_attn` modules end before it. `hook_normalized` is before the norm's gain.
"""

import re

from services.inference.engine.dictionaries.sites import Point, Site

_TRANSFORMER_LENS = {
    "hook_resid_pre": (Point.RESID_PRE, {}),
    "hook_resid_mid": (Point.RESID_MID, {}),
    "hook_mlp_in": (Point.RESID_MID, {}),  # a copy of the residual, before the norm
    "hook_resid_post": (Point.RESID_POST, {}),
    "hook_attn_out": (Point.ATTN_OUT, {"before_post_norm": False}),
    "hook_mlp_out": (Point.MLP_OUT, {"before_post_norm": False}),
    "mlp.hook_in": (Point.MLP_IN, {}),
    "mlp.hook_out": (Point.MLP_OUT, {"before_post_norm": True}),
    "ln2.hook_normalized": (Point.MLP_IN, {"before_gain": True}),
    "attn.hook_z": (Point.Z, {}),
    "mlp.hook_post": (Point.MLP_ACT, {}),
}
_HUGGING_FACE = {
    "output": (Point.RESID_POST, {}),
    "input": (Point.RESID_PRE, {}),
    "self_attn.o_proj.input": (Point.Z, {}),
    "mlp.down_proj.input": (Point.MLP_ACT, {}),
    "self_attn.output": (Point.ATTN_OUT, {"before_post_norm": True}),
    "mlp.output": (Point.MLP_OUT, {"before_post_norm": True}),
    "mlp.input": (Point.MLP_IN, {}),
    "pre_feedforward_layernorm.output": (Point.MLP_IN, {}),
    "post_feedforward_layernorm.output": (Point.MLP_OUT, {"before_post_norm": False}),
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\Z")
_LAYER = re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.(.+)\Z")


def transformer_lens(hook: str) -> Site | None:
    """`blocks.3.hook_mlp_out` as a site; None if it is no point of ours."""
    match = _BLOCK.match(hook)
    return in_block(match[2], int(match[1])) if match else None


def in_block(hook: str, layer: int) -> Site | None:
    """`hook_mlp_out` in this layer."""
    point, more = _TRANSFORMER_LENS.get(hook, (None, {}))
    return Site(point, layer, **more) if point else None


def hugging_face(hook: str) -> Site | None:
    """`model.layers.3.post_feedforward_layernorm.output` as a site."""
    match = _LAYER.match(hook)
    if not match:
        return None
    point, more = _HUGGING_FACE.get(match[2], (None, {}))
    return Site(point, int(match[1]), **more) if point else None


def known_hooks() -> str:
    return ", ".join(_TRANSFORMER_LENS)
