"""The folder of a build that is not finished: `building` in the folder of the dataset.

    job.json          what was asked for, and by whom
    stopped.json      that it was cancelled or has failed, and why; absent: it goes on by itself
    plan.json         what it is of (`plan`)
    checkpoint.json   up to where everything below is whole
    tokens.000007     the sequences of a segment, with where they come from
    state.000007/     what was gathered up to the end of that segment, a file per group

Everything is written whole and then named in the checkpoint, so whatever kills the process costs
the segment that was under way, and what that left is swept up.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from services.common.errors import FailedPrecondition
from services.common.harvest.state import Keep, State
from services.dataset import files
from services.dataset.building import array_file
from services.dataset.building.array_file import Array
from services.dataset.building.sequences import CorpusSequence, Position
from services.dataset.damage import Damaged
from services.dataset.library import BUILDING

JOB, STOPPED, PLAN, CHECKPOINT, LOCK = (
    "job.json",
    "stopped.json",
    "plan.json",
    "checkpoint.json",
    "lock",
)


@dataclass(frozen=True)
class Checkpoint:
    """How far a build is: counts of what is whole, and where the corpus goes on."""

    segments: int = 0
    sequences: int = 0
    tokens: int = 0
    position: Position = field(default_factory=Position)
    digest: str = ""
    """SHA-256 over the sequences of each segment and the digest before."""
    is_complete: bool = False
    """Whether nothing more is to be harvested."""


class WorkFolder:
    """Held by one process at a time, and by nobody when that dies."""

    def __init__(self, dataset: Path) -> None:
        self.dataset = dataset
        self.path = dataset / BUILDING
        self._lock = -1

    def __enter__(self) -> Self:
        """Raises FailedPrecondition where another process holds it or it cannot be made."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise cannot_write(self.path, error) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise FailedPrecondition(
                f"the dataset {self.dataset.name!r} is being built by another process"
            ) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._lock)

    def checkpoint(self) -> Checkpoint:
        """Where to go on. Sweeps up what a killed build left behind it."""
        try:
            found = json.loads((self.path / CHECKPOINT).read_bytes())
            found["position"] = Position(**found["position"])
            current = Checkpoint(**found)
        except FileNotFoundError:
            current = Checkpoint()
        except (ValueError, TypeError, KeyError):
            raise self._damaged(CHECKPOINT, "is no checkpoint") from None
        for path in self.path.iterdir():
            name, _, number = path.name.partition(".")
            old = name == "state" and number != f"{current.segments:06d}"
            ahead = name == "tokens" and number[:6] >= f"{current.segments + 1:06d}"
            if old or ahead or path.name.endswith(files.PARTIAL):
                _remove(path)
        return current

    def advance(self, checkpoint: Checkpoint) -> None:
        """Makes a segment count whose tokens and states are written."""
        state = self._states(checkpoint.segments)
        if state.is_dir():
            files.sync_folder(state)
        files.sync_folder(self.path)
        with files.atomic(self.path / CHECKPOINT) as file:
            file.write(json.dumps(asdict(checkpoint), indent=1).encode())
        files.sync_folder(self.path)
        _remove(self._states(checkpoint.segments - 1))

    def write_sequences(self, segment: int, sequences: Sequence[CorpusSequence]) -> None:
        documents: dict[str, int] = {}
        numbers = [documents.setdefault(each.document_id, len(documents)) for each in sequences]
        lengths = np.array([len(each.ids) for each in sequences], np.int64)
        arrays: dict[str, Array] = {
            "ids": np.concatenate([np.array(each.ids, np.int32) for each in sequences]),
            "starts": np.concatenate(([0], np.cumsum(lengths))),
            "documents": np.array(numbers, np.int32),
            "offsets": np.array([each.offset for each in sequences], np.int64),
        }
        about = {"first": sequences[0].index, "documents": list(documents)}
        array_file.write(self._tokens(segment), about, arrays)

    def sequences(self, segment: int) -> "StoredSequences":
        try:
            about, arrays = array_file.read(self._tokens(segment))
        except Damaged as damaged:
            raise self._damaged(self._tokens(segment).name, damaged.what) from None
        return StoredSequences(int(about["first"]), about["documents"], arrays)

    def write_state(self, segment: int, state: State) -> None:
        folder = self._states(segment)
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from None
        about = {"group": state.group, "count": state.count, "window": state.window}
        about["keep"] = asdict(state.keep)
        array_file.write(folder / state.group, about, state.arrays)

    def state(self, segment: int, group: str) -> State:
        """Raises FailedPrecondition where it is damaged."""
        path = self._states(segment) / group
        try:
            about, arrays = array_file.read(path)
        except Damaged as damaged:
            raise self._damaged(f"{path.parent.name}/{path.name}", damaged.what) from None
        keep = Keep(**about["keep"])
        return State(about["group"], keep, about["count"], about["window"], arrays)

    def remove(self) -> None:
        """The build is finished."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _tokens(self, segment: int) -> Path:
        return self.path / f"tokens.{segment:06d}"

    def _states(self, segment: int) -> Path:
        return self.path / f"state.{segment:06d}"

    def _damaged(self, name: str, what: str) -> FailedPrecondition:
        return FailedPrecondition(
            f"what was built of {self.dataset.name!r} is damaged ({name}: {what}): delete it and "
            "build it anew",
            reason="DAMAGED",
        )


class StoredSequences:
    """The sequences of a segment."""

    def __init__(self, first: int, documents: list[str], arrays: dict[str, Array]) -> None:
        self.first = first
        self._documents = documents
        self._arrays = arrays

    def __len__(self) -> int:
        return len(self._arrays["documents"])

    def __getitem__(self, index: int) -> tuple[Array, str, int]:
        """Ids, the document's id, and where in it the sequence starts."""
        place = index - self.first
        start, stop = self._arrays["starts"][place : place + 2]
        document = self._documents[int(self._arrays["documents"][place])]
        return self._arrays["ids"][start:stop], document, int(self._arrays["offsets"][place])


def cannot_write(path: Path, error: OSError) -> FailedPrecondition:
    return FailedPrecondition(f"{path} cannot be written: {error.strerror}", reason="CANNOT_WRITE")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
