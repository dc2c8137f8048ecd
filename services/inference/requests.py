"""From request messages to what the engine understands, with every refusal a request can earn.

Reading a message also makes it canonical in place: text becomes token ids, addresses their one
spelling, defaults are filled in. What is left in the message is the manifest's canonical request,
so servicers hand in a copy. Field paths of refusals are relative; callers put theirs in front.
"""

from dataclasses import dataclass

from tdb.inference.v1 import attribute_pb2, intervention_pb2, objective_pb2, run_pb2

from services.common.errors import InvalidArgument, inside
from services.inference import (
    request_baselines,
    request_interventions,
    request_objectives,
    request_points,
    request_tokens,
)
from services.inference.engine import resolution, tables
from services.inference.engine.asked import AskedAttribution, AskedRun, ReadPoints
from services.inference.engine.attribution import ExplainedRun, NormMode
from services.inference.engine.baselines import Baseline, Reference
from services.inference.engine.columns import Column
from services.inference.engine.interventions import Edit
from services.inference.engine.model import Model

MAX_ROWS = 100_000
MAX_READ_OUT_TOKENS = 100
MAX_READ_OUT_ROWS = 1_000
MAX_SOURCES = 100
MAX_VERIFIED_ROWS = 1_000
MAX_INTEGRATED_STEPS = 256
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


HasRun = run_pb2.RunRequest | run_pb2.StreamActivationsRequest | attribute_pb2.AttributeRequest


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
    read: ReadPoints

    @property
    def asked(self) -> AskedRun:
        """What is asked of the model."""
        return AskedRun(
            self.run.token_ids,
            self.run.edits,
            self.positions,
            self.top_k,
            self.named,
            self.read,
        )


@dataclass(frozen=True)
class Attribution:
    """What an AttributeRequest asks for: one run, or a run and the one it is compared with."""

    runs: tuple[ExplainedRun, ...]
    norm_mode: NormMode
    ranking: tables.Ranking
    read_out_tokens: int
    """Tokens read out of each listed node; 0: none."""
    verify: bool = False
    """Whether listed nodes are ablated for the verified column."""
    integrated_steps: int = 0
    """Midpoints of the integrated column; 0: no such column."""
    along_input: bool = False
    """Whether it is integrated along the input path."""
    baseline: Baseline | None = None
    """What effects are measured from; None: 0."""
    dictionaries: tuple[str, ...] = ()
    """Ids of those whose latents stand in the table."""
    sources: int = 0
    """Source tokens listed per latent of an attention dictionary."""
    deterministic: bool = False
    """Whether it shares no pass with other requests."""

    @property
    def asked(self) -> AskedAttribution:
        """What is asked of the model first; measured columns take passes of their own."""
        return AskedAttribution(
            self.runs,
            self.norm_mode,
            self.ranking,
            self.read_out_tokens,
            self.reference,
            self.dictionaries,
            self.sources,
        )

    @property
    def padded_tokens(self) -> int:
        """Rows times the longest."""
        return len(self.runs) * max(len(run.token_ids) for run in self.runs)

    @property
    def reference(self) -> Reference | None:
        """The baseline of all nodes at once, where there is one and they are wanted."""
        return self.baseline.reference if self.baseline else None


def read_forward(request: run_pb2.RunRequest, model: Model) -> Forward:
    """Raises InvalidArgument, FailedPrecondition (no tokenizer), Unimplemented."""
    run = required_run(request, model)
    tokens = len(run.token_ids)
    with inside("positions"):
        positions = (
            request_tokens.positions(request.positions, tokens)
            if request.HasField("positions")
            else None
        )
    positions = (tokens - 1,) if positions is None else tuple(sorted(positions))
    request_tokens.write_positions(request.positions, positions)
    request.top_k = _count(request, DEFAULT_TOP_TOKENS)
    named = request_tokens.token_ids(request.tokens, "tokens", model)
    read = request_points.of_run(request, model, tokens)
    wanted = len(positions) * (request.top_k + len(named)) * (1 + len(read.lens))
    if wanted > MAX_ROWS:
        raise InvalidArgument(
            f"{wanted} predictions are asked for ({len(positions)} positions"
            + (f", {len(read.lens)} points of the logit lens" if read.lens else "")
            + f"); at most {MAX_ROWS} are answered in one call",
            field="top_k",
        )
    return Forward(run, positions, request.top_k, named, read)


def read_attribution(
    request: attribute_pb2.AttributeRequest, model: Model, whole_table: bool = True
) -> Attribution:
    """`whole_table`: all nodes of the run are estimated, not only some that are named.

    Raises InvalidArgument, FailedPrecondition (no tokenizer), Unimplemented.
    """
    run = required_run(request, model)
    with inside("dictionaries"):
        dictionaries = model.shelf.named(request.dictionaries)
    del request.dictionaries[:]
    request.dictionaries.extend(dictionaries)
    if not request.HasField("objective"):
        raise InvalidArgument(
            "an objective is required, for example logit_diff with one target", field="objective"
        )
    given = objective_pb2.Objective()
    given.CopyFrom(request.objective)
    with inside("objective"):
        objective = request_objectives.objective(request.objective, model, len(run.token_ids))
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
    tokens = _read_out_tokens(request) if request.HasField("read_outs") else 0
    if request.verify and request.top_k > MAX_VERIFIED_ROWS:
        raise InvalidArgument(
            f"at most {MAX_VERIFIED_ROWS} rows are verified; top_k is {request.top_k}",
            field="verify",
        )
    return Attribution(
        tuple(runs),
        _NORM_MODES[request.norm_mode],
        ranking,
        tokens,
        request.verify,
        _integrated_steps(request),
        _along_input(request),
        _baseline(request, model, len(run.token_ids), whole_table),
        dictionaries,
        request.read_outs.sources,
        request.deterministic,
    )


