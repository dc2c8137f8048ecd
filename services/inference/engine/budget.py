"""How many bytes passes may use, where no setting says it.

On a GPU nine tenths of what is free once the weights are there, less what dictionaries may take:
the rest is for the allocator's rounding and for kernels' workspaces. On a CPU half of what the
machine, or the control group that the process runs in, still has: the other half is for what is no
pass, answers and their messages, and for other processes.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

GPU_SHARE = 0.9
CPU_SHARE = 0.5
LEAST = 2**20
"""Bytes; a budget below it could not even say what would fit."""


def automatic(device: torch.device, dictionary_bytes: int) -> int:
    """Bytes that passes may use now; `dictionary_bytes` may still be taken by dictionaries."""
    share = GPU_SHARE if device.type == "cuda" else CPU_SHARE
    return max(LEAST, int(share * (available(device) - dictionary_bytes)))


def available(device: torch.device) -> int:
    """Bytes that are free on the device, what the allocator keeps for reuse included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return host_memory()


def host_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: the machine's, or less in a control group."""
    free = _meminfo(root / "proc/meminfo").get("MemAvailable", 4 * 2**30)
    return min([free, *(max(0, limit - used) for limit, used in _limits(root))])


def _meminfo(path: Path) -> Mapping[str, int]:
    """Bytes by name; empty where there is no such file, as on a Mac."""
    fields = (line.split() for line in _read(path).splitlines())
    return {name.rstrip(":"): int(number) * 1024 for name, number, *_ in fields}


def _limits(root: Path) -> list[tuple[int, int]]:
    """(limit, use) in bytes of the control groups that this process is in, of version 2 and 1.

    Files that were read count as used, but are given back when memory is short: they do not count
    here.
    """
    found = []
    for folder in _groups(root):
        limit, used = _read(folder / "memory.max"), _read(folder / "memory.current")
        if not limit:
            limit = _read(folder / "memory.limit_in_bytes")
            used = _read(folder / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():  # there is also "max"
            found.append((int(limit), max(0, int(used) - _inactive_files(folder))))
    return found


def _groups(root: Path) -> list[Path]:
    """Folders of the process's memory groups: the mounted ones, which in a container are its own,
    and from there down to those that the process is said to be in."""
    mounted = root / "sys/fs/cgroup"
    found = [mounted, mounted / "memory"]
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" or "memory" in controllers.split(","):
            top = mounted if number == "0" else mounted / "memory"
            own = top / path.lstrip("/")
            found += [each for each in (own, *own.parents) if each.is_relative_to(top)]
    return list(dict.fromkeys(found))


def _inactive_files(folder: Path) -> int:
    """Bytes of files that were read and would be given back first."""
    fields = (line.split() for line in _read(folder / "memory.stat").splitlines())
    stat = {name: int(number) for name, number in fields}
    return stat.get("total_inactive_file", stat.get("inactive_file", 0))


def _read(path: Path) -> str:
    """The file's text, empty where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
