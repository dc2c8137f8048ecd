"""Whether there is room for a dataset, before any work on it: on the disk, and below the operator's
cap (TDB_DATASETS_MIB) on all datasets of this machine together."""

import shutil
from pathlib import Path

from services.common.errors import FailedPrecondition

_MIB = 2**20


def check_disk(folder: Path, needed: int, what: str, remedy: str) -> None:
    """Raises FailedPrecondition (DISK_FULL) where the disk of `folder` has less than `needed` bytes
    free, OSError where it cannot be asked.

    `what` needs them; `remedy` is what else can be done than to make room."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FailedPrecondition(
            f"{what} {needed / _MIB:,.0f} MiB in {folder}, and there are {free / _MIB:,.0f} MiB: "
            f"make room{remedy}",
            reason="DISK_FULL",
        )


def check_cap(dataset: Path, needed: int, most_bytes: int) -> None:
    """Raises FailedPrecondition (STORE_FULL) where `needed` bytes for the dataset in this folder,
    and those of the others beside it, are more than `most_bytes`."""
    others = sum(
        _size(folder) for folder in dataset.parent.glob("*") if folder.name != dataset.name
    )
    if others + needed > most_bytes:
        raise FailedPrecondition(
            f"the dataset {dataset.name!r} may need {needed / _MIB:,.0f} MiB, and of the "
            f"{most_bytes / _MIB:,.0f} MiB that datasets may take (TDB_DATASETS_MIB) others take "
            f"{others / _MIB:,.0f}: delete one, or ask for less",
            reason="STORE_FULL",
        )


def _size(folder: Path) -> int:
    """Bytes of all files; one that goes meanwhile counts nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total
