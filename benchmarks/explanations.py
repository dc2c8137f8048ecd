"""Explanations of the demo's latents without a language model: how fast they come, what they are
worth.

    python -m benchmarks.explanations [--group latent.demo-mlp_out-1]... [--card]

Starts the product as a user does, `tdb up --demo`, on a data folder of its own, waits for the
demo's dataset, and asks the explainer service for jobs of the token_pattern method over every
latent of each group: one without scores, for the time, and one that is scored by the offline
simulator. As its control every explanation is scored once more for another latent, the next of its
group. The intervention score, for which the model itself is asked, is made for latents that are
drawn by a seed. Figures are medians over latents, with the 95 % percentile interval of 1,000
bootstrap draws of latents. Without `--group`: both dictionaries of layer 1. `--card` writes the
figures into the demo's model card.
"""

import argparse
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from tdb.dataset.v1 import dataset_pb2
from tdb.dataset.v1 import service_pb2_grpc as dataset_grpc
from tdb.explainer.v1 import explain_pb2, explanation_pb2, service_pb2_grpc

USUAL = ("latent.demo-attn_out-1", "latent.demo-mlp_out-1")
CARD = Path(__file__).parents[1] / "demo" / "model" / "README.md"
OPTIONS = (("grpc.max_receive_message_length", 16 * 2**20),)
SEED, DRAWS = 0, 1000
OFFLINE = (
    explanation_pb2.SCORER_DETECTION,
    explanation_pb2.SCORER_FUZZING,
    explanation_pb2.SCORER_SIMULATION,
)
SHOWN = {
    ("DETECTION", "AUC"): "detection, AUC",
    ("DETECTION", "BALANCED_ACCURACY"): "detection, balanced accuracy",
    ("FUZZING", "AUC"): "fuzzing, AUC",
    ("SIMULATION", "PEARSON"): "simulation, Pearson",
    ("SIMULATION", "EXPLAINED_VARIANCE"): "simulation, explained variance",
    ("INTERVENTION", "ACCURACY"): "intervention, accuracy",
}
Values = dict[str, list[float]]


@dataclass
class Group:
    """What was found of one dictionary."""

    name: str
    latents: int = 0
    explained: int = 0
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    right: Values = field(default_factory=lambda: defaultdict(list))
    shuffled: Values = field(default_factory=lambda: defaultdict(list))


class Product:
    """The explainer and dataset services of a product that runs."""

    def __init__(self, explainer: int, dataset: int) -> None:
        def channel(port: int) -> grpc.Channel:
            return grpc.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS)

        self.explainer: Any = service_pb2_grpc.ExplainerServiceStub(channel(explainer))
        self.dataset: Any = dataset_grpc.DatasetServiceStub(channel(dataset))

    def wait(self) -> dataset_pb2.Dataset:
        """The demo's dataset, once it is built."""
        while True:
            listed = self.dataset.ListDatasets(dataset_pb2.ListDatasetsRequest())
            for each in listed.datasets:
                if each.name == "demo":
                    found: dataset_pb2.Dataset = each
                    return found
            time.sleep(1)

    def job(self, first: str, last: str, *, seed: int, scored: bool) -> tuple[Any, float]:
        """The summary of a job over a range, and how long it took."""
        request = explain_pb2.ExplainManyRequest(
            dataset="demo",
            range=explain_pb2.ComponentRange(first=first, last=last),
            method=explanation_pb2.METHOD_TOKEN_PATTERN,
            seed=seed,
            scoring=explain_pb2.Scoring(scorers=OFFLINE) if scored else None,
        )
        started = time.perf_counter()
        for response in self.explainer.ExplainMany(request):
            if response.HasField("summary"):
                return response.summary, time.perf_counter() - started
        raise SystemExit("the job ended without a summary")

    def explanations(
        self, model: explanation_pb2.ExplainedModel, components: Sequence[str], seed: int
    ) -> dict[str, explanation_pb2.Explanation]:
        request = explanation_pb2.ListExplanationsRequest(model=model, components=components)
        listed = self.explainer.ListExplanations(request).explanations
        return {each.component: each for each in listed if each.provenance.seed == seed}

    def scores(
        self, id: str, scorers: Sequence["explanation_pb2.Scorer.ValueType"]
    ) -> tuple[Values, str]:
        """The scores of an explanation; why one is missing."""
        request = explain_pb2.ScoreRequest(
            id=id,
            dataset="demo",
            scoring=explain_pb2.Scoring(scorers=scorers, seed=SEED),
        )
        found: Values = defaultdict(list)
        try:
            for response in self.explainer.Score(request):
                if response.HasField("score"):
                    _add(found, response.score)
        except grpc.RpcError as error:
            return found, error.details() or str(error)
        return found, ""


def _add(values: Values, score: explanation_pb2.Score) -> None:
    scorer = explanation_pb2.Scorer.Name(score.scorer).removeprefix("SCORER_")
    measure = explanation_pb2.Measure.Name(score.measure).removeprefix("MEASURE_")
    if score.HasField("value") and (scorer, measure) in SHOWN:
        values[SHOWN[scorer, measure]].append(score.value)


