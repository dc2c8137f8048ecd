"""OpenAI's explanations, kept beside the records of an import."""

import json
from pathlib import Path
from typing import Any

import pytest

from services.common.addresses import Kind
from services.common.errors import InvalidArgument
from services.dataset.importers import importing
from tests.dataset import openai_writer
from tests.dataset.test_openai_remote import NEURON

ID = {"dataclass_name": "NeuronId", "layer_index": 5, "neuron_index": 131}


def results(**changes: Any) -> dict[str, Any]:
    return {
        "dataclass_name": "NeuronSimulationResults",
        "neuron_id": ID,
        "scored_explanations": [
            {
                "dataclass_name": "ScoredExplanation",
                "explanation": " words of calm",
                "scored_simulation": {
                    "dataclass_name": "ScoredSimulation",
                    "scored_sequence_simulations": [{"much": "more"}],
                    "ev_correlation_score": 0.5,
                    "rsquared_score": -0.25,
                    "absolute_dev_explained_score": float("nan"),
                },
            }
        ],
        **changes,
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """`collated-activations` and `explanations` side by side, as they are published."""
    folder = tmp_path / "gpt2_small_data"
    openai_writer.write(folder / "collated-activations", NEURON)
    (folder / "explanations" / "5").mkdir(parents=True)
    return folder


def write(source: Path, document: dict[str, Any]) -> None:
    (source / "explanations" / "5" / "131.jsonl").write_text(json.dumps(document) + "\n")


def test_text_and_scores_are_kept(source: Path, tmp_path: Path) -> None:
    write(source, results())
    manifest = importing.import_openai(source, tmp_path / "d", Kind.NEURON, "gpt2")
    assert manifest.records == 1
    (line,) = (tmp_path / "d" / "explanations.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "component": "neuron.5.131",
        "text": "words of calm",
        "scores": {"ev_correlation": 0.5, "rsquared": -0.25},
    }


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"neuron_id": {**ID, "neuron_index": 132}}, "where neuron.5.131 is wanted"),
        ({"scored_explanations": None}, r"scored_explanations: is a list"),
        ({"scored_explanations": [{"explanation": " "}]}, "is text, never empty"),
        (
            {
                "scored_explanations": [
                    {"explanation": "x", "scored_simulation": {"rsquared_score": "1"}}
                ]
            },
            "is a finite number or null",
        ),
    ],
)
def test_what_is_wrong_stops_the_import(
    source: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    write(source, results(**changes))
    with pytest.raises(InvalidArgument, match=says) as caught:
        importing.import_openai(source, tmp_path / "d", Kind.NEURON, "gpt2")
    assert "131.jsonl" in str(caught.value)
