"""What a build is of: the request, and what was found out before the first token was harvested.

A build goes on only with an equal plan, so a model or a corpus that changed meanwhile is noticed.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from services.common.addresses import Kind
from services.common.harvest.state import Keep
from services.dataset import files, groups
from services.dataset.groups import Group

SUMMED_TOKENS = 1_000
SUMMED_BYTES = 32 * 2**20
"""Of the sums of one group: with many components they are kept for fewer tokens."""
HISTOGRAM_BYTES = 2500
"""Two of them, and moments."""
STRATA, PER_STRATUM = 10, 2
"""Where samples by quantile come from: see `services.common.harvest`."""


@dataclass(frozen=True)
class Components:
    """All components of a group."""

    name: str
    count: int
    places_per_sequence: int
    """Activations of a component on the longest sequence."""

    @property
    def group(self) -> Group:
        return groups.parse(self.name)

    @property
    def is_of_heads(self) -> bool:
        return self.group.kind is Kind.HEAD


@dataclass(frozen=True)
class Plan:
    model: str
    weights_hash: str
    tokenizer_hash: str
    dictionaries: tuple[tuple[str, str], ...]
    """Ids and hashes of the weights."""
    components: tuple[Components, ...]
    """In the dataset's order."""
    vocabulary: int
    """Token ids that have a text."""
    bos: int | None
    """What every sequence begins with."""
    sequence_length: int
    tokens: int
    """At most."""
    segment_tokens: int
    top_k: int
    random: int
    quantiles: int
    seed: int
    corpus: str
    """Its name in the dataset."""
    corpus_identity: str
    """What changes when the corpus does, as far as can be seen without reading it."""

    @property
    def keep(self) -> Keep:
        strata = STRATA if self.quantiles else 0
        return Keep(self.top_k, self.random, strata, PER_STRATUM, self.seed)

    @property
    def examples(self) -> int:
        """Of a record, at most."""
        keep = self.keep
        return keep.top + keep.random + keep.strata * keep.per_stratum

    @property
    def summed_tokens(self) -> int:
        """Tokens whose mean activation is known, at most."""
        components = max(each.count for each in self.components)
        return max(1, min(SUMMED_TOKENS, SUMMED_BYTES // (8 * components)))

    @property
    def state_bytes(self) -> int:
        """Of the states of all groups together, at most."""
        kept = sum(
            each.count
            * (
                self.examples * (4 * each.places_per_sequence + 8)
                + 8 * self.summed_tokens * (1 + each.is_of_heads)
                + HISTOGRAM_BYTES
            )
            for each in self.components
        )
        sequences = self.tokens // self.sequence_length + 1
        return kept + 8 * sequences * len(self.components)

    @property
    def disk_bytes(self) -> int:
        """What a build takes at its largest: two generations of states, the tokens that were read,
        and the records, which are compressed."""
        return 3 * self.state_bytes + 6 * self.tokens

    def write(self, path: Path) -> None:
        with files.atomic(path) as file:
            file.write(self.content())

    def content(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()
