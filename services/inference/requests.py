"""From request messages to what the engine understands, with every refusal a request can earn.

Reading a message also makes it canonical in place: text becomes token ids, addresses their one
spelling, defaults are filled in. What is left in the message is the manifest's canonical request,
so servicers hand in a copy. Field paths of refusals are relative; callers put theirs in front.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tdb.inference.v1 import attribute_pb2, intervention_pb2, objective_pb2, run_pb2
from tdb.type.v1 import token_pb2

from services.common import addresses
from services.common.errors import InvalidArgument, inside
from services.inference import features
from services.inference.engine import interventions, tables
from services.inference.engine.attribution import ExplainedRun, NormMode
from services.inference.engine.columns import Column
from services.inference.engine.interventions import Edit, Intervention, SetValue, Zero
from services.inference.engine.model import Model
from services.inference.engine.objectives import LogitDiff
from services.inference.engine.text import ChatMessage

MAX_ROWS = 100_000
MAX_INTERVENTIONS = 1_000
MAX_TOKEN_REFS = 100
DEFAULT_ROWS = 50
DEFAULT_TOP_TOKENS = 10

_NORM_MODES = {
    attribute_pb2.NORM_MODE_FINAL_NORM_FROZEN: NormMode.FINAL_NORM_FROZEN,
    attribute_pb2.NORM_MODE_ALL_NORMS_FROZEN: NormMode.ALL_NORMS_FROZEN,
    attribute_pb2.NORM_MODE_LIVE: NormMode.LIVE,
}
_COLUMNS: dict[int, Column | None] = {
    attribute_pb2.COLUMN_ACTIVATION: Column.ACTIVATION,
    attribute_pb2.COLUMN_WRITE_MAGNITUDE: Column.WRITE_MAGNITUDE,
    attribute_pb2.COLUMN_DIRECT_EFFECT: Column.DIRECT_EFFECT,
    attribute_pb2.COLUMN_TOTAL_EFFECT: Column.TOTAL_EFFECT,
    attribute_pb2.COLUMN_EACH: None,
}


@dataclass(frozen=True)
class ReadRun:
    """A prompt's ids and the edits made while the model reads it."""

    token_ids: tuple[int, ...]
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class Forward:
    """What a RunRequest asks for."""

    run: ReadRun
    positions: tuple[int, ...]
    top_k: int
    named: tuple[int, ...]


@dataclass(frozen=True)
class Attribution:
    """What an AttributeRequest asks for: one run, or a run and the one it is compared with."""

    runs: tuple[ExplainedRun, ...]
    norm_mode: NormMode
    ranking: tables.Ranking


def read_forward(request: run_pb2.RunRequest, model: Model) -> Forward:
    """Raises InvalidArgument, FailedPrecondition (no tokenizer), Unimplemented."""
    with inside("run"):
        run = _run(request, "run", request.run, model)
    tokens = len(run.token_ids)
    with inside("positions"):
        positions = _positions(request.positions, tokens) if request.HasField("positions") else None
    positions = (tokens - 1,) if positions is None else tuple(sorted(positions))
    _write_positions(request.positions, positions)
    request.top_k = _count(request, DEFAULT_TOP_TOKENS)
    named = _token_ids(request.tokens, "tokens", model)
    wanted = len(positions) * (request.top_k + len(named))
    if wanted > MAX_ROWS:
        raise InvalidArgument(
            f"{wanted} predictions are asked for ({len(positions)} positions); at most {MAX_ROWS} "
            "are answered in one call",
            field="top_k",
        )
    return Forward(run, positions, request.top_k, named)


def read_attribution(request: attribute_pb2.AttributeRequest, model: Model) -> Attribution:
    """Raises InvalidArgument, FailedPrecondition (no tokenizer), Unimplemented."""
    _refuse_unbuilt(request)
    with inside("run"):
        run = _run(request, "run", request.run, model)
    if not request.HasField("objective"):
        raise InvalidArgument(
            "an objective is required, for example logit_diff with one target", field="objective"
        )
    given = objective_pb2.Objective()
    given.CopyFrom(request.objective)
    with inside("objective"):
        objective = _objective(request.objective, model, len(run.token_ids))
    runs = [ExplainedRun(run.token_ids, run.edits, objective)]
    if request.HasField("compare"):
        runs.append(_compared(request, given, model))
    elif request.HasField("compare_objective"):
        raise InvalidArgument(
            "compare_objective says what is explained about compare, which is not set",
            field="compare_objective",
        )
    request.norm_mode = request.norm_mode or attribute_pb2.NORM_MODE_FINAL_NORM_FROZEN
    request.rank_by = request.rank_by or attribute_pb2.COLUMN_TOTAL_EFFECT
    request.top_k = _count(request, DEFAULT_ROWS)
    ranking = tables.Ranking(_COLUMNS[request.rank_by], request.top_k, request.per_kind)
    return Attribution(tuple(runs), _NORM_MODES[request.norm_mode], ranking)


