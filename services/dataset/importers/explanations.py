"""explanations.jsonl in a dataset's folder: what others have said of its components, kept as it
came with their records. One JSON object a line, in the dataset's order:

    component   the address
    text        the explanation
    method      how it was made, in the source's words     model    what wrote it
    author      who had it made, the source's id           notes    the source's remarks
    id          its id at the source
    scores      the source's scores by name

A field that the source does not state is absent.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from services.dataset import files, groups

NAME = "explanations.jsonl"


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
        stated = {name: value for name, value in vars(self).items() if value}
        return json.dumps(stated, ensure_ascii=False).encode() + b"\n"


def write(folder: Path, found: Iterable[Explanation]) -> int:
    """Writes the file, whole or not at all, or none where there is nothing; how many."""
    ordered = sorted(found, key=lambda each: _order(each.component))
    if ordered:
        with files.atomic(folder / NAME) as file:
            for each in ordered:
                file.write(each.line())
    return len(ordered)


def _order(component: str) -> tuple[tuple[int, int, str], int]:
    group, index = groups.parse_component(component)
    return group.order, index
