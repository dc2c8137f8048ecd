"""What a component promotes and suppresses, from the inference service.

Records say so themselves; it is asked for where an older or an imported one does not, and believed
only where it serves the very weights that the dataset is of. A head writes no direction of its own,
so nothing is known of it.
"""

import asyncio
import logging
from dataclasses import dataclass

from tdb.inference.v1 import component_pb2, manifest_pb2

from services.common.addresses import Kind, parse
from services.common.errors import (
    DeadlineExceeded,
    ResourceExhausted,
    TdbError,
    Unavailable,
)
from services.explainer.engine.components import TextScore
from services.explainer.stored import Dataset
from services.explainer.upstream import Upstream

TOKENS = 40
"""Tokens that are asked for, promoted and suppressed together."""
PATIENCE_S = 30.0
"""How long an explanation waits for them: a busy device must not keep it for ever."""
AGAIN_S = 30.0
"""When an inference service that did not answer is asked again."""

_log = logging.getLogger("tdb.explainer")


@dataclass(frozen=True)
class ReadOut:
    """What a component promotes most, descending, and suppresses most, ascending."""

    promoted: tuple[TextScore, ...]
    suppressed: tuple[TextScore, ...]


async def read_out(upstream: Upstream, dataset: Dataset, address: str) -> ReadOut | None:
    """Of a component of the model that the dataset is of; None where nobody can say.

    Raises Unavailable where the inference service is not there or too busy.
    """
    if parse(address).kind is Kind.HEAD:
        return None
    request = component_pb2.DescribeComponentRequest(
        model=dataset.model.id, component=address, tokens=TOKENS, similar=0
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            described = await upstream.inference.DescribeComponent(request)
    except (Unavailable, DeadlineExceeded, ResourceExhausted, TimeoutError) as error:
        raise Unavailable(
            str(error) or f"the inference service did not answer within {PATIENCE_S:g} s",
            reason="NO_READ_OUTS_NOW",
            retry_after_s=AGAIN_S,
        ) from None
    except TdbError as error:
        # Another model is served, or none: an explanation can do without.
        _log.info("no read-outs", extra={"fields": {"component": address, "why": str(error)}})
        return None
    if not is_of(dataset, address, described.manifest):
        return None
    scores = [
        TextScore(each.token.text, each.score)
        for direction in described.directions
        if direction.name == "write"
        for each in direction.output_tokens
    ]
    scores.sort(key=lambda each: -each.score)
    return ReadOut(
        tuple(each for each in scores if each.score > 0),
        tuple(each for each in reversed(scores) if each.score < 0),
    )


def is_of(dataset: Dataset, address: str, manifest: manifest_pb2.Manifest) -> bool:
    """Whether it is of the weights that the dataset was made with; where the dataset does not say
    which these were, of a model of this id."""
    if dataset.model.weights_hash not in ("", manifest.model.weights_hash):
        return False
    dictionary = parse(address).dictionary
    recorded = dataset.model.dictionary_hash(address)
    served = {each.id: each.weights_hash for each in manifest.dictionaries}.get(dictionary, "")
    return recorded in ("", served)
