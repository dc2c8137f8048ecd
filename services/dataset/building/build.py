"""One build, from its request to the dataset, and on from wherever it was stopped.

    harvest   segment by segment: sequences of the corpus to the inference service, the state that
              comes back merged into what was gathered before, group by group; then a checkpoint
    write     group by group: the state read, its records written as shards

Segments are cut where the plan says, merged in their order, and records depend on nothing else, so
a build that was stopped ends with the same bytes as one that was not. In memory is one segment's
sequences, and of states at most three of one group.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path

from tdb.dataset.v1 import build_pb2, dataset_pb2
from tdb.inference.v1 import harvest_pb2, manifest_pb2

from services.common.errors import FailedPrecondition, Unavailable
from services.common.harvest import state as states
from services.common.harvest.state import State
from services.dataset import manifest, room
from services.dataset.building import asked, output_tokens, record_maker, sequences
from services.dataset.building.array_file import Array
from services.dataset.building.corpora import Corpus
from services.dataset.building.inference import LONGEST_PAUSE_S, Inference, Stop
from services.dataset.building.output_tokens import OutputTokens
from services.dataset.building.plan import Components, Plan
from services.dataset.building.progress import Progress
from services.dataset.building.sequences import CorpusSequence
from services.dataset.building.work_folder import (
    PLAN,
    Checkpoint,
    StoredSequences,
    WorkFolder,
    cannot_write,
)
from services.dataset.store import DatasetWriter

CHANGED = "CHANGED"
"""Reason of the refusal to go on with another model or corpus."""
SHARD_RECORDS = 4096
SEGMENT_SEQUENCES = 65_536
"""The most that one harvest takes."""


class Build:
    def __init__(
        self,
        request: build_pb2.BuildDatasetRequest,
        folder: WorkFolder,
        corpora: Path,
        inference: Inference,
        progress: Progress,
        stop: Stop,
        most_bytes: int,
    ) -> None:
        """`request` is canonical; `folder` is held; `corpora` is where files are; all datasets have
        `most_bytes`."""
        self._request = request
        self._folder = folder
        self._corpus: Corpus = asked.corpus(request, corpora)
        self._inference = inference
        self._progress = progress
        self._stop = stop
        self._most_bytes = most_bytes

    def run(self) -> None:
        """Raises TdbError; Cancelled when told to stop."""
        if not (self._folder.dataset / manifest.NAME).exists():
            plan = self._plan()
            while not (checkpoint := self._folder.checkpoint()).is_complete:
                self._harvest(plan, checkpoint)
            self._write(plan, checkpoint)
        self._folder.remove()

    def _plan(self) -> Plan:
        """What it is of, the same as before where it was begun before."""
        model = self._inference.model(self._request.model)
        plan = asked.plan(self._request, model, self._corpus)
        path = self._folder.path / PLAN
        if not path.exists():
            self._check_room(plan, plan.disk_bytes)
            plan.write(path)
        elif path.read_bytes() != plan.content():
            raise FailedPrecondition(
                f"the dataset {self._request.dataset!r} was begun with another model, dictionary, "
                "tokenizer or corpus than there is now: bring that back, or delete what is built",
                reason=CHANGED,
            )
        else:
            self._check_room(plan, plan.state_bytes)
        return plan

    def _check_room(self, plan: Plan, needed: int) -> None:
        """`needed` bytes are still to be written."""
        folder = self._folder.dataset
        remedy = ", or ask for fewer groups or examples, or shorter sequences"
        room.check_cap(folder, plan.disk_bytes, self._most_bytes)
        try:
            room.check_disk(folder, needed, "the build needs up to", remedy)
        except OSError as error:
            raise cannot_write(folder, error) from None

    def _harvest(self, plan: Plan, begun: Checkpoint) -> None:
        """All segments from a checkpoint on; fewer where the corpus is away for a while."""
        self._progress.begin("harvesting", "tokens", begun.tokens, plan.tokens, plan.model)
        try:
            with closing(self._corpus.documents()) as documents:
                found = sequences.cut(
                    documents,
                    lambda texts: self._inference.tokenize(plan.model, texts),
                    plan.sequence_length,
                    plan.bos,
                    begun.position,
                    begun.sequences,
                )
                current = begun
                for segment in _segments(found, plan, begun.tokens):
                    self._stop.check()
                    current = self._add(plan, current, segment)
        except Unavailable as away:
            self._progress.waiting(away.message)
            self._stop.wait(away.retry_after_s or LONGEST_PAUSE_S)
            return
        if not current.tokens:
            raise FailedPrecondition(f"the corpus {plan.corpus} has no text", field="corpus")
        self._folder.advance(replace(current, is_complete=True))

    def _add(self, plan: Plan, before: Checkpoint, segment: Sequence[CorpusSequence]) -> Checkpoint:
        """Harvests a segment and makes it count."""
        number = before.segments + 1
        self._folder.write_sequences(number, segment)
        request = harvest_pb2.HarvestRequest(
            model=plan.model,
            groups=[each.name for each in plan.components],
            top_k=plan.keep.top,
            random=plan.keep.random,
            strata=plan.keep.strata,
            per_stratum=plan.keep.per_stratum,
            seed=plan.keep.seed,
            tokens=_summed(plan, self._folder.sequences(1)),
        )

        def take(state: State) -> None:
            self._stop.check()
            if before.segments:
                state = states.merge(self._folder.state(before.segments, state.group), state)
            self._folder.write_state(number, state)

        summary = self._inference.harvest(
            request,
            segment,
            plan.keep,
            lambda done: self._progress.at(before.tokens + done),
            take,
        )
        _check_same(plan, summary.manifest)
        tokens = sum(len(each.ids) for each in segment)
        after = Checkpoint(
            segments=number,
            sequences=before.sequences + len(segment),
            tokens=before.tokens + tokens,
            position=segment[-1].end,
            digest=_digest(before.digest, segment),
        )
        self._folder.advance(after)
        self._progress.at(after.tokens)
        return after

    def _write(self, plan: Plan, checkpoint: Checkpoint) -> None:
        total = sum(each.count for each in plan.components)
        self._progress.begin("writing", "components", 0, total, plan.model)
        lookup = _Lookup(
            [self._folder.sequences(number) for number in range(1, checkpoint.segments + 1)]
        )
        header = _header(plan, checkpoint)
        of = {"digest": checkpoint.digest, "output_tokens": output_tokens.COUNT}
        with DatasetWriter(self._folder.dataset, header, of) as writer:
            done = 0
            for components in plan.components:
                state: State | None = None
                for part, start in enumerate(range(0, components.count, SHARD_RECORDS)):
                    self._stop.check()
                    stop = min(start + SHARD_RECORDS, components.count)
                    if not writer.has(components.group, part):
                        if state is None:
                            state = self._folder.state(checkpoint.segments, components.name)
                        output = self._output(plan, components, start, stop)
                        made = record_maker.records(
                            state, output, plan.quantiles, lookup, start, stop
                        )
                        writer.write(components.group, part, self._counted(made, done))
                    done += stop - start
                    self._progress.at(done)
            writer.finish(self._texts(plan))

    def _output(
        self, plan: Plan, components: Components, start: int, stop: int
    ) -> OutputTokens | None:
        """What components promote and suppress; heads write no direction of their own."""
        if components.is_of_heads:
            return None
        found, ran = self._inference.output_tokens(
            plan.model, components.name, start, stop - start, output_tokens.COUNT
        )
        _check_same(plan, ran)
        return found

    def _counted(
        self, records: Iterable[record_maker.Record], done: int
    ) -> Iterator[record_maker.Record]:
        for number, record in enumerate(records, done + 1):
            yield record
            self._stop.check()
            self._progress.at(number)

    def _texts(self, plan: Plan) -> list[str]:
        """Of each token id."""
        context = self._inference.model(plan.model).dimensions.context
        found: list[str] = []
        for start in range(0, plan.vocabulary, context):
            stop = min(start + context, plan.vocabulary)
            found += self._inference.texts(plan.model, range(start, stop))
        return found


class _Lookup:
    """The sequences of all segments, by index."""

    def __init__(self, segments: Sequence[StoredSequences]) -> None:
        self._segments = segments

    def __call__(self, index: int) -> tuple[Array, str, int]:
        low, high = 0, len(self._segments)
        while high - low > 1:
            middle = (low + high) // 2
            if self._segments[middle].first <= index:
                low = middle
            else:
                high = middle
        return self._segments[low][index]


def _segments(
    found: Iterable[CorpusSequence], plan: Plan, tokens: int
) -> Iterator[list[CorpusSequence]]:
    """Sequences by segment, until the plan's tokens are reached; `tokens` are there already."""
    segment: list[CorpusSequence] = []
    size = 0
    least = 1 + (plan.bos is not None)
    for each in found:
        room = plan.tokens - tokens - size
        if room < least:
            break
        if len(each.ids) > room:
            each = replace(each, ids=each.ids[:room])
        if segment and (
            size + len(each.ids) > plan.segment_tokens or len(segment) == SEGMENT_SEQUENCES
        ):
            yield segment
            tokens += size
            segment, size = [], 0
        segment.append(each)
        size += len(each.ids)
    if segment:
        yield segment