def prompt_ids(prompt: token_pb2.Prompt, model: Model) -> tuple[int, ...]:
    """The ids a prompt stands for, at least one and no more than the context holds."""
    source = prompt.WhichOneof("source")
    if prompt.HasField("prepend_bos") and source in ("token_ids", "chat"):
        raise InvalidArgument(
            f"prepend_bos is for text; with {source} every token is stated already",
            field="prepend_bos",
        )
    match source:
        case "text":
            bos = prompt.prepend_bos if prompt.HasField("prepend_bos") else None
            with inside("text"):
                ids = model.vocabulary.encode(prompt.text, bos)
        case "token_ids":
            ids = tuple(prompt.token_ids.ids)
            for number, each in enumerate(ids):
                with inside(f"token_ids.ids[{number}]"):
                    model.vocabulary.check_id(each)
        case "chat":
            ids = _chat_ids(prompt.chat, model)
        case _:
            raise InvalidArgument("one of text, token_ids or chat is required", field="source")
    if not ids:
        raise InvalidArgument("the prompt is empty; at least one token is required", field=source)
    if len(ids) > model.architecture.context:
        raise InvalidArgument(
            f"the prompt has {len(ids)} tokens; this model reads at most "
            f"{model.architecture.context}",
            field=source,
        )
    return ids


def _chat_ids(chat: token_pb2.Chat, model: Model) -> tuple[int, ...]:
    if not chat.messages:
        raise InvalidArgument("at least one message is required", field="chat.messages")
    for number, message in enumerate(chat.messages):
        if not message.role:
            raise InvalidArgument(
                "a role is required, for example user", field=f"chat.messages[{number}].role"
            )
    messages = [ChatMessage(message.role, message.content) for message in chat.messages]
    answer_follows = not chat.HasField("add_generation_prompt") or chat.add_generation_prompt
    with inside("chat"):
        return model.vocabulary.encode_chat(messages, answer_follows)


def _refuse_unbuilt(request: attribute_pb2.AttributeRequest) -> None:
    if request.dictionaries:
        raise features.not_built("attribute.dictionaries", "dictionaries")
    if request.HasField("read_outs"):
        raise features.not_built("attribute.read_outs", "read_outs")
    if request.verify:
        raise features.not_built("attribute.verify", "verify")
    if request.HasField("integrated_steps"):
        raise features.not_built("attribute.integrated_steps", "integrated_steps")


def _compared(
    request: attribute_pb2.AttributeRequest, given: objective_pb2.Objective, model: Model
) -> ExplainedRun:
    """The compared run. `given` is the first run's objective as it came."""
    with inside("compare"):
        run = _run(request, "compare", request.compare, model)
    name = "compare_objective"
    if not request.HasField("compare_objective"):
        name = "objective"
        request.compare_objective.CopyFrom(given)
    with inside(name):
        objective = _objective(request.compare_objective, model, len(run.token_ids))
    return ExplainedRun(run.token_ids, run.edits, objective)


def _run(
    request: run_pb2.RunRequest | attribute_pb2.AttributeRequest,
    name: str,
    run: intervention_pb2.Run,
    model: Model,
) -> ReadRun:
    present = request.HasField("run") if name == "run" else True
    if not present or not run.HasField("prompt"):
        raise InvalidArgument(
            "a prompt is required", field="prompt" if present else "", reason="REQUIRED"
        )
    with inside("prompt"):
        ids = prompt_ids(run.prompt, model)
    run.prompt.Clear()
    run.prompt.token_ids.ids.extend(ids)
    if len(run.interventions) > MAX_INTERVENTIONS:
        raise InvalidArgument(
            f"{len(run.interventions)} interventions are given; at most {MAX_INTERVENTIONS} are "
            "applied in one run",
            field="interventions",
        )
    read = []
    for number, message in enumerate(run.interventions):
        with inside(f"interventions[{number}]"):
            read.append(_intervention(message, len(ids)))
    with inside("interventions"):
        edits = interventions.resolve(read, model.architecture.shape, len(ids))
    return ReadRun(ids, edits)


