"""Two tiny models, between them all that a request can speak of: dictionaries, a chat template and
padded vocabulary rows in one, gated neurons, grouped heads and no tokenizer in the other."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from services.common.settings import DictionarySource, ModelSource
from services.inference.engine.model import Model
from services.inference.server import load_model
from tests.faults.random_messages import World
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
