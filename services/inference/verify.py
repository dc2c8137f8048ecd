"""`Verify`: from its request to ablations, and from what they measured to the stream's messages."""

from collections.abc import AsyncIterator, Callable, Generator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tdb.inference.v1 import attribute_pb2, manifest_pb2, verify_pb2

from services.common import addresses
from services.common.addresses import Address, Kind
from services.common.errors import InvalidArgument, inside
from services.inference import manifest, queue_messages, requests, responses, slices
from services.inference.engine import correlation
from services.inference.engine.baselines import Baseline
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.interventions import Intervention, Zero
from services.inference.engine.model import Model
from services.inference.engine.resolution import check_target, resolve_each
from services.inference.engine.verification import Ablation, Verification, Verified
from services.inference.engine.whole_verification import WholeVerification
from services.inference.requests import Attribution
from services.inference.scheduler import OnDevice
from services.inference.slices import Slice
from services.inference.task import Place, Priority, Task

MAX_NODES = 10_000


@dataclass(frozen=True)
class Wanted:
    """What a VerifyRequest asks for; without `named`, the rows of the table."""

    table: Attribution
    named: tuple[Ablation, ...] | None


def read(request: verify_pb2.VerifyRequest, model: Model) -> Wanted:
    """Raises InvalidArgument, FailedPrecondition (no tokenizer), Unimplemented."""
    named = bool(request.nodes) or request.all_heads
    if request.nodes and request.all_heads:
        raise InvalidArgument(
            "all_heads stands for the nodes; give one of nodes and all_heads", field="all_heads"
        )
    with inside("table"):
        if not request.HasField("table"):
            raise InvalidArgument(
                "a table is required: it says which run and objective are meant", reason="REQUIRED"
            )
        _refuse_meaningless(request.table, named)
        table = requests.read_attribution(request.table, model, whole_table=not named)
        if named:
            request.table.ClearField("top_k")
            request.table.ClearField("rank_by")
        elif table.ranking.top_k > MAX_NODES:
            raise InvalidArgument(
                f"top_k is {table.ranking.top_k}; at most {MAX_NODES} nodes are verified in a call",
                field="top_k",
            )
    if not named:
        return Wanted(table, None)
    if request.all_heads:
        shape = model.shape
        heads = (
            Address(Kind.HEAD, layer, head)
            for layer in range(shape.layers)
            for head in range(shape.heads)
        )
        return Wanted(table, _named(list(heads), model, table, "all_heads"))
    nodes = _nodes(request, model, len(table.runs[0].token_ids))
    return Wanted(table, _named(nodes, model, table, "nodes"))


def _refuse_meaningless(table: attribute_pb2.AttributeRequest, named: bool) -> None:
    one_run = "one run is verified at a time; call again for the other"
    integrated = "effects are measured here, not integrated; call Attribute for that"
    meaningless = {
        "compare": (table.HasField("compare"), one_run),
        "compare_objective": (table.HasField("compare_objective"), one_run),
        "read_outs": (table.HasField("read_outs"), "nodes are not read out here; call Attribute"),
        "integrated_steps": (table.HasField("integrated_steps"), integrated),
        "integrated_path": (bool(table.integrated_path), integrated),
        "verify": (table.verify, "every row is verified anyway; leave verify out"),
    }
    if named:
        ranked = "which nodes are verified is said by nodes or all_heads, so no rows are ranked"
        meaningless |= {
            "top_k": (table.HasField("top_k"), ranked),
            "rank_by": (bool(table.rank_by), ranked),
            "per_kind": (table.per_kind, ranked),
        }
    for field, (is_set, sentence) in meaningless.items():
        if is_set:
            raise InvalidArgument(sentence, field=field)


def _nodes(request: verify_pb2.VerifyRequest, model: Model, tokens: int) -> tuple[Address, ...]:
    if len(request.nodes) > MAX_NODES:
        raise InvalidArgument(
            f"{len(request.nodes)} nodes are given; at most {MAX_NODES} are verified in a call",
            field="nodes",
        )
    places: dict[Address, int] = {}
    for number, text in enumerate(request.nodes):
        with inside(f"nodes[{number}]"):
            node = addresses.parse(text)
            check_target(node, model.shape, tokens)
            if node in places:
                raise InvalidArgument(f"{node} is nodes[{places[node]}] already; name it once")
        places[node] = number
        request.nodes[number] = str(node)
    return tuple(places)


