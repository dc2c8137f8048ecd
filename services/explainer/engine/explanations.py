"""What an explanation is: a text, and where it came from."""

from dataclasses import dataclass, field
from enum import StrEnum

from services.common.errors import InvalidArgument

MAX_CHARACTERS = 2000


class Method(StrEnum):
    """How an explanation was made; shown wherever its text is."""

    TOKEN_ACTIVATION_PAIRS = "token_activation_pairs"
    MAX_ACTIVATION_SUMMARY = "max_activation_summary"
    CONTRASTIVE = "contrastive"
    ATTENTION_HEAD = "attention_head"
    OUTPUT_CENTRED = "output_centred"
    TOKEN_PATTERN = "token_pattern"
    HUMAN = "human"
    IMPORTED = "imported"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a text came from.

    `model` and `provider` (the endpoint's host) are empty where no model was asked. `prompt_hash`
    is the SHA-256 of what it was asked. `documents` were shown to the explainer: no score may use
    them.
    """

    method: Method
    model: str = ""
    provider: str = ""
    prompt_hash: str = ""
    seed: int | None = None
    documents: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Explanation:
    """What a component does, in words."""

    component: str
    text: str
    provenance: Provenance

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise InvalidArgument("an explanation has a text", field="text")
        if len(self.text) > MAX_CHARACTERS:
            raise InvalidArgument(
                f"an explanation has at most {MAX_CHARACTERS} characters, this {len(self.text)}",
                field="text",
            )

    @property
    def method(self) -> Method:
        return self.provenance.method
