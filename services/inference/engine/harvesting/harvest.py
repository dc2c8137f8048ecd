"""A whole harvest: sequences in batches of equal length, their activations into running states.

Batches do not depend on the order in which sequences come: these are sorted by length, then by
index, so the same sequences give the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from services.common.addresses import Kind
from services.common.harvest.state import Keep, State
from services.inference.engine import memory, out_of_memory
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.forward import Hooks
from services.inference.engine.harvesting.gathering import Gathering
from services.inference.engine.harvesting.groups import Group
from services.inference.engine.harvesting.scratch import Scratch
from services.inference.engine.harvesting.token_sums import Located
from services.inference.engine.harvesting.watching import pairs

TOKENS_PER_BATCH = 512
TOKENS_PER_BATCH_GPU = 8192
WORKING_BYTES = 64 * 2**20
"""Bytes that adding a batch's activations to the states takes, on a CPU."""


@dataclass(frozen=True)
class CorpusSequence:
    """A sequence of tokens and its number in the corpus, in 0..2^31 - 1."""

    index: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class AskedHarvest:
    """What is gathered, of which components, over which sequences; at least one of each.

    `tokens` are those whose activations are summed.
    """

    groups: tuple[Group, ...]
    keep: Keep
    sequences: tuple[CorpusSequence, ...]
    tokens: tuple[int, ...] = ()

    @property
    def dictionaries(self) -> tuple[str, ...]:
        return tuple(group.dictionary for group in self.groups if group.dictionary)

    @cached_property
    def longest(self) -> int:
        return max(len(each.ids) for each in self.sequences)

    @property
    def state_bytes(self) -> int:
        """Of the running states on the device."""
        return sum(map(self.group_bytes, self.groups))

    def group_bytes(self, group: Group) -> int:
        """Of the running state of one group."""
        return group.bytes(self.keep, len(self.sequences), self.longest, len(self.tokens))

    def row_bytes(self, hooks: Hooks, tokens: int) -> int:
        """Of the pass of one sequence, and of what is made of it."""
        batch = hooks.batch(1, tokens, dictionaries=self.dictionaries)
        widest = max(group.components * group.places(tokens) for group in self.groups)
        return memory.passed(hooks.room.sizes, batch) + 32 * widest


class Harvest:
    """A harvest, batch by batch: `batch` of every number below `len(batches)`, then `finish`."""

    def __init__(self, hooks: Hooks, asked: AskedHarvest) -> None:
        self._hooks = hooks
        self._asked = asked
        self._device = hooks.architecture.final_norm.gain.device
        self._tokens = torch.tensor(sorted(asked.tokens), dtype=torch.long, device=self._device)
        self.batches = self._batches()
        self._gatherings: dict[Group, Gathering] = {}
        self._changing = False

    def tokens(self, number: int) -> int:
        """Tokens of a batch."""
        return sum(len(each.ids) for each in self.batches[number])

    def batch(self, number: int, cancel: CancelToken) -> None:
        """Adds one batch. Raises FailedPrecondition (NON_FINITE), ResourceExhausted (out of memory,
        and for every batch after that), Cancelled, DeadlineExceeded."""
        if self._changing:  # tried again: some of the batch was counted already
            raise out_of_memory.refusal()
        if not self._gatherings:
            self._gatherings = self._begin()
        sequences = self.batches[number]
        ids = torch.tensor([each.ids for each in sequences], device=self._device)
        indices = torch.tensor([each.index for each in sequences], device=self._device)

        located: dict[tuple[Kind, int | None], dict[str, Located]] = {}

        def take(group: Group, values: Tensor) -> None:
            cancel.check()
            self._changing = True
            alike = group.kind, group.window
            if alike not in located:
                located[alike] = self._located(group, ids)
            self._gatherings[group].add(values, indices, located[alike])

        self._hooks.watch(ids, self._asked.groups, take, cancel)
        self._changing = False

    def finish(self, group: Group, cancel: CancelToken) -> State:
        """The state of a group, whose memory is given back."""
        cancel.check()
        sequences = sorted(self._asked.sequences, key=lambda each: each.index)
        return self._gatherings.pop(group).finish(
            torch.tensor([each.index for each in sequences]),
            torch.tensor([len(each.ids) for each in sequences]),
        )

    def _begin(self) -> dict[Group, Gathering]:
        asked, tokens = self._asked, self._tokens
        sequences = torch.tensor([each.index for each in asked.sequences], device=self._device)
        scratch = Scratch(self._device)
        return {
            group: Gathering(group, asked.keep, sequences, asked.longest, tokens, scratch)
            for group in asked.groups
        }

    def _located(self, group: Group, ids: Tensor) -> dict[str, Located]:
        """Where tokens are among the places of a group, of heads as the query and as the key."""
        if group.kind is not Kind.HEAD:
            return {"token": Located(self._tokens, ids)}
        queries, keys = pairs(ids.shape[1], group.window, ids.device)
        return {
            "token": Located(self._tokens, ids[:, queries]),
            "key_token": Located(self._tokens, ids[:, keys]),
        }

    def _batches(self) -> list[Sequence[CorpusSequence]]:
        ordered = sorted(self._asked.sequences, key=lambda each: (len(each.ids), each.index))
        found: list[Sequence[CorpusSequence]] = []
        for length, same in groupby(ordered, key=lambda each: len(each.ids)):
            members, rows = list(same), self._rows(length)
            found += [members[first : first + rows] for first in range(0, len(members), rows)]
        return found

    def _rows(self, length: int) -> int:
        """How many sequences of a length share a batch."""
        on_cpu = self._device.type == "cpu"
        most = max(1, (TOKENS_PER_BATCH if on_cpu else TOKENS_PER_BATCH_GPU) // length)
        room = self._hooks.room
        row = self._asked.row_bytes(self._hooks, length)
        return room.rows(most, row, self._asked.state_bytes + WORKING_BYTES)
