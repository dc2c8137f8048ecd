"""Batches: calls of several users as rows of one padded pass, each answered as if it were alone.

    one forward, one backward     all rows at once
    tables, predictions           member by member, of its own rows without their padding
    read-outs                     scored together

A refusal of one member leaves the others as they are: what goes wrong in its own part is its own
answer, and where the shared pass itself fails, the members are run one by one.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TypeVar

import torch
from torch import Tensor

from services.common.addresses import Address
from services.common.errors import TdbError
from services.inference.engine import activations, attribution, baselines, needs, tables
from services.inference.engine.architecture import Architecture
from services.inference.engine.asked import (
    AskedAttribution,
    AskedRun,
    AttributeResult,
    RunResult,
)
from services.inference.engine.attribution import Explanation, StageTimes
from services.inference.engine.baselines import Reference
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import Pass, Row
from services.inference.engine.forward import Hooks
from services.inference.engine.lens import lens_logits
from services.inference.engine.points import Point
from services.inference.engine.predictions import AT_ONCE, NextTokens, Predicting
from services.inference.engine.readouts import (
    Directions,
    ReadOut,
    directions_of,
    read_out,
    read_outs,
)
from services.inference.engine.sublayers import Sublayer
from services.inference.engine.tables import NodeRow

TOP_TOKENS = 10

Asked = TypeVar("Asked", AskedAttribution, AskedRun)
Answer = TypeVar("Answer", AttributeResult, RunResult)
Part = TypeVar("Part")


@dataclass(frozen=True)
class Unread:
    """An answer whose nodes are still to be read out."""

    result: AttributeResult
    directions: list[Directions]
    """Per run."""
    tokens: int


class Batches:
    """Runs batches of one model; ids from `listed` on are never among the tokens of an answer."""

    def __init__(self, hooks: Hooks, listed: int) -> None:
        self._hooks = hooks
        self._listed = listed

    @property
    def _architecture(self) -> Architecture:
        return self._hooks.architecture

    def attribute(
        self, asked: Sequence[AskedAttribution], cancel: CancelToken
    ) -> list[AttributeResult | TdbError]:
        """An answer or a refusal of each, in their order; their `batch_key`s are equal."""
        if len({frozenset(each.dictionaries) for each in asked}) > 1:
            raise ValueError("members of a batch have the dictionaries of their tables in common")
        return _isolated(self._attribute, asked, cancel)

    def run(self, asked: Sequence[AskedRun], cancel: CancelToken) -> list[RunResult | TdbError]:
        """An answer or a refusal of each, in their order; their `batch_key`s are equal."""
        return _isolated(self._run, asked, cancel)

    def _attribute(
        self, asked: Sequence[AskedAttribution], cancel: CancelToken
    ) -> list[AttributeResult | TdbError]:
        if len(asked) == 1 and len(asked[0].runs) > 1 and not self._fit(asked):
            return [self._one_after_the_other(asked[0], cancel.of_member(0))]
        self._hooks.room.check(needs.of_attributions(self._hooks, asked))
        explanations, times = attribution.explain(
            self._hooks,
            self._architecture,
            [run for each in asked for run in each.runs],
            [each.norm_mode for each in asked for _ in each.runs],
            cancel,
            asked[0].dictionaries,
        )
        rows = iter(explanations)
        own = [tuple(islice(rows, len(each.runs))) for each in asked]

        def answer(member: int) -> Unread:
            return self._attributed(asked[member], own[member], times, cancel.of_member(member))

        return self._read_out([_refusable(answer, member) for member in range(len(asked))])

    def _read_out(self, unread: Sequence[Unread | TdbError]) -> list[AttributeResult | TdbError]:
        """The answers with their read-outs, which all are scored together."""
        started = time.perf_counter()
        wanted = [
            (each, one.tokens)
            for one in unread
            if not isinstance(one, TdbError)
            for each in one.directions
        ]
        found = iter(read_outs(self._architecture, wanted, self._listed))
        took_ms = (time.perf_counter() - started) * 1e3
        return [
            one
            if isinstance(one, TdbError)
            else replace(
                one.result,
                read_outs=dict(
                    chain.from_iterable(each.items() for each in islice(found, len(one.directions)))
                ),
                own_ms=one.result.own_ms + took_ms,
            )
            for one in unread
        ]

    def _attributed(
        self,
        asked: AskedAttribution,
        explanations: tuple[Explanation, ...],
        times: StageTimes,
        cancel: CancelToken,
    ) -> Unread:
        cancel.check()
        started = time.perf_counter()
        starts = self._starts(explanations[0], asked.reference, cancel) if asked.reference else {}
        table = tables.build(explanations, asked.ranking)
        cancel.check()
        directions = [
            directions_of(self._architecture, explanation, nodes, asked.sources)
            for explanation, nodes in zip(explanations, _read_in(table.rows), strict=False)
            if asked.read_out_tokens and nodes
        ]
        result = AttributeResult(
            tuple(explanation.outcome for explanation in explanations),
            table,
            tuple(self._top(explanation.logits) for explanation in explanations),
            {},
            times,
            starts,
            (time.perf_counter() - started) * 1e3,
        )
        return Unread(result, directions, asked.read_out_tokens)

    def _fit(self, asked: Sequence[AskedAttribution]) -> bool:
        return needs.of_attributions(self._hooks, asked) <= self._hooks.room.free

    def _one_after_the_other(self, asked: AskedAttribution, cancel: CancelToken) -> AttributeResult:
        """The table of two runs whose passes do not fit into memory together.

        The compared run goes first, for the nodes that it selects; the other takes the values of
        all nodes that either has; then the compared run goes once more, to give its own of them.
        """
        ranking, started = asked.ranking, time.perf_counter()

        def explain(number: int) -> tuple[Explanation, StageTimes]:
            alone = replace(asked, runs=asked.runs[number : number + 1])
            self._hooks.room.check(needs.of_attributions(self._hooks, [alone]))
            (explanation,), times = attribution.explain(
                self._hooks,
                self._architecture,
                [asked.runs[number]],
                [asked.norm_mode],
                cancel,
                asked.dictionaries,
            )
            return explanation, times

        explanation, times = explain(1)
        compared, compared_outcome = tables.Part(explanation, ranking), explanation.outcome
        compared_top = self._top(explanation.logits)
        del explanation  # and its pass, before the next
        explanation, more = explain(0)
        first, outcome = tables.Part(explanation, ranking), explanation.outcome
        top = self._top(explanation.logits)
        nodes = tables.union([first, compared])
        first.gather(explanation, nodes)
        here = [node for node in nodes if first.values[node]]
        read_outs = self._read_outs(asked, explanation, here)
        del explanation
        explanation, again = explain(1)
        compared.gather(explanation, nodes)
        others = [node for node in nodes if not first.values[node]]
        read_outs |= self._read_outs(asked, explanation, others)
        times += more + again
        whole_ms = (time.perf_counter() - started) * 1e3
        return AttributeResult(
            (outcome, compared_outcome),
            tables.joined([first, compared], ranking),
            (top, compared_top),
            read_outs,
            times,
            {},
            whole_ms - times.forward - times.backward,
        )

    def _starts(
        self, explanation: Explanation, reference: Reference, cancel: CancelToken
    ) -> Mapping[Sublayer, Tensor]:
        """x0 of all nodes, from which their estimates are measured then."""
        groups = {group.sublayer: group for group in explanation.groups}
        dictionaries = [each.dictionary for each in groups if each.dictionary]
        starts = baselines.starts(self._hooks, reference, cancel, dictionaries)
        for sublayer, group in groups.items():
            group.measure_from(starts[sublayer])
        return starts

    def _read_outs(
        self, asked: AskedAttribution, explanation: Explanation, nodes: Sequence[Address]
    ) -> dict[Address, ReadOut]:
        """Of nodes that exist in the run."""
        if not asked.read_out_tokens or not nodes:
            return {}
        tokens, sources = asked.read_out_tokens, asked.sources
        return read_out(self._architecture, explanation, nodes, tokens, self._listed, sources)

    def _top(self, logits: Tensor) -> tuple[tuple[int, float], ...]:
        """(id, logit) of the largest; ids the tokenizer cannot decode are never listed."""
        listed = logits[: self._listed]
        top = torch.topk(listed, min(TOP_TOKENS, listed.numel()))
        return tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))

    def _run(self, asked: Sequence[AskedRun], cancel: CancelToken) -> list[RunResult | TdbError]:
        self._hooks.room.check(needs.of_runs(self._hooks, asked))
        current = self._hooks.run(
            [Row(each.token_ids, each.edits, logits_at=each.logits_at) for each in asked],
            (),
            gradients=False,
            cancel=cancel,
            keep=frozenset().union(*(each.read.all for each in asked)),
            dictionaries=[name for each in asked for name in each.read.dictionaries],
        )

        def answer(member: int) -> RunResult:
            return self._read(asked[member], current, member, cancel.of_member(member))

        return [_refusable(answer, member) for member in range(len(asked))]

    def _read(self, asked: AskedRun, current: Pass, row: int, cancel: CancelToken) -> RunResult:
        logits = current.logits[row, : len(asked.logits_at)]
        if asked.logits_at != asked.positions:
            logits = logits[list(asked.positions)]
        predicting = Predicting(asked.top_k, asked.named, self._listed)

        def predicted(logits_of: Callable[[slice], Tensor]) -> tuple[NextTokens, ...]:
            found: list[NextTokens] = []
            size = needs.positions_at_once(self._hooks, AT_ONCE)
            for start in range(0, len(asked.positions), size):
                cancel.check()
                part = slice(start, start + size)
                found += predicting.read(asked.positions[part], logits_of(part))
            return tuple(found)

        def whole(point: Point) -> Tensor:
            return activations.read(point, self._architecture, current, row)

        def through_lens(point: Point) -> tuple[NextTokens, ...]:
            residual = whole(point)[list(asked.positions)].to(logits.device)
            return predicted(lambda part: lens_logits(self._architecture, residual[None, part])[0])

        return RunResult(
            predicted(lambda part: logits[part]),
            current.receipts(row),
            tuple(map(through_lens, asked.read.lens)),
            tuple(map(whole, asked.read.activations)),
            current.forward_ms,
        )


def _read_in(rows: Sequence[NodeRow]) -> tuple[list[Address], list[Address]]:
    """The nodes that are read out in the first run, and those that exist in the other only."""
    return (
        [row.node for row in rows if row.values],
        [row.node for row in rows if not row.values],
    )


def _isolated(
    together: Callable[[Sequence[Asked], CancelToken], list[Answer | TdbError]],
    asked: Sequence[Asked],
    cancel: CancelToken,
) -> list[Answer | TdbError]:
    """Runs a batch; one that fails as a whole member by member."""
    try:
        return together(asked, cancel)
    except TdbError as error:
        if len(asked) == 1:
            return [error]
    return [
        answer
        for member, each in enumerate(asked)
        for answer in _isolated(together, [each], cancel.of_member(member))
    ]


def _refusable(answer: Callable[[int], Part], member: int) -> Part | TdbError:
    try:
        return answer(member)
    except TdbError as error:
        return error
