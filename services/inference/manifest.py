"""The manifest of a result: what was run, exactly, and the id under which it is the same result."""

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from tdb.inference.v1 import manifest_pb2
from tdb.type.v1 import token_pb2

from services.inference.engine import ENGINE_VERSION
from services.inference.engine.model import Model
from services.inference.engine.shelf import Served
from services.inference.tensors import DATA_TYPES

SERVICE = "tdb.inference.v1.InferenceService"

HALF_PRECISION_WARNING = (
    "effects were computed in half precision and repeat only roughly; serve the model with "
    "TDB_DTYPE=float32 for numbers to rely on"
)


def precision_warnings(model: Model) -> list[str]:
    """What the reader of effects must know about the model's data type."""
    return [] if model.dtype is torch.float32 else [HALF_PRECISION_WARNING]


@dataclass(frozen=True)
class Question:
    """What is asked of which weights: known before anything runs, and the name of its answer."""

    method: str
    """Name of the RPC, such as `Attribute`."""
    request_json: str
    dictionaries: tuple[Served, ...]
    """Those used, in order of id."""
    result_id: str
    """SHA-256, in hex. Two answers under one id differ in rounding at most."""


def question(
    method: str, model: Model, canonical: Message, dictionaries: Sequence[str] = ()
) -> Question:
    """`canonical` is the request after reading made it canonical; its model is the resolved id.

    Dictionaries that the request names are used, and those of `dictionaries` besides.
    """
    request = MessageToDict(canonical)
    names = {*dictionaries, *_named(request, model.shelf.served.keys())}
    used = tuple(model.shelf.served[name] for name in sorted(names))
    request_json = json.dumps(request, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    parts = (
        model.identity.weights_hash,
        str(DATA_TYPES[model.dtype]),
        *(each.header.provenance.weights_hash for each in used),
        ENGINE_VERSION,
        f"{SERVICE}/{method}",
        request_json,
    )
    result_id = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return Question(method, request_json, used, result_id)


def build(
    method: str,
    model: Model,
    canonical: Message,
    token_ids: Sequence[Sequence[int]],
    timings: manifest_pb2.Timings,
    warnings: Sequence[str] = (),
    dictionaries: Sequence[str] = (),
) -> manifest_pb2.Manifest:
    """The manifest of the answer to `question`; the dictionaries' warnings come before
    `warnings`."""
    asked = question(method, model, canonical, dictionaries)
    return manifest_pb2.Manifest(
        result_id=asked.result_id,
        request_json=asked.request_json,
        method=f"{SERVICE}/{method}",
        model=model_ref(model),
        data_type=DATA_TYPES[model.dtype],
        device=str(model.device),
        engine_version=ENGINE_VERSION,
        token_ids=[token_pb2.TokenIds(ids=ids) for ids in token_ids],
        timings=timings,
        dictionaries=[
            manifest_pb2.DictionaryRef(
                id=each.header.id, weights_hash=each.header.provenance.weights_hash
            )
            for each in asked.dictionaries
        ],
        warnings=[*(each.warning for each in asked.dictionaries if each.warning), *warnings],
    )


_IN_ADDRESSES = re.compile(r"(?:latent|latents|bias|skip|error)\.([A-Za-z0-9_-]+)(?:[.~].*)?")
_NOT_ADDRESSES = frozenset({"stop", "text", "content"})


def _named(part: object, known: Collection[str], key: str = "") -> Iterator[str]:
    """Ids of dictionaries in the addresses and lists of a canonical request."""
    match part:
        case dict():
            for name, value in part.items():
                if name not in _NOT_ADDRESSES:
                    yield from _named(value, known, name)
        case list():
            for value in part:
                yield from _named(value, known, key)
        case str() if key == "dictionaries":
            yield part
        case str():
            match = _IN_ADDRESSES.fullmatch(part)
            if match and match[1] in known:
                yield match[1]


def model_ref(model: Model) -> manifest_pb2.ModelRef:
    identity = model.identity
    return manifest_pb2.ModelRef(
        id=identity.id, revision=identity.revision, weights_hash=identity.weights_hash
    )
