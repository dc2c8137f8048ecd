"""How large shared passes are, on devices whose times are given by a formula."""

from collections.abc import Sequence

import pytest

from services.inference.engine import batch_budget
from services.inference.engine.batch_budget import (
    GAIN,
    LEAST,
    LONGEST_S,
    MOST,
    PATIENT,
    enough,
    measure,
)
from services.inference.engine.captured import Row
from services.inference.engine.room import UNLIMITED
from tests.inference.helpers import random_engine


class Device:
    """Takes `start` seconds per pass, and `each` per token beyond those that it runs at once."""

    def __init__(self, start: float, each: float, at_once: int = 0) -> None:
        self.start, self.each, self.at_once = start, each, at_once
        self.largest = 0

    def __call__(self, hooks: object, rows: Sequence[Row]) -> float:
        tokens = sum(len(row.token_ids) for row in rows)
        self.largest = max(self.largest, tokens)
        return self.seconds(tokens)

    def seconds(self, tokens: int) -> float:
        return self.start + self.each * max(tokens - self.at_once, 0)


def measured(device: Device, monkeypatch: pytest.MonkeyPatch, budget: int = UNLIMITED) -> int:
    engine = random_engine()
    engine.hooks.room.budget = budget
    monkeypatch.setattr(batch_budget, "_seconds", device)
    return measure(engine.hooks, context=1024)


def test_a_cpu_is_full_at_a_few_hundred(monkeypatch: pytest.MonkeyPatch) -> None:
    """There twice the tokens bring hardly more tokens per second; at half of them they do."""
    device = Device(0.01, 0.001)
    found = measured(device, monkeypatch)
    gains = [
        2 * device.seconds(tokens) / device.seconds(2 * tokens) for tokens in (found // 2, found)
    ]
    assert gains[0] > GAIN
    assert gains[1] == pytest.approx(GAIN, abs=1e-3)


def test_a_gpu_takes_thousands(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(Device(0.012, 4e-6, at_once=1024), monkeypatch) == MOST


def test_no_batch_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(0.3, 0.0015)
    found = measured(device, monkeypatch)
    assert found > PATIENT
    assert device.seconds(found) <= LONGEST_S
    assert device.seconds(found + 1) > LONGEST_S


def test_a_slow_device_is_not_measured_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(8.0, 0.1)
    measured(device, monkeypatch)
    assert device.largest == 16


def test_large_models_on_slow_devices_share_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not depend on tokens is little there: sharing saves nothing."""
    assert measured(Device(0.05, 0.05), monkeypatch) == LEAST
    assert enough(8.0, 0.1) == PATIENT


def test_passes_that_do_not_fit_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(0.012, 4e-6)
    measured(device, monkeypatch, budget=3_000_000)
    assert 16 < device.largest < 1024


def test_noise_gives_a_number_within_bounds() -> None:
    assert enough(-0.1, 1e-3) == LEAST
    assert enough(0.01, 1e-9) == MOST


def test_a_real_engine() -> None:
    assert LEAST <= measure(random_engine().hooks, context=24) <= MOST
