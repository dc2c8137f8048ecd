"""A small model folder with a tokenizer of its own, and the real service on it."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
import pytest
import pytest_asyncio
import torch
from tdb.inference.v1 import service_pb2_grpc
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from services.common.server import ServiceServer
from services.common.settings import ModelSource, Settings
from services.inference.engine.model import Model
from services.inference.scheduler import Scheduler
from services.inference.server import build_server, load_model
from tests.inference.helpers import CONTEXT, PADDED_VOCABULARY, SENTENCE

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.service_pb2_grpc import InferenceServiceAsyncStub


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 with more vocabulary rows than its tokenizer has tokens."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SENTENCE] * 8, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=PADDED_VOCABULARY,
        n_positions=CONTEXT,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(model_folder: Path) -> Model:
    return load_model(ModelSource("tiny", str(model_folder)), None)


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    scheduler = Scheduler()
    yield scheduler
    scheduler.close()


@pytest_asyncio.fixture
async def server(
    model: Model, model_folder: Path, scheduler: Scheduler, tmp_path: Path
) -> AsyncIterator[ServiceServer]:
    """The real gRPC service on loopback, serving `tiny`; `later` is named but never loads."""
    settings = Settings.from_env(
        {
            "TDB_MODEL": f"tiny={model_folder},later={model_folder}",
            "TDB_DATA_DIR": str(tmp_path),
            "TDB_DRAIN_SECONDS": "1",
            # What is asked twice is computed twice: a replay proves nothing otherwise.
            "TDB_CACHE_MIB": "0",
        }
    )
    async with build_server(settings, scheduler, {"tiny": model}, port=0) as server:
        await server.set_serving()
        yield server


@pytest_asyncio.fixture
async def stub(server: ServiceServer) -> AsyncIterator["InferenceServiceAsyncStub"]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield service_pb2_grpc.InferenceServiceStub(channel)
