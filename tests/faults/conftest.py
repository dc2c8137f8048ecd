"""Two tiny models, between them all that a request can speak of: dictionaries, a chat template and
padded vocabulary rows in one, gated neurons, grouped heads and no tokenizer in the other."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gateway.app import create_app
from services.common.server import ServiceServer
from services.common.settings import DictionarySource, ModelSource, Settings
from services.inference.engine import verification
from services.inference.engine.model import Model
from services.inference.scheduler import Scheduler
from services.inference.server import build_server, load_model
from tests.dataset.helpers import COMPONENTS
from tests.faults.random_messages import World
from tests.faults.watching import SlowDevice
from tests.gateway.helpers import NOWHERE, listening
from tests.inference.conftest import model_folder
from tests.inference.helpers import PADDED_VOCABULARY, SENTENCE
from tests.inference.test_dictionaries_service import exact, write
from tests.inference.test_generate_service import TEMPLATE

__all__ = ["model_folder"]

WORLD = World(
    models=("tiny", "gated"),
    vocabulary=PADDED_VOCABULARY,
    layers=2,
    heads=2,
    neurons=64,
    width=16,
    head_width=8,
    dictionaries={"set-mlp_out-0": 32, "set-mlp_out-1": 32, "attn": 32, "stream": 32, "mlp": 40},
    sets=("set",),
    texts=(SENTENCE, "John gave a drink to Mary", "the store", "Mary \U0001f600 e\u0301 \x00"),
    words=(" Mary", " John", " store", " gave", " to"),
    datasets=("small",),
    components=COMPONENTS,
)


@pytest.fixture(scope="session")
def models(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """What WORLD describes."""
    root = tmp_path_factory.mktemp("faults")
    chatty = root / "tiny"
    chatty.mkdir()
    for path in model_folder.iterdir():
        (chatty / path.name).symlink_to(path)
    (chatty / "chat_template.jinja").write_text(TEMPLATE)
    for layer in range(2):
        write(root / "set" / str(layer), f"blocks.{layer}.hook_mlp_out", *exact())
    write(root / "attn", "blocks.1.hook_attn_out", *exact())
    write(root / "stream", "blocks.1.hook_resid_post", *exact())
    random = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    write(root / "mlp", "blocks.1.hook_mlp_out", random, random.T.contiguous())
    sources = [DictionarySource(name, str(root / name), True) for name in ("attn", "stream", "mlp")]
    sources.append(DictionarySource("set", str(root / "set"), False))
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=PADDED_VOCABULARY,
        max_position_embeddings=32,
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(root / "gated")
    return {
        "tiny": load_model(ModelSource("tiny", str(chatty)), None, sources),
        "gated": load_model(ModelSource("gated", str(root / "gated")), None),
    }


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SlowDevice:
    monkeypatch.setattr(verification, "TOKENS_PER_CHUNK", {"cpu": 1})
    return SlowDevice()


@pytest_asyncio.fixture
async def scheduler(device: SlowDevice) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(observer=device)
    yield scheduler
    await asyncio.to_thread(scheduler.close)


@pytest_asyncio.fixture
async def server(
    models: dict[str, Model], scheduler: Scheduler, tmp_path: Path
) -> AsyncIterator[ServiceServer]:
    settings = Settings.from_env(
        {
            "TDB_MODEL": "tiny=/",
            "TDB_DATA_DIR": str(tmp_path),
            "TDB_DRAIN_SECONDS": "1",
            "TDB_CACHE_MIB": "0",
        }
    )
    async with build_server(settings, scheduler, {"tiny": models["tiny"]}, port=0) as server:
        await server.set_serving()
        yield server


@pytest_asyncio.fixture
async def gateway(server: ServiceServer, tmp_path: Path) -> AsyncIterator[str]:
    """Its address."""
    settings = Settings.from_env({"TDB_DATA_DIR": str(tmp_path)})
    app = create_app(settings, {"inference": f"127.0.0.1:{server.port}"}, NOWHERE)
    async with listening(app) as url:
        yield url