def _baseline(
    request: attribute_pb2.AttributeRequest, model: Model, tokens: int, whole_table: bool
) -> Baseline | None:
    if not request.HasField("baseline"):
        return None
    with inside("baseline"):
        found = request_baselines.baseline(request.baseline, model, tokens, whole_table)
        if found and request.HasField("compare"):
            raise InvalidArgument(
                "two compared runs have no baseline but 0 in common; leave out compare or baseline"
            )
    return found


def _along_input(request: attribute_pb2.AttributeRequest) -> bool:
    if not request.integrated_path:
        return False
    with inside("integrated_path"):
        if not request.HasField("integrated_steps"):
            raise InvalidArgument(
                "integrated_path says how the integrated column is made; set integrated_steps too"
            )
        along_input = request.integrated_path == attribute_pb2.INTEGRATED_PATH_INPUT
        if along_input and request.baseline.WhichOneof("kind") != "run":
            raise InvalidArgument(
                "along the input path the embedding moves from another run's; name it as "
                "baseline.run"
            )
    return along_input


def _integrated_steps(request: attribute_pb2.AttributeRequest) -> int:
    if not request.HasField("integrated_steps"):
        return 0
    steps = request.integrated_steps
    if not 1 <= steps <= MAX_INTEGRATED_STEPS:
        raise InvalidArgument(
            f"integrated_steps is {steps}; valid is 1..{MAX_INTEGRATED_STEPS}",
            field="integrated_steps",
        )
    return steps


def _read_out_tokens(request: attribute_pb2.AttributeRequest) -> int:
    tokens = request.read_outs.tokens
    if not 1 <= tokens <= MAX_READ_OUT_TOKENS:
        raise InvalidArgument(
            f"{tokens} tokens are asked for; valid is 1..{MAX_READ_OUT_TOKENS}",
            field="read_outs.tokens",
        )
    if request.top_k > MAX_READ_OUT_ROWS:
        raise InvalidArgument(
            f"read-outs are made for at most {MAX_READ_OUT_ROWS} rows; top_k is {request.top_k}",
            field="read_outs",
        )
    if not 0 <= request.read_outs.sources <= MAX_SOURCES:
        raise InvalidArgument(
            f"{request.read_outs.sources} sources are asked for; valid is 0..{MAX_SOURCES}",
            field="read_outs.sources",
        )
    request.read_outs.sources = request.read_outs.sources  # its default, where it was absent
    return tokens


def _compared(
    request: attribute_pb2.AttributeRequest, given: objective_pb2.Objective, model: Model
) -> ExplainedRun:
    """The compared run. `given` is the first run's objective as it came."""
    with inside("compare"):
        run = _run(request.compare, model)
    name = "compare_objective"
    if not request.HasField("compare_objective"):
        name = "objective"
        request.compare_objective.CopyFrom(given)
    with inside(name):
        objective = request_objectives.objective(
            request.compare_objective, model, len(run.token_ids)
        )
    return ExplainedRun(run.token_ids, run.edits, objective)


def required_run(request: HasRun, model: Model) -> ReadRun:
    """The run of a request, made canonical in place."""
    with inside("run"):
        if not request.HasField("run"):
            raise InvalidArgument("a prompt is required", reason="REQUIRED")
        return _run(request.run, model)


def _run(run: intervention_pb2.Run, model: Model) -> ReadRun:
    ids = read_prompt(run, model)
    return ReadRun(ids, read_edits(run, model, len(ids)))


def read_prompt(run: intervention_pb2.Run, model: Model) -> tuple[int, ...]:
    """Ids of a run's prompt, made canonical in place."""
    if not run.HasField("prompt"):
        raise InvalidArgument("a prompt is required", field="prompt", reason="REQUIRED")
    with inside("prompt"):
        return request_tokens.canonical_ids(run.prompt, model)


def read_edits(
    run: intervention_pb2.Run, model: Model, tokens: int, prompt: int | None = None
) -> tuple[Edit, ...]:
    """Edits of a run over `tokens` tokens, made canonical in place.

    During generation `prompt` says how many of them are the prompt's, else None.
    """
    read = request_interventions.interventions(run.interventions, model, tokens, prompt)
    shape, widths = model.shape, model.architecture.widths
    with inside("interventions"):
        return resolution.resolve(read, shape, widths, tokens, prompt)


def _count(request: run_pb2.RunRequest | attribute_pb2.AttributeRequest, default: int) -> int:
    if not request.HasField("top_k"):
        return default
    if not 1 <= request.top_k <= MAX_ROWS:
        raise InvalidArgument(f"top_k is {request.top_k}; valid is 1..{MAX_ROWS}", field="top_k")
    return request.top_k