def _intervention(message: intervention_pb2.Intervention, tokens: int) -> Intervention:
    with inside("target"):
        target = addresses.parse(message.target)
    message.target = str(target)
    positions = None
    if message.HasField("positions"):
        with inside("positions"):
            positions = _positions(message.positions, tokens)
    match message.WhichOneof("op"):
        case "zero":
            return Intervention(target, Zero(), positions)
        case "set":
            return Intervention(target, _set_value(message.set), positions)
        case None:
            raise InvalidArgument(
                "an operation is required, for example zero: {}", field="op", reason="REQUIRED"
            )
        case operation:
            raise features.not_built(f"intervention.{operation}", operation)


def _set_value(message: intervention_pb2.Intervention.Set) -> SetValue:
    match message.WhichOneof("to"):
        case "value":
            return SetValue(message.value)
        case "vector":
            raise features.not_built("intervention.set_vector", "set.vector")
        case _:
            raise InvalidArgument(
                "a value is required, for example set: {value: 0.5}", field="set.to"
            )


def _positions(message: intervention_pb2.Positions, tokens: int) -> tuple[int, ...]:
    """Positions in the order given; raises where one does not exist or stands twice."""
    match message.WhichOneof("which"):
        case "all":
            return tuple(range(tokens))
        case "start":
            if not 0 <= message.start < tokens:
                raise InvalidArgument(
                    f"position {message.start} does not exist; valid is 0..{tokens - 1}",
                    field="start",
                )
            return tuple(range(message.start, tokens))
        case "generated":
            raise features.not_built("positions.generated", "generated")
        case "list":
            return _listed_positions(message.list.positions, tokens)
        case _:
            raise InvalidArgument("one of all, list or start is required", field="which")


def _listed_positions(positions: Sequence[int], tokens: int) -> tuple[int, ...]:
    if not positions:
        raise InvalidArgument("at least one position is required", field="list.positions")
    for number, position in enumerate(positions):
        field = f"list.positions[{number}]"
        if not 0 <= position < tokens:
            raise InvalidArgument(
                f"position {position} does not exist; valid is 0..{tokens - 1}", field=field
            )
        if position in positions[:number]:
            raise InvalidArgument(f"position {position} is listed twice", field=field)
    return tuple(positions)


def _write_positions(message: intervention_pb2.Positions, positions: Sequence[int]) -> None:
    message.Clear()
    message.list.positions.extend(positions)


def _objective(message: objective_pb2.Objective, model: Model, tokens: int) -> LogitDiff:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidArgument(
            "the kind of objective is required, for example logit_diff", field="kind"
        )
    if kind != "logit_diff":
        raise features.not_built(f"objective.{kind}", kind)
    position = message.position if message.HasField("position") else tokens - 1
    if not 0 <= position < tokens:
        raise InvalidArgument(
            f"position {position} does not exist; valid is 0..{tokens - 1}", field="position"
        )
    message.position = position
    with inside("logit_diff"):
        targets = _token_ids(message.logit_diff.targets, "targets", model)
        distractors = _token_ids(message.logit_diff.distractors, "distractors", model)
        if not targets:
            raise InvalidArgument("at least one target token is required", field="targets")
        for number, token_id in enumerate(distractors):
            if token_id in targets:
                token = model.vocabulary.token(token_id).text
                raise InvalidArgument(
                    f"{token!r} is a target too, so its logit would cancel out",
                    field=f"distractors[{number}]",
                )
    return LogitDiff(targets, distractors, position)


def _token_ids(refs: Sequence[token_pb2.TokenRef], name: str, model: Model) -> tuple[int, ...]:
    """Ids of a list of tokens, each named once; the list is rewritten to ids in place."""
    if len(refs) > MAX_TOKEN_REFS:
        raise InvalidArgument(
            f"{len(refs)} tokens are given; at most {MAX_TOKEN_REFS} are read", field=name
        )
    ids: list[int] = []
    for number, ref in enumerate(refs):
        with inside(f"{name}[{number}]"):
            token_id = _token_id(ref, model)
            if token_id in ids:
                token = model.vocabulary.token(token_id).text
                raise InvalidArgument(f"{token!r} is listed twice; name it once")
        ids.append(token_id)
        ref.id = token_id
    return tuple(ids)


def _token_id(ref: token_pb2.TokenRef, model: Model) -> int:
    match ref.WhichOneof("ref"):
        case "text":
            with inside("text"):
                return model.vocabulary.single(ref.text)
        case "id":
            with inside("id"):
                return model.vocabulary.check_id(ref.id)
        case _:
            raise InvalidArgument("a token is named by text or by id; neither is set", field="ref")


def _count(request: run_pb2.RunRequest | attribute_pb2.AttributeRequest, default: int) -> int:
    if not request.HasField("top_k"):
        return default
    if not 1 <= request.top_k <= MAX_ROWS:
        raise InvalidArgument(f"top_k is {request.top_k}; valid is 1..{MAX_ROWS}", field="top_k")
    return request.top_k
