"""What the store holds: explanations with their scores and ratings, as plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from services.common.addresses import parse
from services.explainer.engine.explanations import Method
from services.explainer.engine.replies import FailureKind
from services.explainer.engine.scores import Measure, Scorer


@dataclass(frozen=True)
class ExplainedModel:
    """The model that explanations are of; without a hash any weights of this id.

    An explanation with a hash is shown for those weights only, one without for all of its id.
    `dictionaries` are hashes of dictionaries' weights by id: a latent's explanation with a hash is
    shown for that dictionary only, whatever else has its id.
    """

    id: str
    weights_hash: str = ""
    dictionaries: tuple[tuple[str, str], ...] = ()

    def dictionary_hash(self, component: str) -> str:
        """Of the dictionary that a latent is of; "" for what is no latent, or not known."""
        return dict(self.dictionaries).get(parse(component).dictionary, "")


@dataclass(frozen=True)
class Dataset:
    """A dataset as provenance names it: its name, the hash of its manifest, the model it is of."""

    name: str
    hash: str
    model: ExplainedModel


@dataclass(frozen=True, kw_only=True)
class NewExplanation:
    """An explanation that is to be stored. `documents` were shown to whoever made it.

    `explainer_model` is the language model that was asked, `provider` the endpoint's host.
    `published_method` is how an imported text was made, in its publisher's words.
    `source_key` names what it is, for what comes again (an import, a component of a job): of one
    key one explanation is stored.
    """

    model: ExplainedModel
    component: str
    text: str
    method: Method
    explainer_model: str = ""
    provider: str = ""
    prompt_hash: str = ""
    seed: int | None = None
    dataset: str = ""
    dataset_hash: str = ""
    documents: frozenset[str] = field(default_factory=frozenset)
    code_version: str
    author: str
    based_on: str = ""
    published_method: str = ""
    source_key: str | None = None


@dataclass(frozen=True, kw_only=True)
class NewScore:
    """A score that is to be stored.

    A number that others published has neither scorer nor measure, and what its publisher calls it
    in `measure_name`; no chance level, seed or judge of ours is known of it.
    """

    scorer: Scorer | None = None
    measure: Measure | None = None
    measure_name: str = ""
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    failures: Mapping[FailureKind, int] = field(default_factory=dict)
    seed: int | None = None
    judge: str = ""
    dataset: str = ""
    dataset_hash: str = ""
    code_version: str = ""

    @property
    def chance(self) -> float | None:
        """What guessing gives."""
        return None if self.measure is None else self.measure.chance


@dataclass(frozen=True, kw_only=True)
class StoredScore(NewScore):
    created_ms: int


@dataclass(frozen=True)
class Ratings:
    """How users rate an explanation, 1 to 5; `own` is the caller's."""

    count: int = 0
    mean: float | None = None
    own: int | None = None


@dataclass(frozen=True, kw_only=True)
class StoredExplanation:
    """An explanation as it is stored. `number` is the row, `documents` how many were shown.

    Of every scorer, measure, judge and dataset `scores` has the newest, newest first.
    """

    number: int
    id: str
    model: ExplainedModel
    component: str
    text: str
    method: Method
    explainer_model: str
    provider: str
    prompt_hash: str
    seed: int | None
    dataset: str
    dataset_hash: str
    documents: int
    code_version: str
    author: str
    based_on: str
    published_method: str
    created_ms: int
    scores: tuple[StoredScore, ...]
    ratings: Ratings
