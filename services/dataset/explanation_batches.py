"""Batches of a stream of explanations; a cursor is the byte of the file where the next begins."""

from collections.abc import Iterator

from tdb.dataset.v1 import explanations_pb2

from services.common.errors import FailedPrecondition
from services.dataset import cursors
from services.dataset.explanations import Explanation
from services.dataset.reader import DatasetReader

BATCH_EXPLANATIONS = 500
MOST_BYTES = 512 * 1024


def of(
    reader: DatasetReader, request: explanations_pb2.StreamExplanationsRequest
) -> Iterator[explanations_pb2.ExplanationBatch]:
    """Raises InvalidArgument, FailedPrecondition; Damaged, once they are asked for."""
    if reader.unexplained:
        raise FailedPrecondition(reader.unexplained, field="dataset", reason="NOT_HERE")
    stored = reader.manifest.explanations
    question = cursors.question_hash(b"StreamExplanations", request.dataset.encode())
    start = 0
    if request.cursor:
        last = stored.bytes if stored else 0
        start = cursors.read(request.cursor, question, reader.manifest.hash, last)
    return _batches(reader, start, question)


def _batches(
    reader: DatasetReader, start: int, question: bytes
) -> Iterator[explanations_pb2.ExplanationBatch]:
    batch, size = explanations_pb2.ExplanationBatch(), 0
    for explanation, end in reader.explanations(start):
        batch.explanations.append(_message(explanation))
        size += batch.explanations[-1].ByteSize()
        if len(batch.explanations) == BATCH_EXPLANATIONS or size >= MOST_BYTES:
            batch.cursor = cursors.write(question, reader.manifest.hash, end)
            yield batch
            batch, size = explanations_pb2.ExplanationBatch(), 0
    if batch.explanations:
        batch.cursor = cursors.write(question, reader.manifest.hash, end)
        yield batch


def _message(explanation: Explanation) -> explanations_pb2.SourceExplanation:
    stated = {name: value for name, value in vars(explanation).items() if name != "scores"}
    scores = [
        explanations_pb2.SourceScore(name=name, value=value)
        for name, value in explanation.scores.items()
    ]
    return explanations_pb2.SourceExplanation(**stated, scores=scores)
