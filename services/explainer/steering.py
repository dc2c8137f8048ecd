"""Making a model go on with a text twice, once with a component amplified: for the intervention
score.

What is amplified: a neuron's or latent's value is set to STRENGTH times its largest activation, at
every position that is read; what a head puts out is multiplied by HEAD_FACTOR, since it has no
value of its own. Both texts are drawn with the same random numbers, which depend on the prompt and
the seed. Prompts are the first tokens of texts, where those leave the component inactive (a head
never is), of documents that its explainer did not see.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from tdb.inference.v1 import generate_pb2, intervention_pb2, manifest_pb2, model_pb2
from tdb.type.v1 import token_pb2

from services.common.errors import FailedPrecondition, NotFound
from services.explainer.components import Subject
from services.explainer.engine.components import ACTIVE_SHARE, Example, HeadExample, keyed
from services.explainer.engine.explainers import AnySplit
from services.explainer.engine.intervention import Generate
from services.explainer.engine.splits import split_pairs, split_tokens
from services.explainer.read_outs import is_of
from services.explainer.stored import Dataset
from services.explainer.upstream import Upstream

STRENGTH = 8.0
HEAD_FACTOR = 4.0
PROMPT_TOKENS = 8
NEW_TOKENS = 24
TEMPERATURE = 1.0


@dataclass(frozen=True)
class Opening:
    """The first tokens of a text; without ids where the dataset knows texts only."""

    text: str
    ids: tuple[int, ...]


class ModelSteering:
    """Steers the model that the inference service serves."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    async def prepare(
        self, subject: Subject, *, prompts: int, seed: int, shown: frozenset[str] = frozenset()
    ) -> tuple[Sequence[str], Generate]:
        """Up to `prompts` prompts, and what goes on with one: with the component amplified, and
        without. No prompt is of a document in `shown`.

        Raises FailedPrecondition where nothing can be amplified, there are too few documents, or
        the model that the dataset is of is not served.
        """
        amplified = amplification(subject)
        drawn = await asyncio.to_thread(openings_of, subject, prompts, seed, shown)
        openings = {each.text: each for each in drawn}
        model = await self._model(subject.dataset)
        # A prompt may have one token more, which its texts begin with.
        room = model.dimensions.context - PROMPT_TOKENS - 1
        if room < 1:
            raise FailedPrecondition(
                f"{subject.dataset.model.id} has a context of {model.dimensions.context} tokens: "
                "no room to go on with a text",
                reason="CONTEXT_TOO_SHORT",
            )

        async def generate(prompt: str) -> tuple[str, str]:
            request = generate_pb2.GenerateRequest(
                model=subject.dataset.model.id,
                max_new_tokens=min(NEW_TOKENS, room),
                temperature=TEMPERATURE,
                seed=keyed(seed, "steer", prompt) % 2**31,
                past_end=False,
                twin=True,
            )
            request.run.prompt.CopyFrom(_prompt(openings[prompt], model.tokenizer))
            request.run.interventions.append(amplified)
            summary = generate_pb2.GenerateSummary()
            async for response in self._upstream.inference.Generate(request):
                summary = response.summary
            _check(subject, summary.manifest)
            texts = {each.branch: each.text for each in summary.continuations}
            return texts[generate_pb2.BRANCH_EDITED], texts[generate_pb2.BRANCH_TWIN]

        return list(openings), generate

    async def _model(self, dataset: Dataset) -> model_pb2.GetModelResponse:
        """Raises FailedPrecondition where the model is not served."""
        try:
            return await self._upstream.inference.GetModel(
                model_pb2.GetModelRequest(model=dataset.model.id)
            )
        except NotFound as error:
            raise FailedPrecondition(
                f"the dataset is of {dataset.model.id}, which is not served: {error.message}",
                field="dataset",
                reason="MODEL_NOT_SERVED",
            ) from None


def amplification(subject: Subject) -> intervention_pb2.Intervention:
    """The edit that amplifies a component. Raises FailedPrecondition where there is none."""
    edit = intervention_pb2.Intervention(target=subject.address)
    if subject.component.is_head:
        edit.scale.factor = HEAD_FACTOR
        return edit
    largest = subject.component.scale
    if largest <= 0:
        raise FailedPrecondition(
            f"{subject.address} is active nowhere, so that nothing says how strongly to set it",
            reason="NEVER_ACTIVE",
        )
    edit.set.value = STRENGTH * largest
    return edit


def openings_of(
    subject: Subject, count: int, seed: int, shown: frozenset[str] = frozenset()
) -> list[Opening]:
    """Up to `count` different openings, drawn by the seed. Raises FailedPrecondition."""
    component = subject.component
    split: AnySplit
    if component.is_head:
        split = split_pairs(component, seed=seed, shown=shown)
    else:
        split = split_tokens(component, seed=seed, shown=shown)
    found = {
        "".join(each.token_texts[:PROMPT_TOKENS]): each.token_ids[:PROMPT_TOKENS]
        for half in ((split.scoring,) if shown else (split.explaining, split.scoring))
        for each in (*half.quiet, *half.active)
        if isinstance(each, HeadExample) or _begins_quietly(each, split.scale)
    }
    drawn = sorted(found, key=lambda text: keyed(seed, "opening", text))[:count]
    return [Opening(text, found[text]) for text in drawn]


def _begins_quietly(example: Example, scale: float) -> bool:
    return max(example.activations[:PROMPT_TOKENS]) <= ACTIVE_SHARE * scale


def _prompt(opening: Opening, tokenizer: model_pb2.TokenizerFacts) -> token_pb2.Prompt:
    """As the model is used to it: behind the token that its texts begin with."""
    if not opening.ids:
        return token_pb2.Prompt(text=opening.text)
    ids = list(opening.ids)
    if tokenizer.prepends_bos and ids[0] != tokenizer.bos_id:
        ids.insert(0, tokenizer.bos_id)
    return token_pb2.Prompt(token_ids=token_pb2.TokenIds(ids=ids))


def _check(subject: Subject, manifest: manifest_pb2.Manifest) -> None:
    if not is_of(subject.dataset, subject.address, manifest):
        raise FailedPrecondition(
            f"the model {subject.dataset.model.id} that is served has other weights than the one "
            f"that the dataset {subject.dataset.name!r} is of",
            field="dataset",
            reason="OTHER_MODEL",
        )
