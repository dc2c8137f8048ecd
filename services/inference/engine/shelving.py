"""Dictionaries at load: registered, run on a sample, and refused where they do not fit.

The sample is the one that lies beside the dictionary, else an English text of ours; a model without
a tokenizer is asked for sequences of its own. The model runs over it once, whatever the number of
dictionaries.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from services.common.settings import DictionarySource
from services.inference.engine.architecture import Architecture
from services.inference.engine.bound import canonical
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import Row
from services.inference.engine.dictionaries import self_test
from services.inference.engine.dictionaries.self_test import Measured, Trial
from services.inference.engine.dictionaries.sites import Point, Site
from services.inference.engine.dictionaries.sources import Registered, open_dictionaries
from services.inference.engine.dictionaries.store import Store
from services.inference.engine.dictionaries.widths import Widths
from services.inference.engine.forward import Hooks
from services.inference.engine.shelf import Served, Shelf
from services.inference.engine.splice import Probe
from services.inference.engine.text import Vocabulary

SAMPLE = Path(__file__).parent / "sample.txt"
SAMPLE_NAME = "English text of Transformer Debugger"
TOKENS = 4_000
ROW_TOKENS = 128
OWN_ROW_TOKENS = 32
"""Of sequences that the model writes itself, a token at a time."""
_BATCH_TOKENS = 512

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Sample:
    """Token sequences, and what they are called."""

    name: str
    rows: Rows


def fill_shelf(
    sources: Sequence[DictionarySource],
    hooks: Hooks,
    architecture: Architecture,
    vocabulary: Vocabulary,
    generate: Callable[[int, int], Rows],
    budget: int,
    cancel: CancelToken,
) -> Shelf:
    """`generate(rows, tokens)` samples sequences from the model; `budget` is bytes of weights.

    Raises FailedPrecondition for a dictionary that does not fit, with the numbers that show it.
    """
    widths = widths_of(architecture)
    registered = open_dictionaries(sources, widths)
    if not registered:
        return Shelf(of=architecture)
    gain = architecture.final_norm.gain
    store = Store(registered, gain.device, budget, host_budget=budget, dtype=gain.dtype)
    samples = _Samples(architecture, vocabulary, generate)
    measured: dict[str, Measured] = {}
    for sample, members in samples.of(registered).items():
        pairs = {_pair(each.header.site_in, each.header.site_out) for each in members}
        activations = _collect(hooks, sample, pairs, cancel)
        for each in members:
            x, target, positions = activations[_pair(each.header.site_in, each.header.site_out)]
            dictionary = store.get(each.id)
            found = self_test.measure(dictionary, x, target, sample.name, positions)
            measured[each.id] = found
            if self_test.faults(each.header, found) and not each.unchecked:
                tried = _try_elsewhere(each, hooks, architecture, sample, cancel)
                raise self_test.refusal(each.header, found, tried)
    served = [
        Served(
            each.header,
            each.set_name,
            measured[each.id],
            self_test.warning(each.header, measured[each.id]) if each.unchecked else "",
        )
        for each in registered
    ]
    return Shelf(served, store, of=architecture)


def widths_of(architecture: Architecture) -> Widths:
    """The sizes that dictionaries are held against."""
    return Widths(
        layers=len(architecture.layers),
        residual=architecture.width,
        neurons=architecture.neurons,
        heads=architecture.n_heads * architecture.head_width,
        parallel=architecture.parallel,
        experts=architecture.experts,
        mlp_norms=[(layer.mlp_norm.gain, layer.mlp_norm.bias) for layer in architecture.layers],
    )


Pair = tuple[Site, Site]
Activations = tuple[Tensor, Tensor, Tensor]
"""x [n, d_in], target [n, d_out] and positions [n]."""


def _pair(site_in: Site, site_out: Site) -> Pair:
    # The gain is folded into weights that read before it (`through_gain`).
    return canonical(replace(site_in, before_gain=False)), canonical(site_out)


def _collect(
    hooks: Hooks, sample: Sample, pairs: Iterable[Pair], cancel: CancelToken
) -> dict[Pair, Activations]:
    """What the model has at these sites on the sample, on the device."""
    pairs = set(pairs)
    probe = Probe({site for pair in pairs for site in pair})
    per_batch = max(1, _BATCH_TOKENS // max(map(len, sample.rows)))
    positions: list[Tensor] = []
    found: dict[Site, list[Tensor]] = {}
    for start in range(0, len(sample.rows), per_batch):
        rows = [Row(ids) for ids in sample.rows[start : start + per_batch]]
        hooks.look(rows, probe, cancel)
        for number, row in enumerate(rows):
            length = len(row.token_ids)
            positions.append(torch.arange(length))
            for site, values in probe.seen.items():
                found.setdefault(site, []).append(values[number, :length])
    of_site = {site: torch.cat(parts) for site, parts in found.items()}
    where = torch.cat(positions).to(next(iter(of_site.values())).device)
    return {pair: (of_site[pair[0]], of_site[pair[1]], where) for pair in pairs}


def _exists(site: Site, architecture: Architecture) -> bool:
    """Whether a site is one of its own: without a post-norm there is no place before it."""
    layer = architecture.layers[site.layer]
    match site.point:
        case Point.ATTN_OUT:
            return not site.before_post_norm or layer.attn_post_norm is not None
        case Point.MLP_OUT:
            return not site.before_post_norm or layer.mlp_post_norm is not None
    return True


def _try_elsewhere(
    failed: Registered,
    hooks: Hooks,
    architecture: Architecture,
    sample: Sample,
    cancel: CancelToken,
) -> list[Trial]:
    """What the same weights do at other sites."""
    pairs = [
        pair
        for pair in self_test.candidates(failed.header, widths_of(architecture))
        if all(_exists(site, architecture) for site in pair)
    ]
    activations = _collect(hooks, sample, {_pair(*pair) for pair in pairs}, cancel)
    trials = []
    for pair in pairs:
        x, target, positions = activations[_pair(*pair)]
        dictionary = failed.at(*pair).load().to(x.device, x.dtype)
        measured = self_test.measure(dictionary, x, target, sample.name, positions)
        trials.append(Trial(*pair, measured))
    return trials


class _Samples:
    """Which sample each dictionary is tested on."""

    def __init__(
        self,
        architecture: Architecture,
        vocabulary: Vocabulary,
        generate: Callable[[int, int], Rows],
    ) -> None:
        self._length = min(ROW_TOKENS, architecture.context)
        self._vocabulary = vocabulary
        self._generate = generate
        self._read: dict[Path | None, Sample] = {}

    def of(self, registered: Iterable[Registered]) -> dict[Sample, list[Registered]]:
        found: dict[Sample, list[Registered]] = {}
        for each in registered:
            path = each.header.declared.sample_file
            if path not in self._read:
                self._read[path] = self._sample(path)
            found.setdefault(self._read[path], []).append(each)
        return found

    def _sample(self, path: Path | None) -> Sample:
        if self._vocabulary.facts is None:
            length = min(OWN_ROW_TOKENS, self._length)
            rows = self._generate(-(-TOKENS // length), length)
            return Sample("sequences sampled from the model", rows)
        file = path or SAMPLE
        text = file.read_text(encoding="utf-8")
        return Sample(path.name if path else SAMPLE_NAME, self._rows(text))

    def _rows(self, text: str) -> Rows:
        """The text in rows, each opening as the tokenizer opens a prompt."""
        facts = self._vocabulary.facts
        assert facts is not None
        paragraphs = [f"{each}\n\n" for each in text.split("\n\n") if each.strip()]
        ids = tuple(
            token
            for paragraph in paragraphs
            for token in self._vocabulary.encode(paragraph, prepend_bos=False)
        )[:TOKENS]
        opening = (facts.bos_id,) if facts.prepends_bos and facts.bos_id is not None else ()
        step = max(1, self._length - len(opening))
        return tuple((*opening, *ids[start : start + step]) for start in range(0, len(ids), step))
