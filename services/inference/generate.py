"""`Generate`: from its request to continuations, and from their tokens to the stream's messages.

Every token is its own piece of work on the device, so that other calls get in between.
"""

import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tdb.inference.v1 import generate_pb2, manifest_pb2
from tdb.type.v1 import token_pb2

from services.common.errors import FailedPrecondition, InvalidArgument, inside
from services.inference import manifest, queue_messages, request_tokens, requests, responses
from services.inference.engine.generation import Continuation, Ending, Finish, Generated
from services.inference.engine.model import Model
from services.inference.engine.sampling import Sampling
from services.inference.engine.text import Vocabulary
from services.inference.requests import ReadRun
from services.inference.scheduler import OnDevice
from services.inference.task import Task

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.generate_pb2 import _Branch

    Branch = _Branch.ValueType

DEFAULT_NEW_TOKENS = 32
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 200
MAX_TOP = 20

_FINISH = {
    Finish.LENGTH: generate_pb2.FINISH_REASON_LENGTH,
    Finish.STOP_TOKEN: generate_pb2.FINISH_REASON_STOP_TOKEN,
    Finish.STOP_TEXT: generate_pb2.FINISH_REASON_STOP_TEXT,
}


@dataclass(frozen=True)
class Wanted:
    """What a GenerateRequest asks for."""

    run: ReadRun
    sampling: Sampling
    ending: Ending
    twin: bool
    top: int


def read(request: generate_pb2.GenerateRequest, model: Model) -> Wanted:
    """Makes the request canonical, seed included. Raises InvalidArgument, FailedPrecondition."""
    with inside("run"):
        if not request.HasField("run"):
            raise InvalidArgument("a prompt is required", reason="REQUIRED")
        prompt = requests.read_prompt(request.run, model)
    new_tokens = _new_tokens(request, model, len(prompt))
    with inside("run"):
        # The last generated token is never run.
        tokens = len(prompt) + new_tokens - 1
        edits = requests.read_edits(request.run, model, tokens, len(prompt))
    if request.twin and not edits:
        raise InvalidArgument(
            "a twin runs without the interventions, and there are none", field="twin"
        )
    stop_tokens = _stop_tokens(request, model)
    return Wanted(
        ReadRun(prompt, edits),
        _sampling(request, model.vocabulary),
        Ending(new_tokens, stop_tokens, _stop_texts(request, model.vocabulary)),
        request.twin,
        _top(request),
    )


def is_repeatable(request: generate_pb2.GenerateRequest) -> bool:
    """Whether the request, as it came, has one answer: nothing is drawn, or its seed is given."""
    return request.temperature == 0 or request.HasField("seed")


def _new_tokens(request: generate_pb2.GenerateRequest, model: Model, prompt: int) -> int:
    room = model.architecture.context - prompt
    if room < 1:
        raise InvalidArgument(
            f"the prompt has {prompt} tokens, all that this model reads, so nothing can follow it",
            field="run.prompt",
        )
    if not request.HasField("max_new_tokens"):
        request.max_new_tokens = min(DEFAULT_NEW_TOKENS, room)
    if not 1 <= request.max_new_tokens <= room:
        raise InvalidArgument(
            f"max_new_tokens is {request.max_new_tokens}; valid is 1..{room}: the prompt has "
            f"{prompt} tokens and this model reads {model.architecture.context}",
            field="max_new_tokens",
        )
    return request.max_new_tokens


def _sampling(request: generate_pb2.GenerateRequest, vocabulary: Vocabulary) -> Sampling:
    request.temperature = request.temperature  # absent becomes 0
    if request.temperature < 0:
        raise InvalidArgument(
            f"temperature is {request.temperature:g}; 0 takes the likeliest token, above 0 samples",
            field="temperature",
        )
    if request.temperature == 0:
        for field in ("top_k", "top_p", "seed"):
            if request.HasField(field):
                raise InvalidArgument(
                    f"at temperature 0 the likeliest token is taken, so {field} means nothing; "
                    "give a temperature above 0",
                    field=field,
                )
        return Sampling()
    if request.HasField("top_k") and not 1 <= request.top_k <= vocabulary.listed:
        raise InvalidArgument(
            f"top_k is {request.top_k}; valid is 1..{vocabulary.listed}", field="top_k"
        )
    if request.HasField("top_p") and not 0 < request.top_p <= 1:
        raise InvalidArgument(
            f"top_p is {request.top_p:g}; valid is above 0, at most 1", field="top_p"
        )
    if not request.HasField("seed"):
        request.seed = secrets.randbelow(2**31)
    if request.seed < 0:
        raise InvalidArgument(f"seed is {request.seed}; valid is 0..{2**31 - 1}", field="seed")
    return Sampling(
        request.temperature,
        request.top_k if request.HasField("top_k") else None,
        request.top_p if request.HasField("top_p") else 1.0,
        request.seed,
    )


