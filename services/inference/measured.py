"""The columns of `Attribute` that take passes of their own: verified and integrated effects.

Every batch of passes is work of its own for the device, so that other calls get in between.
"""

from dataclasses import dataclass, field
from functools import partial

from tdb.inference.v1 import attribute_pb2

from services.common.addresses import Address
from services.inference.engine import correlation
from services.inference.engine.asked import AttributeResult
from services.inference.engine.integrated import Integration
from services.inference.engine.model import Model
from services.inference.engine.verification import Verification
from services.inference.engine.whole_verification import WholeVerification
from services.inference.requests import Attribution
from services.inference.scheduler import OnDevice
from services.inference.task import Priority, Task
from services.inference.verify import ablations


@dataclass
class Measured:
    """Effects of listed nodes of the first run."""

    verified: dict[Address, float] = field(default_factory=dict)
    rank_correlation: float | None = None
    """Of the estimated and the verified column."""
    integrated: dict[Address, float] = field(default_factory=dict)


async def measure(
    wanted: Attribution, result: AttributeResult, model: Model, on_device: OnDevice
) -> Measured:
    """Measures what the request asks for."""
    run = wanted.runs[0]
    estimates = {
        row.node: row.values.total_effect for row in result.table.rows if row.values is not None
    }
    nodes = list(estimates)
    measured = Measured()
    if wanted.verify:
        targets = ablations(nodes, model, len(run.token_ids), wanted.baseline)
        begun = partial(model.verify, run, targets, wanted.norm_mode)
        tokens = len(run.token_ids)
        begin_verify = Task("Verify", tokens, Priority.BULK)
        verification: Verification | WholeVerification = (
            await on_device(begun, begin_verify)
        ).result
        for number in range(len(verification.chunks)):
            task = Task("Verify.chunk", verification.rows(number) * tokens, Priority.BULK)
            chunk = await on_device(partial(verification.chunk, number), task)
            measured.verified |= {each.node: each.effect for each in chunk.result}
        measured.rank_correlation = correlation.spearman(
            [estimates[node] for node in nodes], [measured.verified[node] for node in nodes]
        )
    if wanted.integrated_steps:
        begin = partial(
            model.integrate,
            run,
            nodes,
            wanted.integrated_steps,
            result.starts,
            wanted.along_input,
            wanted.norm_mode,
        )
        task = Task("Integrate", len(run.token_ids), Priority.BULK)
        integration: Integration = (await on_device(begin, task)).result
        for number in range(len(integration.chunks)):
            rows = integration.rows(number)
            task = Task("Integrate.chunk", rows * len(run.token_ids), Priority.BULK)
            await on_device(partial(integration.chunk, number), task)
        measured.integrated = dict(zip(nodes, integration.effects(nodes), strict=True))
    return measured


def fill(
    response: attribute_pb2.AttributeResponse, result: AttributeResult, measured: Measured
) -> None:
    """Enters the two columns in the response's rows, which are those of the result."""
    for row, message in zip(result.table.rows, response.rows, strict=True):
        if row.node in measured.verified:
            message.verified_effect = measured.verified[row.node]
        if row.node in measured.integrated:
            message.integrated_effect = measured.integrated[row.node]
    if measured.rank_correlation is not None:
        response.rank_correlation = measured.rank_correlation
