"""Neuronpedia's batch files, as SAEDashboard writes them: one JSON file holds some features of one
dictionary.

    {model_id, layer, sae_set, features: [{feature_index, activations, frac_nonzero,
     freq_hist_data_bar_values, freq_hist_data_bar_heights, pos_str, pos_values, neg_str,
     neg_values, ...}]}

`activations` mixes the top sequences (`bin_contains` -1) with samples by interval of the activation
(`bin_min`, `bin_max`, and the share of tokens in it). What the files are like, beyond their layout:

- Tokens are text, sometimes pieces of a character in the tokenizer's own spelling; ids are unknown.
- One sequence stands in the top once for each of its strong tokens; here it stands once. A feature
  that never fires has its top filled with silent sequences; here it has no top.
- Values are rounded to three digits; the histogram gives the middles of its bins and counts only
  values greater than 0.

Left out: neighbours in the dictionary and the neuron basis, the histogram of logits, and the
attribution to source positions of attention dictionaries (`dfa_*`).
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tdb.dataset.v1 import record_pb2

from services.common.addresses import Kind
from services.common.errors import InvalidArgument, inside
from services.dataset import records
from services.dataset.groups import Group
from services.dataset.importers import json_text

_TOP = -1


@dataclass(frozen=True)
class Batch:
    model: str
    dictionary: str
    """As Neuronpedia names it: LAYER-SET, in characters that an address can hold."""
    corpus: str
    features: list[Any]
    """As they are in the file."""

    @classmethod
    def parse(cls, content: bytes) -> "Batch":
        """Raises InvalidArgument."""
        document = json_text.loads(content)
        wanted = {"model_id": str, "layer": int, "sae_set": str, "features": list}
        for name, kind in wanted.items():
            if not isinstance(document, dict) or not isinstance(document.get(name), kind):
                raise InvalidArgument("a batch has model_id, layer, sae_set and features")
        named = f"{document['layer']}-{document['sae_set']}"
        corpora = {str(each.get("dataset", "")) for each in document["features"]}
        if len(corpora) > 1:
            raise InvalidArgument("its features were recorded on different datasets")
        return cls(
            model=document["model_id"],
            dictionary=re.sub(r"[^A-Za-z0-9_-]", "-", named),
            corpus=corpora.pop() if corpora else "",
            features=document["features"],
        )

    def indices(self) -> list[int]:
        """The feature index of each of `features`. Raises InvalidArgument."""
        found = []
        for number, feature in enumerate(self.features):
            index = feature.get("feature_index") if isinstance(feature, dict) else None
            if not isinstance(index, int) or index < 0:
                raise InvalidArgument(
                    "is a number from 0", field=f"features[{number}].feature_index"
                )
            found.append(index)
        return found

    def records(self, dictionary: str = "") -> Iterator[record_pb2.ComponentRecord]:
        """By index; `dictionary` names them otherwise. Raises InvalidArgument."""
        group = Group(Kind.LATENT, dictionary=dictionary or self.dictionary)
        for index, number in sorted((index, n) for n, index in enumerate(self.indices())):
            with inside(f"features[{number}]"):
                yield record(self.features[number], group.component(index))


def record(feature: dict[str, Any], component: str) -> record_pb2.ComponentRecord:
    """The record of one of `features`. Raises InvalidArgument."""
    record = record_pb2.ComponentRecord(component=component)
    quantiles: dict[tuple[float, float, float], record_pb2.QuantileExamples] = {}
    top: list[record_pb2.Example] = []
    for number, given in enumerate(_list(feature, "activations")):
        with inside(f"activations[{number}]"):
            example = _example(given)
            place = tuple(_number(given, name) for name in ("bin_min", "bin_max", "bin_contains"))
            if place[2] == _TOP:
                if records.peak(example) > 0 and example not in top:
                    top.append(example)
                continue
            lower, upper, fraction = place
            if (lower, upper, fraction) not in quantiles:
                quantiles[lower, upper, fraction] = record_pb2.QuantileExamples(
                    lower=lower, upper=upper, fraction=fraction
                )
            quantiles[lower, upper, fraction].examples.append(example)
    record.top.extend(sorted(top, key=records.peak, reverse=True))
    record.quantiles.extend(quantiles[place] for place in sorted(quantiles, reverse=True))
    record.promoted.extend(_scores(feature, "pos", descending=True))
    record.suppressed.extend(_scores(feature, "neg", descending=False))
    _statistics(feature, record)
    records.check(record)
    return record


def _example(given: Any) -> record_pb2.Example:
    tokens, values = _list(given, "tokens"), _numbers(given, "values")
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise InvalidArgument("is a list of text, never empty", field="tokens")
    if len(values) != len(tokens):
        raise InvalidArgument(f"has {len(values)} values for {len(tokens)} tokens", field="values")
    return record_pb2.Example(token_texts=tokens, activations=values)


def _statistics(feature: dict[str, Any], record: record_pb2.ComponentRecord) -> None:
    statistics = record.statistics
    statistics.fraction_active = _number(feature, "frac_nonzero")
    if record.top:
        statistics.max = statistics.scale = records.peak(record.top[0])
    elif statistics.fraction_active == 0:
        statistics.max = 0
    middles = _numbers(feature, "freq_hist_data_bar_values")
    heights = _list(feature, "freq_hist_data_bar_heights")
    if len(middles) != len(heights) or not all(isinstance(each, int) for each in heights):
        raise InvalidArgument(
            "is a list of counts, one for each bar", field="freq_hist_data_bar_heights"
        )
    if len(middles) > 1:
        width = (middles[-1] - middles[0]) / (len(middles) - 1)
        first = middles[0] - width / 2
        histogram = statistics.histogram
        histogram.edges.extend(first + width * place for place in range(len(middles) + 1))
        histogram.counts.extend(heights)
        histogram.active_only = True


def _scores(feature: dict[str, Any], side: str, *, descending: bool) -> list[record_pb2.TextScore]:
    texts, values = _list(feature, f"{side}_str"), _numbers(feature, f"{side}_values")
    if len(texts) != len(values) or not all(isinstance(text, str) for text in texts):
        raise InvalidArgument("is a list of text, one for each value", field=f"{side}_str")
    found = [
        record_pb2.TextScore(text=text, score=value)
        for text, value in zip(texts, values, strict=True)
    ]
    return sorted(found, key=lambda each: each.score, reverse=descending)


def _list(given: Any, name: str) -> list[Any]:
    value = given.get(name) if isinstance(given, dict) else None
    if not isinstance(value, list):
        raise InvalidArgument("is a list", field=name)
    return value


def _numbers(given: Any, name: str) -> Sequence[float]:
    values = _list(given, name)
    if not all(map(_is_number, values)):
        raise InvalidArgument("is a list of finite numbers", field=name)
    return values


def _number(given: Any, name: str) -> float:
    value: Any = given.get(name) if isinstance(given, dict) else None
    if not _is_number(value):
        raise InvalidArgument("is a finite number", field=name)
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
