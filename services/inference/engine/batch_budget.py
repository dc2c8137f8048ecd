"""How many tokens of several requests, padding counted, are best run in one pass on this device.

    seconds = a + b * tokens

A pass costs a part that does not depend on its tokens (the weights are read, every layer is called)
and a part that does. Larger batches share the first among more requests, until the second is nearly
all there is; from then on they only make everybody wait for the slowest. Where that is depends on
the device: a CPU is full at a few hundred tokens, a GPU at thousands. So it is measured when a
model is loaded, on forward and backward passes of ever more rows.
"""

import time
from collections.abc import Callable

import torch

from services.inference.engine import memory
from services.inference.engine.captured import Row
from services.inference.engine.forward import Hooks

LEAST, MOST = 128, 8192
"""Tokens."""
GAIN = 1.025
"""Where twice the tokens would not bring so many times the tokens per second, it is enough."""
LONGEST_S, PATIENT = 1.0, 256
"""A shared pass should not take longer, unless it has no more than so many tokens."""
SPENT_S = 2.5
"""The measurement should not."""
_ROW = 16
_STEP = 4


def measure(hooks: Hooks, context: int) -> int:
    """Tokens of a shared pass. `context` is the model's."""
    row = Row((0,) * min(_ROW, context))
    length = len(row.token_ids)
    tokens = length
    first = [_seconds(hooks, [row]) for _ in range(2)]
    smallest = last = min(first)
    spent, found = sum(first), LEAST
    while (larger := _STEP * tokens) <= MOST:
        batch = memory.Batch(larger // length, length, gradients=True)
        too_much = memory.passed(hooks.room.sizes, batch) > hooks.room.budget
        if too_much or last > LONGEST_S or spent + _STEP * last > SPENT_S:
            break
        seconds = _seconds(hooks, [row] * (larger // length))
        each = max((seconds - last) / (larger - tokens), 1e-9)
        tokens, last, spent = larger, seconds, spent + seconds
        found = enough(smallest - each * length, each)
        if found < tokens:
            break
    return found


def enough(start_s: float, each_s: float) -> int:
    """Tokens of a pass of `start_s + each_s * tokens` seconds."""
    # There 2 tokens / seconds(2 tokens) is GAIN times tokens / seconds(tokens).
    full = (2 - GAIN) / (2 * GAIN - 2) * start_s / each_s
    timely = max((LONGEST_S - start_s) / each_s, PATIENT)
    return int(min(max(min(full, timely), LEAST), MOST))


def _seconds(hooks: Hooks, rows: list[Row]) -> float:
    """What a pass with gradients takes."""
    clock = _clock_of(hooks.architecture.final_norm.gain.device)
    started = clock()
    current = hooks.run(rows, [len(rows[0].token_ids) - 1], gradients=True)
    patterns = [site.probabilities for site in current.attention]
    gradients = torch.autograd.grad(
        current.logits.sum(), [current.embed, *current.neurons, *patterns], allow_unused=True
    )
    float(gradients[0].sum())  # waits for the device
    return clock() - started


def _clock_of(device: torch.device) -> Callable[[], float]:
    """On a CPU the time of the processor: what other processes take of it while a model is loaded
    says nothing about later."""
    if device.type != "cpu":
        return time.perf_counter
    threads = torch.get_num_threads()
    return lambda: time.process_time() / threads
