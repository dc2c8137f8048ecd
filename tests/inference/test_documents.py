"""Documents tokenised many at a time, longer than the context, each as if it were alone."""

from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import pytest
from tdb.inference.v1 import model_pb2
from tdb.type.v1 import token_pb2
from transformers import AutoTokenizer

from services.inference.engine.model import Model
from tests.inference.helpers import CONTEXT, SENTENCE

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.service_pb2_grpc import InferenceServiceAsyncStub as Stub


async def test_each_document_is_tokenised_by_itself(
    stub: "Stub", model: Model, model_folder: Path
) -> None:
    texts = [SENTENCE * 20, "", " John gave", "naïve\n"]
    response = await stub.Tokenize(model_pb2.TokenizeRequest(documents=texts))
    plain = AutoTokenizer.from_pretrained(model_folder)
    wanted = [plain(text, add_special_tokens=False).input_ids for text in texts]
    assert [list(each.ids) for each in response.documents] == wanted
    assert len(wanted[0]) > CONTEXT
    described = await stub.GetModel(model_pb2.GetModelRequest())
    assert described.tokenizer.hash == model.vocabulary.files_hash
    assert len(described.tokenizer.hash) == 64


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (
            model_pb2.TokenizeRequest(documents=["a"], prompt=token_pb2.Prompt(text="a")),
            "two calls",
        ),
        (model_pb2.TokenizeRequest(documents=["a" * 600_000, "b" * 600_000]), "at most 1000000"),
        (model_pb2.TokenizeRequest(), "a prompt is required"),
    ],
)
async def test_what_cannot_be_tokenised_is_refused(
    stub: "Stub", request_: model_pb2.TokenizeRequest, says: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=says) as refusal:
        await stub.Tokenize(request_)
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