def _stop_tokens(request: generate_pb2.GenerateRequest, model: Model) -> tuple[int, ...]:
    end = model.vocabulary.facts.eos_id if model.vocabulary.facts else None
    if request.past_end:
        if request.stop_tokens:
            raise InvalidArgument(
                "with stop_tokens only those end the continuation, so past_end means nothing",
                field="past_end",
            )
        if end is None:
            raise InvalidArgument(
                "no end-of-sequence token is known here, so none can be gone past",
                field="past_end",
            )
        return ()
    if not request.stop_tokens and end is not None:
        request.stop_tokens.append(token_pb2.TokenRef(id=end))
    return request_tokens.token_ids(request.stop_tokens, "stop_tokens", model)


def _stop_texts(request: generate_pb2.GenerateRequest, vocabulary: Vocabulary) -> tuple[str, ...]:
    if not request.stop:
        return ()
    if vocabulary.facts is None:
        raise FailedPrecondition(
            "no tokenizer: stop by stop_tokens or start with --tokenizer",
            field="stop",
            reason="NO_TOKENIZER",
        )
    if len(request.stop) > MAX_STOPS:
        raise InvalidArgument(
            f"{len(request.stop)} stop texts are given; at most {MAX_STOPS} are looked for",
            field="stop",
        )
    for number, text in enumerate(request.stop):
        if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            raise InvalidArgument(
                f"a stop text has 1 to {MAX_STOP_CHARACTERS} characters, this has {len(text)}",
                field=f"stop[{number}]",
            )
        if text in request.stop[:number]:
            raise InvalidArgument(
                f"{text!r} is listed twice; name it once", field=f"stop[{number}]"
            )
    return tuple(request.stop)


def _top(request: generate_pb2.GenerateRequest) -> int:
    request.top_log_probs = request.top_log_probs  # absent becomes 0
    if not 0 <= request.top_log_probs <= MAX_TOP:
        raise InvalidArgument(
            f"top_log_probs is {request.top_log_probs}; valid is 0..{MAX_TOP}",
            field="top_log_probs",
        )
    return request.top_log_probs


async def stream(
    request: generate_pb2.GenerateRequest, wanted: Wanted, model: Model, on_device: OnDevice
) -> AsyncIterator[generate_pb2.GenerateResponse]:
    """Progress, every token as it is chosen, and the summary. `request` is canonical."""
    ids, edits = wanted.run.token_ids, wanted.run.edits
    branches = {generate_pb2.BRANCH_EDITED: edits}
    if wanted.twin:
        branches[generate_pb2.BRANCH_TWIN] = ()
    growing = {
        branch: model.generate(ids, each, wanted.sampling, wanted.ending, wanted.top)
        for branch, each in branches.items()
    }
    total = wanted.ending.max_new_tokens * len(growing)
    progress = queue_messages.progress(0, total, "tokens")
    yield generate_pb2.GenerateResponse(progress=progress)
    timings = manifest_pb2.Timings()
    done = 0
    while any(each.finish is None for each in growing.values()):
        for branch, each in growing.items():
            if each.finish is None:
                # The first step runs the whole prompt.
                task = Task("Generate.step") if each.token_ids else Task("Generate", len(ids))
                with on_device.enter(each.step, task) as ticket:
                    async for place in ticket.places():
                        progress = queue_messages.progress(done, total, "tokens", place)
                        yield generate_pb2.GenerateResponse(progress=progress)
                    finished = await ticket.result()
                queue_messages.add_wait(timings, finished)
                done += 1
                token = _token(branch, finished.result, model.vocabulary)
                yield generate_pb2.GenerateResponse(token=token)
    timings.forward_ms = sum(each.forward_ms for each in growing.values())
    edited = growing[generate_pb2.BRANCH_EDITED]
    read = [each.ids_read for each in growing.values()]
    summary = generate_pb2.GenerateSummary(
        manifest=manifest.build(
            "Generate", model, request, read, timings, _unreached(edited, len(ids))
        ),
        continuations=[_continuation(branch, each) for branch, each in growing.items()],
        receipts=[responses.receipt(each) for each in edited.receipts],
    )
    yield generate_pb2.GenerateResponse(summary=summary)


def _token(
    branch: "Branch", generated: Generated, vocabulary: Vocabulary
) -> generate_pb2.GeneratedToken:
    return generate_pb2.GeneratedToken(
        branch=branch,
        position=generated.position,
        token=responses.token(generated.token_id, vocabulary),
        text=generated.text,
        log_prob=generated.log_prob,
        top=responses.scores(generated.top, vocabulary),
    )


def _continuation(branch: "Branch", continuation: Continuation) -> generate_pb2.Continuation:
    assert continuation.finish is not None
    return generate_pb2.Continuation(
        branch=branch,
        token_ids=token_pb2.TokenIds(ids=continuation.token_ids),
        text=continuation.text,
        finish_reason=_FINISH[continuation.finish],
    )


def _unreached(edited: Continuation, prompt: int) -> list[str]:
    """A warning for each intervention that was never applied."""
    last = prompt + len(edited.token_ids) - 2
    return [
        f"interventions[{number}] ({receipt.target}) was never applied: the continuation ended "
        f"early, and the last position read was {last}"
        for number, receipt in enumerate(edited.receipts)
        if receipt.sites == 0
    ]
