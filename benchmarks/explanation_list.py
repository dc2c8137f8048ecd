"""How long ListExplanations takes for a large table: `python -m benchmarks.explanation_list`.

100,000 explanations with six scores each are stored; one call asks for the best of 10,000
components, over real gRPC, where each has one explanation. An argument spreads them over so many
components instead: 10000 gives each ten.
"""

import asyncio
import sys
import tempfile
import time
from pathlib import Path

import grpc.aio
from tdb import channel
from tdb.explainer.v1 import explanation_pb2, service_pb2_grpc

from services.explainer.engine.explanations import Method
from services.explainer.engine.scores import Measure, Scorer
from services.explainer.stored import ExplainedModel, NewExplanation, NewScore
from tests.explainer import stack

STORED, ASKED, AT_ONCE, CALLS = 100_000, 10_000, 5_000, 5
MODEL = ExplainedModel("demo", stack.WEIGHTS)
SCORES = (
    (Scorer.DETECTION, Measure.AUC),
    (Scorer.DETECTION, Measure.BALANCED_ACCURACY),
    (Scorer.FUZZING, Measure.AUC),
    (Scorer.FUZZING, Measure.BALANCED_ACCURACY),
    (Scorer.SIMULATION, Measure.PEARSON),
    (Scorer.SIMULATION, Measure.EXPLAINED_VARIANCE),
)


def item(number: int, components: int) -> tuple[NewExplanation, list[NewScore]]:
    place = number % components
    new = NewExplanation(
        model=MODEL,
        component=f"neuron.{place // 3072}.{place % 3072}",
        text=f'Fires on the token " {number}" (9.5), any form of "a" after " the" (3).',
        method=Method.TOKEN_PATTERN,
        documents=frozenset(f"doc-{each}" for each in range(20)),
        code_version="1",
        author="ada",
    )
    value = number * 7919 % 1000 / 1000
    return new, [
        NewScore(scorer=scorer, measure=measure, value=value, n=40, seed=0, judge="offline")
        for scorer, measure in SCORES
    ]


async def measure(components: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with stack.serving(Path(folder)) as served:
            for start in range(0, STORED, AT_ONCE):
                numbers = range(start, start + AT_ONCE)
                await served.store.add_many([item(each, components) for each in numbers])
            request = explanation_pb2.ListExplanationsRequest(
                model=explanation_pb2.ExplainedModel(id=MODEL.id, weights_hash=MODEL.weights_hash),
                components=[f"neuron.{each // 3072}.{each % 3072}" for each in range(ASKED)],
                best_only=True,
            )
            target = f"127.0.0.1:{served.port}"
            async with grpc.aio.insecure_channel(target, channel.options(channel.GONE)) as opened:
                stub = service_pb2_grpc.ExplainerServiceStub(opened)
                seconds = []
                for _ in range(CALLS):
                    started, used = time.perf_counter(), time.process_time()
                    response = await stub.ListExplanations(request)
                    seconds.append((time.perf_counter() - started, time.process_time() - used))
            assert len(response.explanations) == ASKED
            best, cpu = min(seconds)
            print(
                f"{STORED // components} per component: {best * 1e3:.0f} ms ({cpu * 1e3:.0f} ms of "
                f"processor, client included), {response.ByteSize() / 2**20:.1f} MiB"
            )


if __name__ == "__main__":
    for each in map(int, sys.argv[1:] or ("100000",)):
        asyncio.run(measure(each))
