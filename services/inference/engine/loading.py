"""Loading: from a folder or Hub id to weights, tokenizer and identity, or one sentence why not.

Nothing a model folder says is run (`trust_remote_code` is never on), weights come as safetensors
or through `torch.load(weights_only=True)`, and a checkpoint that leaves weights uninitialised is
refused: transformers would fill them with random numbers and go on.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.activations import FastGELUActivation, GELUTanh, NewGELUActivation

from services.common.errors import FailedPrecondition
from services.inference.engine import attention, hub, text
from services.inference.engine.families import family_of

_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class Identity:
    """Which weights these are."""

    id: str
    revision: str
    """Hub commit; empty for a local folder."""
    weights_hash: str
    """SHA-256, in hex, of configuration and weights."""


@dataclass(frozen=True)
class Loaded:
    """The model in eval mode without parameter gradients, and its vocabulary."""

    identity: Identity
    folder: Path
    model: PreTrainedModel
    vocabulary: text.Vocabulary


def load(
    name: str, source: str, tokenizer: str | None, device: torch.device, dtype: torch.dtype
) -> Loaded:
    """Loads `source` (a folder or Hub id), served as `name`. Raises FailedPrecondition."""
    folder, revision = hub.folder(source, _PATTERNS, _has_weights)
    if not (folder / "config.json").is_file():
        raise FailedPrecondition(f"{folder} holds no config.json, so it is no model folder")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise FailedPrecondition(
            f"{folder / 'config.json'} is not readable: {hub.sentence(error)}"
        ) from error
    family_of(config)
    model = _weights(folder, device, dtype)
    vocabulary = _vocabulary(folder, tokenizer, model.get_output_embeddings().weight.shape[0])
    identity = Identity(name, revision, _hash(folder))
    return Loaded(identity, folder, model, vocabulary)


def _weights(folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention.IMPLEMENTATION,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (ValueError, OSError, RuntimeError, UnpicklingError) as error:
        raise FailedPrecondition(f"{folder} does not load: {hub.sentence(error)}") from error
    missing = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if missing:
        raise FailedPrecondition(
            f"{folder} lacks {len(missing)} weights that the model needs, first {missing[0]}",
            reason="INCOMPLETE_WEIGHTS",
        )
    model.eval().requires_grad_(False).to(device)
    if dtype == torch.float32:
        _fuse_activations(model)
    loaded: PreTrainedModel = model
    return loaded


def _fuse_activations(model: torch.nn.Module) -> None:
    """GELU with tanh in one kernel instead of eight: the same function, but for float32's rounding.

    In half precision every step of the composed one rounds, and a model is what its file computes.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation | FastGELUActivation):
                setattr(module, name, GELUTanh())


def _vocabulary(folder: Path, tokenizer: str | None, size: int) -> text.Vocabulary:
    if tokenizer is not None:
        patterns = [each for each in _PATTERNS if each != "*.safetensors"]
        folder, _ = hub.folder(tokenizer, patterns, text.has_tokenizer)
        if not text.has_tokenizer(folder):
            raise FailedPrecondition(f"--tokenizer: {folder} holds no tokenizer")
    if not text.has_tokenizer(folder):
        return text.Vocabulary(size, None)
    return text.Vocabulary.load(size, folder)


def _has_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _hash(folder: Path) -> str:
    digest = hashlib.sha256()
    names = sorted(
        path.name
        for path in folder.iterdir()
        if path.name == "config.json" or re.fullmatch(r".*\.(safetensors|bin)", path.name)
    )
    for name in names:
        digest.update(name.encode() + b"\0")
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