def ablations(
    nodes: Sequence[Address], model: Model, tokens: int, baseline: Baseline | None = None
) -> list[Ablation]:
    """The edit that puts each node at its baseline; None: at 0.

    Fields of refusals begin with the number of the node, such as `[3]`.
    """
    operation = baseline.operation if baseline else Zero()
    edits = resolve_each(
        [Intervention(node, operation) for node in nodes],
        model.shape,
        model.architecture.widths,
        tokens,
    )
    return [Ablation(node, edit) for node, edit in zip(nodes, edits, strict=True)]


def _named(
    nodes: Sequence[Address], model: Model, table: Attribution, name: str
) -> tuple[Ablation, ...]:
    """Ablations of nodes that the request names; what has no such baseline is refused."""
    tokens = len(table.runs[0].token_ids)
    try:
        return tuple(ablations(nodes, model, tokens, table.baseline))
    except InvalidArgument as refused:
        number = refused.field.partition("]")[0] + "]"
        field = name + number if name == "nodes" else name
        raise InvalidArgument(refused.message, field=field) from refused


async def stream(
    request: verify_pb2.VerifyRequest, wanted: Wanted, model: Model, on_device: OnDevice
) -> AsyncIterator[verify_pb2.VerifyResponse]:
    """Progress, every node as it is measured, and the summary. `request` is canonical."""
    timings = manifest_pb2.Timings()
    measured: list[Verified] = []
    total = None if wanted.named is None else len(wanted.named)
    steps = _steps(request, wanted, model, timings, measured)
    events = slices.run(
        steps, on_device, timings, lambda place: _progress(len(measured), total, place)
    )
    async with aclosing(events):
        async for event in events:
            yield event


def _steps(
    request: verify_pb2.VerifyRequest,
    wanted: Wanted,
    model: Model,
    timings: manifest_pb2.Timings,
    measured: list[Verified],
) -> Generator[Slice | verify_pb2.VerifyResponse, Any, None]:
    """The slices of a verification, and what it answers. Fills `measured`."""
    run, table = wanted.table.runs[0], wanted.table
    tokens = len(run.token_ids)

    def piece(work: Callable[[CancelToken], Any], kind: str, rows: int = 1) -> Slice:
        return Slice(work, Task(kind, rows * tokens, Priority.BULK))

    targets: Sequence[Ablation]
    if wanted.named is None:
        result = yield piece(
            partial(model.attribute, replace(table.asked, read_out_tokens=0)),
            "Attribute",
        )
        timings.forward_ms = result.times.forward
        timings.backward_ms = result.times.backward
        estimates = {row.node: row.values.total_effect for row in result.table.rows}
        targets = ablations(list(estimates), model, tokens, table.baseline)
        del result  # and with it the pass
    else:
        targets = wanted.named
        estimates = {}
        for part in model.estimated_at_once(run, targets):
            some = targets[part]
            found = yield piece(partial(model.estimate, run, some, table.norm_mode), "Estimate")
            estimates |= {each.node: value for each, value in zip(some, found, strict=True)}
    verification: Verification | WholeVerification = yield piece(
        lambda cancel: model.verify(run, targets, table.norm_mode, cancel), "Verify"
    )
    yield _progress(0, len(targets))
    for number in range(len(verification.chunks)):
        rows = verification.rows(number)
        for each in (yield piece(partial(verification.chunk, number), "Verify.chunk", rows)):
            measured.append(each)
            yield verify_pb2.VerifyResponse(
                node=verify_pb2.VerifiedNode(
                    node=str(each.node),
                    verified_effect=each.effect,
                    total_effect=estimates[each.node],
                    objective_value=each.value,
                )
            )
        yield _progress(len(measured), len(targets))
    estimated = [estimates[each.node] for each in measured]
    exact = [each.effect for each in measured]
    summary = verify_pb2.VerifySummary(
        manifest=manifest.build(
            "Verify", model, request, [run.token_ids], timings, manifest.precision_warnings(model)
        ),
        objective_value=verification.value,
        nodes=len(measured),
        rank_correlation=correlation.spearman(estimated, exact),
        correlation=correlation.pearson(estimated, exact),
        receipts=[responses.receipt(each) for each in verification.receipts],
    )
    yield verify_pb2.VerifyResponse(summary=summary)


def _progress(
    done: int, total: int | None, place: Place | None = None
) -> verify_pb2.VerifyResponse:
    return verify_pb2.VerifyResponse(progress=queue_messages.progress(done, total, "nodes", place))
