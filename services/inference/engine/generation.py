"""Generation: a prompt continued token by token, under edits, over a key/value cache.

The first step runs the prompt, every later one the token chosen last; the token chosen at the very
end is never run. Every step gives what a run of the whole sequence without a cache would give. The
cache keeps all keys: a sliding-window model's own would drop old ones, and pairs would shift.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor
from transformers import DynamicCache

from services.inference.engine import memory
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import Row
from services.inference.engine.forward import Hooks
from services.inference.engine.growing import GrowingEdits
from services.inference.engine.interventions import Edit, Receipt
from services.inference.engine.sampling import Sampler, Sampling
from services.inference.engine.text import Vocabulary
from services.inference.engine.transcript import Transcript


class Finish(Enum):
    """Why a continuation ended."""

    LENGTH = auto()
    STOP_TOKEN = auto()
    STOP_TEXT = auto()


@dataclass(frozen=True)
class Ending:
    """What ends a continuation: its length, or one of these."""

    max_new_tokens: int
    stop_tokens: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generated:
    """One generated token. Log probabilities are at temperature 1, in nats."""

    position: int
    token_id: int
    text: str
    log_prob: float
    top: tuple[tuple[int, float], ...]
    """(id, log probability) of the likeliest tokens."""


class Continuation:
    """One continuation while it grows. All but the facts runs on the torch thread."""

    def __init__(
        self,
        hooks: Hooks,
        vocabulary: Vocabulary,
        prompt: Sequence[int],
        edits: Sequence[Edit],
        sampling: Sampling,
        ending: Ending,
        top: int = 0,
    ) -> None:
        """`edits` may reach beyond the prompt; `top` alternatives are listed of every token."""
        self._hooks = hooks
        self._vocabulary = vocabulary
        self._ids = list(prompt)
        self._prompt_tokens = len(prompt)
        self._edits = GrowingEdits(edits)
        self._sampler = Sampler(sampling)
        self._ending = ending
        self._top = top
        self._cache = DynamicCache()
        self._transcript = Transcript(vocabulary, ending.stop_texts)
        self.finish: Finish | None = None
        """None while it goes on."""
        self.text = ""
        self.forward_ms = 0.0
        self._begun = False

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The continuation without the prompt."""
        return tuple(self._ids[self._prompt_tokens :])

    @property
    def ids_read(self) -> tuple[int, ...]:
        """What the model has read so far: prompt and continuation but for its last token."""
        return tuple(self._ids[: self._cache.get_seq_length()])

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        """What each edit did over the prompt and all steps."""
        return self._edits.receipts

    def step(self, cancel: CancelToken) -> Generated:
        """One more token; only while `finish` is None.

        Raises FailedPrecondition (reason NON_FINITE), Cancelled, DeadlineExceeded, and
        ResourceExhausted before the first where others hold too much memory.
        """
        logits = self._next_logits(cancel).cpu().double()
        # Ids that the tokenizer cannot decode are never chosen, though they count as probabilities.
        listed = logits[: self._vocabulary.listed]
        log_probs = logits.log_softmax(-1)[: len(listed)]
        token_id = self._sampler.choose(listed)
        position = len(self._ids)
        self._ids.append(token_id)
        text = self._transcript.add(token_id)
        self.finish = self._finish(token_id)
        if self.finish is not None:
            text += self._transcript.end()
        self.text += text
        top = torch.topk(log_probs, min(self._top, len(listed)))
        return Generated(
            position,
            token_id,
            text,
            float(log_probs[token_id]),
            tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
        )

    def _next_logits(self, cancel: CancelToken) -> Tensor:
        """[V] after the last token; runs the tokens that are not in the cache yet."""
        if not self._begun:
            self._begun = True
            room, tokens = self._hooks.room, self._prompt_tokens + self._ending.max_new_tokens
            cached = memory.cached(room.sizes, tokens)
            room.check_holder(cached)
            room.hold(self, cached)
        start, end = self._cache.get_seq_length(), len(self._ids)
        self._edits.fill(self._hooks, cancel)
        edits = self._edits.of_step(start, end)
        row = Row(tuple(self._ids[start:]), edits.edits)
        current = self._hooks.run(
            [row], [end - start - 1], gradients=False, cancel=cancel, cache=self._cache
        )
        self._edits.record(edits, current.receipts(0), start)
        self.forward_ms += current.forward_ms
        return current.logits[0, 0]

    def _finish(self, token_id: int) -> Finish | None:
        if token_id in self._ending.stop_tokens:
            return Finish.STOP_TOKEN
        if self._transcript.stopped:
            return Finish.STOP_TEXT
        if len(self.token_ids) == self._ending.max_new_tokens:
            return Finish.LENGTH
        return None
