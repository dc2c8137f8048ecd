"""The manifest of a result: what was run, exactly, and the id under which it is the same result."""

import hashlib
import json
from collections.abc import Sequence

import torch
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from tdb.inference.v1 import manifest_pb2
from tdb.type.v1 import token_pb2

from services.inference.engine import ENGINE_VERSION
from services.inference.engine.model import Model
from services.inference.tensors import DATA_TYPES

SERVICE = "tdb.inference.v1.InferenceService"

HALF_PRECISION_WARNING = (
    "effects were computed in half precision and repeat only roughly; serve the model with "
    "TDB_DTYPE=float32 for numbers to rely on"
)


def precision_warnings(model: Model) -> list[str]:
    """What the reader of effects must know about the model's data type."""
    return [] if model.dtype is torch.float32 else [HALF_PRECISION_WARNING]


def build(
    method: str,
    model: Model,
    canonical: Message,
    token_ids: Sequence[Sequence[int]],
    timings: manifest_pb2.Timings,
    warnings: Sequence[str] = (),
    dictionaries: Sequence[str] = (),
) -> manifest_pb2.Manifest:
    """`canonical` is the request after reading made it canonical; its model is the resolved id.

    `dictionaries` has the ids of those that were used; their warnings come before `warnings`.
    """
    used = [model.shelf.served[name] for name in dictionaries]
    request = MessageToDict(canonical)
    request_json = json.dumps(request, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    manifest = manifest_pb2.Manifest(
        request_json=request_json,
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
            for each in used
        ],
        warnings=[*(each.warning for each in used if each.warning), *warnings],
    )
    manifest.result_id = _result_id(manifest)
    return manifest


def model_ref(model: Model) -> manifest_pb2.ModelRef:
    identity = model.identity
    return manifest_pb2.ModelRef(
        id=identity.id, revision=identity.revision, weights_hash=identity.weights_hash
    )


def _result_id(manifest: manifest_pb2.Manifest) -> str:
    parts = (
        manifest.model.weights_hash,
        str(manifest.data_type),
        *(each.weights_hash for each in manifest.dictionaries),
        manifest.engine_version,
        manifest.method,
        manifest.request_json,
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
