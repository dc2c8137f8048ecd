"""A model whose latents are known, because they were built by hand.

The residual stream is two halves of one place per token of the vocabulary: the first says which
token is read, the second which one comes next. Attention and MLP write nothing. A latent of the
dictionary `planted` reads the places of the tokens of its class and writes those of the tokens that
it promotes. What none of them writes is as likely as any other token.
"""

import asyncio
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from services.common.settings import DictionarySource
from tests.dataset.building import helpers
from tests.explainer.services import Services

DATASET, LAYER = "planted", "blocks.0.hook_resid_post"
FILLERS = (
    *("the", "a", "of", "was", "in", "and", "to", "saw", "had", "on", "with", "for", "by"),
    *("at", "from", "that", "this", "one", "some", "near", "over", "went", "came", "here"),
    # Else a capitalised word would be all that there is to say of the names.
    *("Then", "But", "Now"),
)


@dataclass(frozen=True)
class Latent:
    """Fires on `words`, each as strongly as is written beside it, and promotes `promotes`."""

    meaning: str
    words: dict[str, float]
    promotes: tuple[str, ...] = ()


LATENTS = (
    Latent("people", {"Mary": 10, "John": 10, "Anna": 6}, ("her", "him")),
    Latent("colours", {"red": 10, "blue": 8, "green": 8}, ("box", "hat")),
    Latent("animals", {"dog": 10, "cat": 10, "horse": 5}, ("barked", "ran")),
    Latent("numbers", {"two": 7, "three": 10, "seven": 10}, ("pounds", "hours")),
    Latent("meals", {"bread": 10, "soup": 10, "cheese": 10}, ("ate", "cooked")),
    Latent("weather", {"rain": 10, "snow": 4}, ("fell",)),
    Latent("moods", {"happy": 10, "sad": 10, "angry": 10}, ("smiled", "cried")),
    Latent("places", {"park": 10, "school": 9, "garden": 10}, ("gate",)),
    # These mean nothing.
    Latent("", {"the": 10, "near": 10}),
    Latent("", {"of": 5, "went": 10}),
    Latent("", {"red": 10, "soup": 10, "two": 10}, ("gate",)),
    Latent("", {}),
)
MEANINGFUL = [number for number, latent in enumerate(LATENTS) if latent.meaning]
WORDS = list(
    dict.fromkeys([*FILLERS, *(word for each in LATENTS for word in (*each.words, *each.promotes))])
)
UNKNOWN, END = "?", "<|endoftext|>"
VOCABULARY = [END, UNKNOWN, *(f"Ġ{word}" for word in WORDS)]


def address(number: int) -> str:
    return f"latent.planted.{number}"


def write_model(folder: Path) -> None:
    """The model with its tokenizer, in which every word is one token with its space before it."""
    ids = {text: number for number, text in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, unk_token=UNKNOWN
    ).save_pretrained(folder)
    size = len(VOCABULARY)
    config = GPT2Config(
        vocab_size=size,
        n_positions=64,
        n_embd=2 * size,
        n_layer=1,
        n_head=1,
        n_inner=8,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        block = model.transformer.h[0]
        for tensor in (
            model.transformer.wte.weight,
            model.transformer.wpe.weight,
            model.lm_head.weight,
            block.attn.c_proj.weight,
            block.mlp.c_proj.weight,
        ):
            tensor.zero_()
        model.transformer.wte.weight[:, :size] = torch.eye(size)
        # A latent that is amplified then decides about every second token.
        model.lm_head.weight[:, size:] = 0.6 * torch.eye(size)
        # A text does not end by itself.
        model.lm_head.weight[0, :size] = -50.0
        model.lm_head.weight[0, size:] = -50.0
    model.save_pretrained(folder)


def write_dictionary(folder: Path) -> None:
    """In SAELens's layout."""
    size = len(VOCABULARY)
    w_enc, w_dec = torch.zeros(2 * size, len(LATENTS)), torch.zeros(len(LATENTS), 2 * size)
    for number, latent in enumerate(LATENTS):
        for word, strength in latent.words.items():
            w_enc[VOCABULARY.index(f"Ġ{word}"), number] = strength
        for word in latent.promotes:
            w_dec[number, size + VOCABULARY.index(f"Ġ{word}")] = 0.025
    folder.mkdir(parents=True)
    config = {
        "architecture": "standard",
        "d_in": 2 * size,
        "d_sae": len(LATENTS),
        "dtype": "float32",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "metadata": {"hook_name": LAYER},
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    tensors = {"W_enc": w_enc, "W_dec": w_dec}
    tensors |= {"b_enc": torch.zeros(len(LATENTS)), "b_dec": torch.zeros(2 * size)}
    save_file(tensors, folder / "sae_weights.safetensors")


def documents(count: int = 240) -> list[str]:
    """Fillers, and among them words of two classes."""
    found = []
    for number in range(count):
        draw = random.Random(number)
        chosen = draw.choices(FILLERS, k=20)
        for latent in draw.sample([LATENTS[each] for each in MEANINGFUL], 2):
            for _ in range(2):
                chosen.insert(draw.randrange(len(chosen)), draw.choice(list(latent.words)))
        found.append(" ".join(chosen))
    return found


class Planted(Services):
    """The model, and the folder with the dataset that was built with it."""

    def __init__(self, root: Path) -> None:
        write_model(root / "model")
        write_dictionary(root / "dictionary")
        source = DictionarySource("planted", str(root / "dictionary"), unchecked=True)
        super().__init__("planted", root / "model", [source], root / "data")
        corpora = self.data / "corpora"
        corpora.mkdir(parents=True)
        lines = [json.dumps({"body": each}) + "\n" for each in documents()]
        (corpora / "texts.jsonl").write_text("".join(lines))
        request = helpers.request(
            dataset=DATASET,
            groups=["latent.planted"],
            corpus={"files": {"path": "texts.jsonl", "field": "body"}},
            tokens="100000",
            sequenceLength=24,
            topK=20,
            random=60,
            quantiles=3,
            segmentTokens=100_000,
        )
        asyncio.run(self.build(request))
