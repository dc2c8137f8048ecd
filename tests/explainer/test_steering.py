"""What is asked of the inference service for the intervention score, and what is refused."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from tdb.inference.v1 import generate_pb2, model_pb2

from services.common.errors import FailedPrecondition, NotFound
from services.explainer import steering
from services.explainer.components import Subject
from services.explainer.engine.components import Component
from services.explainer.engine.explainers import token_pattern
from services.explainer.engine.splits import split_tokens
from services.explainer.steering import ModelSteering
from services.explainer.stored import Dataset, ExplainedModel
from tests.explainer import synthetic

NOBODY: frozenset[str] = frozenset()
DATASET = Dataset("small", "cd", ExplainedModel("demo", "ab", (("D", "ef"),)))


class Model:
    """Stands in for upstream and its inference service; keeps what it was asked."""

    def __init__(self) -> None:
        self.inference = self
        self.asked: list[generate_pb2.GenerateRequest] = []
        self.described = model_pb2.GetModelResponse()
        self.described.dimensions.context = 64
        self.served = True
        self.weights = {"": "ab", "D": "ef"}

    async def GetModel(self, request: model_pb2.GetModelRequest) -> model_pb2.GetModelResponse:
        if not self.served:
            raise NotFound(f"no model {request.model}: served is other", field="model")
        return self.described

    async def Generate(
        self, request: generate_pb2.GenerateRequest
    ) -> AsyncIterator[generate_pb2.GenerateResponse]:
        self.asked.append(request)
        yield generate_pb2.GenerateResponse(token=generate_pb2.GeneratedToken(text="x"))
        summary = generate_pb2.GenerateSummary()
        summary.manifest.model.weights_hash = self.weights[""]
        summary.manifest.dictionaries.add(id="D", weights_hash=self.weights["D"])
        summary.continuations.add(branch=generate_pb2.BRANCH_TWIN, text="plain")
        summary.continuations.add(branch=generate_pb2.BRANCH_EDITED, text="steered")
        yield generate_pb2.GenerateResponse(summary=summary)


def subject(component: Component | None = None) -> Subject:
    return Subject(component or synthetic.component(), DATASET)


def with_ids(component: Component) -> Component:
    """Each token's id is the length of its text."""
    examples: Any = [
        replace(each, token_ids=tuple(map(len, each.token_texts))) for each in component.examples
    ]
    return replace(component, examples=tuple(examples))


async def prepare(
    model: Any, given: Subject, *, seed: int = 0, shown: frozenset[str] = NOBODY
) -> Any:
    return await ModelSteering(model).prepare(given, prompts=8, seed=seed, shown=shown)


async def test_a_neuron_is_set_to_a_multiple_of_its_maximum_beside_an_untouched_twin() -> None:
    model = Model()
    prompts, generate = await prepare(model, subject())
    assert await generate(prompts[0]) == ("steered", "plain")
    (asked,) = model.asked
    assert asked.model == "demo"
    assert asked.run.prompt.text == prompts[0]
    (edit,) = asked.run.interventions
    assert edit.target == "neuron.1.7"
    assert edit.set.value == steering.STRENGTH * 4.0, "its maximum is 4"
    assert not edit.HasField("positions"), "at every position"
    assert asked.twin
    assert asked.temperature == steering.TEMPERATURE
    await generate(prompts[0])
    await generate(prompts[1])
    seeds = [each.seed for each in model.asked]
    assert seeds[0] == seeds[1] != seeds[2]


async def test_a_head_is_multiplied() -> None:
    model = Model()
    prompts, generate = await prepare(model, subject(synthetic.head()))
    await generate(prompts[0])
    (edit,) = model.asked[0].run.interventions
    assert (edit.target, edit.scale.factor) == ("head.1.2", steering.HEAD_FACTOR)


async def test_prompts_are_openings_of_quiet_texts_that_the_explainer_did_not_see() -> None:
    component = synthetic.component()
    model = Model()
    prompts, _ = await prepare(model, subject(component))
    assert len(set(prompts)) == 8
    for prompt in prompts:
        assert " Mary" not in prompt
        assert len(prompt.split()) == steering.PROMPT_TOKENS
    assert list(prompts) == list((await prepare(model, subject(component)))[0])
    assert list(prompts) != list((await prepare(model, subject(component), seed=1))[0])
    shown = token_pattern(component, split_tokens(component, seed=0)).provenance.documents
    others, _ = await prepare(model, subject(component), shown=shown)
    openings = {
        "".join(each.token_texts[: steering.PROMPT_TOKENS])
        for each in component.examples
        if each.document_id in shown
    }
    assert others
    assert not openings & set(others)
    everything = frozenset(each.document_id for each in component.examples)
    with pytest.raises(FailedPrecondition) as refused:
        await prepare(model, subject(component), shown=everything)
    assert refused.value.reason == "TOO_FEW_DOCUMENTS"


@pytest.mark.parametrize(("prepends", "before"), [(True, [0]), (False, [])])
async def test_known_ids_are_sent_as_the_model_is_used_to_them(
    prepends: bool, before: list[int]
) -> None:
    model = Model()
    model.described.tokenizer.prepends_bos = prepends
    model.described.tokenizer.bos_id = 0
    prompts, generate = await prepare(model, subject(with_ids(synthetic.component())))
    await generate(prompts[0])
    ids = list(model.asked[0].run.prompt.token_ids.ids)
    assert len(ids) == len(before) + steering.PROMPT_TOKENS
    assert ids[: len(before)] == before
    assert sum(ids) == len(prompts[0])


@pytest.mark.parametrize(("context", "room"), [(1024, 24), (20, 11), (10, 1), (9, None)])
async def test_a_continuation_fits_the_context(context: int, room: int | None) -> None:
    model = Model()
    model.described.dimensions.context = context
    if room is None:
        with pytest.raises(FailedPrecondition) as refused:
            await prepare(model, subject())
        assert refused.value.reason == "CONTEXT_TOO_SHORT"
        return
    prompts, generate = await prepare(model, subject())
    await generate(prompts[0])
    assert model.asked[0].max_new_tokens == room


async def test_what_is_active_nowhere_cannot_be_amplified() -> None:
    silent = replace(synthetic.component('Fires on the token " Zoe" (10).'), max_activation=0.0)
    with pytest.raises(FailedPrecondition) as refused:
        await prepare(Model(), subject(silent))
    assert refused.value.reason == "NEVER_ACTIVE"


async def test_a_model_that_is_not_served_is_said() -> None:
    model = Model()
    model.served = False
    with pytest.raises(FailedPrecondition, match="not served") as refused:
        await prepare(model, subject())
    assert (refused.value.reason, refused.value.field) == ("MODEL_NOT_SERVED", "dataset")


@pytest.mark.parametrize("other", ["", "D"])
async def test_other_weights_are_not_steered_in_place_of_these(other: str) -> None:
    model = Model()
    model.weights[other] = "00"
    latent = replace(synthetic.component(), address="latent.D.7")
    prompts, generate = await prepare(model, subject(latent))
    with pytest.raises(FailedPrecondition) as refused:
        await generate(prompts[0])
    assert refused.value.reason == "OTHER_MODEL"