def _summed(plan: Plan, first: StoredSequences) -> list[int]:
    """The tokens whose mean activation is known: the most frequent of the first segment."""
    indices = range(first.first, first.first + len(first))
    counts = Counter(chain.from_iterable(first[index][0].tolist() for index in indices))
    ordered = sorted(counts, key=lambda token: (-counts[token], token))
    return sorted(ordered[: plan.summed_tokens])


def _digest(before: str, segment: Sequence[CorpusSequence]) -> str:
    digest = hashlib.sha256(before.encode())
    for each in segment:
        digest.update(f"{each.document_id}\0{each.offset}\0{each.ids}\n".encode())
    return digest.hexdigest()


def _check_same(plan: Plan, ran: manifest_pb2.Manifest) -> None:
    """Whether the plan's model ran: the service may have been restarted with another."""
    found = {each.id: each.weights_hash for each in ran.dictionaries}
    other = any(found.get(name, hash) != hash for name, hash in plan.dictionaries)
    if ran.model.weights_hash != plan.weights_hash or other:
        raise FailedPrecondition(
            f"the inference service serves other weights as {plan.model!r} now than when the build "
            "was begun: bring those back, or delete what is built",
            reason=CHANGED,
        )


def _header(plan: Plan, checkpoint: Checkpoint) -> dataset_pb2.DatasetHeader:
    return dataset_pb2.DatasetHeader(
        source=dataset_pb2.SOURCE_BUILT,
        model=dataset_pb2.RecordedModel(
            id=plan.model,
            weights_hash=plan.weights_hash,
            tokenizer_hash=plan.tokenizer_hash,
            dictionaries=[
                dataset_pb2.RecordedDictionary(id=id, weights_hash=hash)
                for id, hash in plan.dictionaries
            ],
        ),
        corpus=dataset_pb2.Corpus(
            name=plan.corpus,
            revision=checkpoint.digest,
            tokens=checkpoint.tokens,
            sequence_length=plan.sequence_length,
        ),
        notes=[
            f"Sequences are drawn with seed {plan.seed}. Mean activations by token are those of "
            "the tokens that are most frequent at the beginning of the corpus.",
        ],
    )
