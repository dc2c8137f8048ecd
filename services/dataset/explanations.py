"""explanations.jsonl in a dataset's folder: what others have said of its components, kept as it
came with their records. One JSON object a line, in the dataset's order:

    component   the address
    text        the explanation
    method      how it was made, in the source's words     model    what wrote it
    author      who had it made, the source's id           notes    the source's remarks
    id          its id at the source
    scores      the source's scores by name

A field that the source does not state is absent. A line is read where it begins, so a reader holds
one piece of the file, however long that is.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from services.common.errors import InvalidArgument
from services.dataset import files, groups
from services.dataset.damage import Damaged
from services.dataset.manifest import EXPLANATIONS, StoredFile
from services.dataset.storage import PartlyRead

MAX_LINE_BYTES = 2**20
_PIECE = 2**20


@dataclass(frozen=True)
class Explanation:
    component: str
    text: str
    method: str = ""
    model: str = ""
    author: str = ""
    notes: str = ""
    id: str = ""
    scores: dict[str, float] = field(default_factory=dict)

    def line(self) -> bytes:
        """Raises InvalidArgument where it is longer than any that can be sent."""
        stated = {name: value for name, value in vars(self).items() if value}
        line = json.dumps(stated, ensure_ascii=False).encode() + b"\n"
        if len(line) > MAX_LINE_BYTES:
            raise InvalidArgument(
                f"the explanation of {self.component} has {len(line):,} bytes; at most "
                f"{MAX_LINE_BYTES:,} can be kept"
            )
        return line


def write(folder: Path, found: Iterable[Explanation]) -> int:
    """Writes the file, whole or not at all, or none where there is nothing; how many.

    Raises InvalidArgument, FailedPrecondition."""
    ordered = sorted(found, key=lambda each: _order(each.component))
    if ordered:
        with files.atomic(folder / EXPLANATIONS) as file:
            for each in ordered:
                file.write(each.line())
    return len(ordered)


def check(stored: StoredFile, file: PartlyRead) -> None:
    """Raises Damaged where the file is not what was written."""
    digest = hashlib.sha256()
    for start in range(0, stored.bytes, _PIECE):
        digest.update(file.read(start, min(_PIECE, stored.bytes - start)))
    if digest.hexdigest() != stored.sha256:
        raise Damaged(stored.name, "does not match the manifest's checksum")


def read(stored: StoredFile, file: PartlyRead, start: int) -> Iterator[tuple[Explanation, int]]:
    """Explanations from a byte of a checked file on, each with the byte behind it. Raises Damaged
    where none begins there."""
    left, end = b"", start
    for offset in range(start, stored.bytes, _PIECE):
        content = left + file.read(offset, min(_PIECE, stored.bytes - offset))
        *lines, left = content.split(b"\n")
        for line in lines:
            end += len(line) + 1
            try:
                found = Explanation(**json.loads(line))
            except (ValueError, TypeError):
                raise Damaged(stored.name, "holds what is no explanation") from None
            yield found, end


def _order(component: str) -> tuple[tuple[int, int, str], int]:
    group, index = groups.parse_component(component)
    return group.order, index
