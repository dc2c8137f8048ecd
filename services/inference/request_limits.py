"""The limits that requests are held to, together, as GetModel tells them."""

from tdb.channel import MAX_MESSAGE_BYTES
from tdb.inference.v1 import model_pb2

from services.inference import (
    generate,
    harvest,
    request_interventions,
    request_points,
    request_tokens,
    requests,
    verify,
)
from services.inference.engine.model import Model
from services.inference.engine.text import MAX_CHARACTERS


def of(model: Model) -> model_pb2.Limits:
    return model_pb2.Limits(
        max_tokens=model.architecture.context,
        max_rows=requests.MAX_ROWS,
        max_interventions=request_interventions.MAX_INTERVENTIONS,
        max_token_refs=request_tokens.MAX_TOKEN_REFS,
        max_reference_prompts=request_interventions.MAX_REFERENCE_PROMPTS,
        max_reference_tokens=request_interventions.MAX_REFERENCE_TOKENS,
        max_patch_depth=request_interventions.MAX_PATCH_DEPTH,
        max_tensor_bytes=request_points.MAX_TENSOR_BYTES,
        max_stream_bytes=request_points.MAX_STREAM_BYTES,
        max_characters=MAX_CHARACTERS,
        max_chat_messages=request_tokens.MAX_CHAT_MESSAGES,
        max_verified_nodes=verify.MAX_NODES,
        max_verified_rows=requests.MAX_VERIFIED_ROWS,
        max_stop_texts=generate.MAX_STOPS,
        max_stop_characters=generate.MAX_STOP_CHARACTERS,
        max_message_bytes=MAX_MESSAGE_BYTES,
        max_harvest_tokens=harvest.MAX_TOKENS,
        max_harvest_sequences=harvest.MAX_SEQUENCES,
        max_activation_bytes=model.room.budget,
    )
