"""The records that OpenAI has published for Transformer Debugger, as paths below the bucket's base
URL: `PATH/LAYER/INDEX.json`, one file for each component.

The paths are those of Transformer Debugger's own table; its documents spell some otherwise. Left
out is `.../resid_delta_attn_v4/collated-activations-by-token-pair`: it gives a latent one value per
pair of tokens, and here only heads have pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from services.common.addresses import Kind
from services.dataset.groups import Group


@dataclass(frozen=True)
class Published:
    name: str
    """What the dataset is called here."""
    path: str
    kind: Kind
    model: str
    layers: int
    components: int
    """Of each layer."""
    dictionary: str = ""
    """Of latents: the dictionaries' id, with `{layer}` in it."""

    def groups(self) -> Iterator[tuple[Group, int]]:
        """Its groups, each with its layer, in the dataset's order."""
        found = [(self._group(layer), layer) for layer in range(self.layers)]
        yield from sorted(found, key=lambda each: each[0].order)

    def _group(self, layer: int) -> Group:
        if self.kind is Kind.LATENT:
            return Group(self.kind, dictionary=self.dictionary.replace("{layer}", str(layer)))
        return Group(self.kind, layer)


def _latents(dictionary: str) -> Published:
    folder = dictionary.removeprefix("ae-").replace("-", "_")
    return Published(
        name=f"openai-gpt2-{dictionary}",
        path=f"gpt2_small/autoencoder_latent/{folder}/collated-activations",
        kind=Kind.LATENT,
        model="gpt2",
        layers=12,
        components=32_768,
        dictionary=f"{dictionary}-{{layer}}",
    )


PUBLISHED = (
    Published(
        "openai-gpt2-neurons",
        "gpt2_small_data/collated-activations",
        Kind.NEURON,
        "gpt2",
        layers=12,
        components=3_072,
    ),
    Published(
        "openai-gpt2-heads",
        "gpt2_small/attn_write_norm/collated-activations-by-token-pair",
        Kind.HEAD,
        "gpt2",
        layers=12,
        components=12,
    ),
    _latents("ae-mlp-post-act-v1"),
    _latents("ae-mlp-post-act-v4"),
    _latents("ae-resid-delta-mlp-v1"),
    _latents("ae-resid-delta-mlp-v4"),
    _latents("ae-resid-delta-attn-v4"),
    Published(
        "openai-gpt2-xl-neurons",
        "data/collated-activations",
        Kind.NEURON,
        "gpt2-xl",
        layers=48,
        components=6_400,
    ),
)
