"""OpenAI's explanations of neurons, `explanations/LAYER/INDEX.jsonl`: a line is one neuron's.

    NeuronSimulationResults   {neuron_id, scored_explanations}
    ScoredExplanation         {explanation, scored_simulation}
    ScoredSimulation          {scored_sequence_simulations, ev_correlation_score, rsquared_score,
                               absolute_dev_explained_score}

Kept are the text and the scores; the simulated sequences are not.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from services.common.errors import InvalidArgument, inside
from services.dataset.explanations import Explanation
from services.dataset.groups import Group
from services.dataset.importers import json_lines, openai_records
from services.dataset.importers.about import about

_SCORES = {
    "ev_correlation_score": "ev_correlation",
    "rsquared_score": "rsquared",
    "absolute_dev_explained_score": "absolute_dev_explained",
}


def read(path: Path, group: Group, index: int) -> Iterator[Explanation]:
    """The explanations in a file. Raises InvalidArgument."""
    with about(path):
        for number, line in json_lines.read(path):
            with inside(f"line {number}"):
                openai_records.check_id(line.get("neuron_id"), group, index)
                given = line.get("scored_explanations")
                if not isinstance(given, list):
                    raise InvalidArgument("is a list", field="scored_explanations")
                for place, each in enumerate(given):
                    with inside(f"scored_explanations[{place}]"):
                        yield _explanation(each, group.component(index))


def _explanation(value: Any, component: str) -> Explanation:
    text = value.get("explanation") if isinstance(value, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InvalidArgument("is text, never empty", field="explanation")
    simulation = value.get("scored_simulation") or {}
    if not isinstance(simulation, dict):
        raise InvalidArgument("is an object", field="scored_simulation")
    with inside("scored_simulation"):
        return Explanation(component, text.strip(), scores=_scores(simulation))


def _scores(simulation: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for theirs, ours in _SCORES.items():
        with inside(theirs):
            score = openai_records.number_or_none(simulation.get(theirs))
            if score is not None:
                found[ours] = score
    return found
