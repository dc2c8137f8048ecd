"""The demo's dataset: built once in the background, kept while the model stays the same."""

import logging
import shutil
from pathlib import Path

from tdb.dataset.v1 import build_pb2, dataset_pb2
from tdb.inference.v1 import model_pb2

from services.common.addresses import Kind
from services.dataset.manifest import Manifest, ManifestError

NAME = "demo"
TOKENS = 65_536
SEQUENCE_LENGTH = 64
SEGMENT_TOKENS = 16_384
TOP, RANDOM = 12, 6
GROUPS: tuple[str, ...] = (Kind.NEURON, Kind.HEAD, Kind.LATENT)

_log = logging.getLogger("tdb.dataset")


def request() -> build_pb2.BuildDatasetRequest:
    """Everything that the demo's model has."""
    return build_pb2.BuildDatasetRequest(
        dataset=NAME,
        corpus=build_pb2.CorpusSource(demo=build_pb2.DemoCorpus()),
        tokens=TOKENS,
        sequence_length=SEQUENCE_LENGTH,
        groups=GROUPS,
        top_k=TOP,
        random=RANDOM,
        segment_tokens=SEGMENT_TOKENS,
    )


def is_wanted(dataset: Path, model: model_pb2.GetModelResponse) -> bool:
    """Whether it is to be built. One of another model is deleted first; a dataset of that name
    which is no demo's stays."""
    try:
        header = Manifest.read(dataset).header
    except FileNotFoundError:
        return True
    except ManifestError as damaged:
        _log.warning(f"the dataset {NAME!r} cannot be served: {damaged}; delete it to have it anew")
        return False
    is_ours = header.source == dataset_pb2.SOURCE_BUILT and header.corpus.name.startswith("demo ")
    recorded = (header.model.weights_hash, header.model.tokenizer_hash)
    served = {each.id: each.weights_hash for each in model.dictionaries}
    is_same = recorded == (model.model.weights_hash, model.tokenizer.hash) and served == {
        each.id: each.weights_hash for each in header.model.dictionaries
    }
    if is_same or not is_ours:
        return False
    _log.warning(f"the dataset {NAME!r} is of another model and is built anew")
    shutil.rmtree(dataset)
    return True
