"""What passes may use where no setting says it: the machine's memory, or a control group's."""

from collections.abc import Mapping
from pathlib import Path

import torch

from services.inference.engine import budget

MIB = 2**20
MEMINFO = f"MemTotal: {9 * 1024} kB\nMemAvailable: {8 * 1024} kB\nHugePages_Total: 0\n"


def machine(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_control_groups_it_is_what_the_machine_has(tmp_path: Path) -> None:
    assert budget.host_memory(machine(tmp_path, {})) == 8 * MIB


def test_a_container_of_version_2(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/",
        "sys/fs/cgroup/memory.max": str(5 * MIB),
        "sys/fs/cgroup/memory.current": str(3 * MIB),
        "sys/fs/cgroup/memory.stat": f"anon {MIB}\ninactive_file {2 * MIB}\n",
    }
    # Of the 3 MiB in use 2 are files that are given back.
    assert budget.host_memory(machine(tmp_path, files)) == 4 * MIB


def test_the_tightest_group_above_the_own_one_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/team/tdb",
        "sys/fs/cgroup/team/memory.max": str(3 * MIB),
        "sys/fs/cgroup/team/memory.current": str(1 * MIB),
        "sys/fs/cgroup/team/tdb/memory.max": "max",
        "sys/fs/cgroup/team/tdb/memory.current": str(1 * MIB),
    }
    assert budget.host_memory(machine(tmp_path, files)) == 2 * MIB


def test_version_1(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory/jobs/7"
    files = {
        "proc/self/cgroup": "9:name=systemd:/\n4:memory:/jobs/7\n0::/",
        f"{folder}/memory.limit_in_bytes": str(6 * MIB),
        f"{folder}/memory.usage_in_bytes": str(5 * MIB),
        f"{folder}/memory.stat": f"total_inactive_file {1 * MIB}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(7 * MIB),
    }
    assert budget.host_memory(machine(tmp_path, files)) == 2 * MIB


def test_half_of_it_is_for_passes_and_never_nothing() -> None:
    cpu = torch.device("cpu")
    here = budget.host_memory()
    assert 0.3 * here < budget.automatic(cpu, 0) < 0.7 * here
    assert budget.automatic(cpu, 2 * here) == budget.LEAST