@contextmanager
def product(folder: Path) -> Iterator[Product]:
    env = {
        **os.environ,
        **{f"TDB_{name}_PORT": "0" for name in ("GATEWAY", "INFERENCE", "DATASET", "EXPLAINER")},
    }
    log = folder / "benchmark.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("tdb"), "up", "--demo", "--data-dir", folder],
            env=env,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise SystemExit(log.read_text())
        ports = dict(re.findall(r"^(\w+): listening on port (\d+)$", log.read_text(), re.M))
        yield Product(int(ports["explainer"]), int(ports["dataset"]))
    finally:
        process.terminate()
        process.wait(60)


def measure(found: Product, dataset: dataset_pb2.Dataset, name: str, drawn: int) -> Group:
    """Everything about one group, of which `drawn` latents are steered."""
    (listed,) = [each for each in dataset.groups if each.name == name]
    first, last = f"{name}.{listed.first}", f"{name}.{listed.last}"
    group = Group(name)
    _, group.seconds = found.job(first, last, seed=SEED + 1, scored=False)
    summary, seconds = found.job(first, last, seed=SEED, scored=True)
    group.latents, group.explained = summary.components, summary.explained
    group.reasons.update({each.reason: each.count for each in summary.reasons})
    print(f"{name}: {group.seconds:.0f} s for explanations, {seconds:.0f} s with scores")
    model = explanation_pb2.ExplainedModel(
        id=dataset.header.model.id, weights_hash=dataset.header.model.weights_hash
    )
    components = [f"{name}.{number}" for number in range(listed.first, listed.last + 1)]
    explanations = found.explanations(model, components, SEED)
    for each in explanations.values():
        for score in each.scores:
            _add(group.right, score)
    control(found, model, list(explanations.values()), group, drawn)
    return group


def control(
    found: Product,
    model: explanation_pb2.ExplainedModel,
    explanations: Sequence[explanation_pb2.Explanation],
    group: Group,
    drawn: int,
) -> None:
    """Each explanation once more for the latent after its own; of some also the intervention."""
    steered = set(random.Random(SEED).sample(range(len(explanations)), drawn))
    for number, each in enumerate(explanations):
        other = explanations[(number + 1) % len(explanations)]
        written = found.explainer.WriteExplanation(
            explanation_pb2.WriteExplanationRequest(
                model=model, component=other.component, text=each.text
            )
        ).explanation
        scorers = list(OFFLINE)
        if number in steered:
            scorers.append(explanation_pb2.SCORER_INTERVENTION)
            values, missing = found.scores(each.id, [explanation_pb2.SCORER_INTERVENTION])
            _extend(group.right, values)
            if missing:
                print(f"{each.component} has no intervention score: {missing}")
        _extend(group.shuffled, found.scores(written.id, scorers)[0])


def _extend(values: Values, more: Values) -> None:
    for name, each in more.items():
        values[name] += each


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, and the 95 % percentile interval of its bootstrap."""
    draw = random.Random(SEED)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(DRAWS))
    low, high = medians[round(0.025 * (DRAWS - 1))], medians[round(0.975 * (DRAWS - 1))]
    return statistics.median(values), low, high


def rows(groups: Sequence[Group]) -> list[tuple[str, ...]]:
    """Dictionary, score, n, median with its interval, the control's median."""
    found: list[tuple[str, ...]] = []
    for group in groups:
        for name in SHOWN.values():
            if values := group.right[name]:
                median, low, high = interval(values)
                other = statistics.median(group.shuffled[name]) if group.shuffled[name] else None
                found.append(
                    (
                        f"`{group.name.removeprefix('latent.')}`",
                        name,
                        str(len(values)),
                        f"{median:.3f} ({low:.3f} to {high:.3f})",
                        "" if other is None else f"{other:.3f}",
                    )
                )
    return found


def skipped(group: Group) -> str:
    reasons: Mapping[str, int] = group.reasons
    shares = [f"{count / group.latents:.1%} {reason}" for reason, count in sorted(reasons.items())]
    return (
        f"`{group.name.removeprefix('latent.')}`: {group.explained} of {group.latents} explained "
        f"in {group.seconds:.0f} s; skipped {', '.join(shares) or 'none'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--group", action="append", help="such as latent.demo-mlp_out-1")
    parser.add_argument(
        "--steered", type=int, default=32, help="latents with an intervention score"
    )
    parser.add_argument("--folder", type=Path, help="where to put (and find again) the dataset")
    parser.add_argument("--card", action="store_true", help="write the figures into the card")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as temporary,
        product(arguments.folder or Path(temporary)) as found,
    ):
        dataset = found.wait()
        groups = [
            measure(found, dataset, name, arguments.steered) for name in arguments.group or USUAL
        ]
    for group in groups:
        print(skipped(group))
    for row in rows(groups):
        print("  ".join(f"{cell:<32}" for cell in row))
    if arguments.card:
        from demo.card import state_explanations

        flags = "".join(f" --group {each}" for each in arguments.group or ())
        state_explanations(
            CARD,
            f"python -m benchmarks.explanations{flags} --card",
            [skipped(each) for each in groups],
            rows(groups),
        )


if __name__ == "__main__":
    main()
