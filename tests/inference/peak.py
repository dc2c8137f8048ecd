"""What the allocator really gave while some work ran, as torch's profiler saw it."""

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], Any]) -> int:
    """Bytes allocated at once on the CPU by tensors, at most, while `work` ran; what it returns
    lives until the end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        returned = work()
    results = profiled.profiler.kineto_results
    allocations = [each for each in results.events() if each.name() == "[memory]"]
    del returned
    live = most = 0
    for each in sorted(allocations, key=lambda each: each.start_ns()):
        live += each.nbytes()
        most = max(most, live)
    return most
