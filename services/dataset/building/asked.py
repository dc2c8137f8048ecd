"""What a BuildDatasetRequest asks for, held against the model: from request to plan."""

from collections.abc import Iterator
from pathlib import Path

from tdb.dataset.v1 import build_pb2
from tdb.inference.v1 import model_pb2

from services.common.addresses import Kind
from services.common.errors import FailedPrecondition, InvalidArgument, inside
from services.common.harvest import reading
from services.dataset import groups, library, records
from services.dataset.building.corpora import Corpus, DemoCorpus, FilesCorpus
from services.dataset.building.hub import HubCorpus
from services.dataset.building.plan import Components, Plan
from services.dataset.groups import Group

MAX_GROUPS = 1_000
MAX_TOKENS = 10**12
DEFAULT_LENGTH, DEFAULT_SEGMENT = 128, 65_536
DEFAULT_TOP, DEFAULT_RANDOM, DEFAULT_QUANTILES = 20, 10, 4
DEFAULT_GROUPS = (Kind.NEURON.value, Kind.HEAD.value)
_KINDS = tuple(kind.value for kind in (Kind.NEURON, Kind.HEAD, Kind.LATENT))


def canonical(request: build_pb2.BuildDatasetRequest) -> build_pb2.BuildDatasetRequest:
    """The request with every default written down, but what depends on the model.

    Raises InvalidArgument."""
    found = build_pb2.BuildDatasetRequest()
    found.CopyFrom(request)
    with inside("dataset"):
        library.check_name(request.dataset)
    if request.corpus.WhichOneof("source") is None:
        raise InvalidArgument(
            "one of files, demo or hub is required", field="corpus.source", reason="REQUIRED"
        )
    given = {field.name for field, _ in request.ListFields()}
    for field, least, most, default in (
        ("tokens", 1, MAX_TOKENS, None),
        ("sequence_length", 2, 2**20, None),
        ("top_k", 1, 1_000, DEFAULT_TOP),
        ("random", 0, 1_000, DEFAULT_RANDOM),
        ("quantiles", 0, 16, DEFAULT_QUANTILES),
        ("segment_tokens", 1, 262_144, DEFAULT_SEGMENT),
    ):
        if field != "tokens" and field not in given:
            if default is not None:
                setattr(found, field, default)
        elif not least <= getattr(request, field) <= most:
            raise InvalidArgument(f"must be in {least}..{most}", field=field)
    if not request.HasField("seed"):
        found.seed = 0
    if len(request.groups) > MAX_GROUPS:
        raise InvalidArgument(f"at most {MAX_GROUPS} fit in one call", field="groups")
    for number, text in enumerate(request.groups):
        with inside(f"groups[{number}]"):
            if text not in _KINDS:
                groups.parse(text)
    if not request.groups:
        found.groups.extend(DEFAULT_GROUPS)
    return found


def corpus(request: build_pb2.BuildDatasetRequest, corpora: Path) -> Corpus:
    """Raises InvalidArgument."""
    with inside("corpus"):
        match request.corpus.WhichOneof("source"):
            case "files":
                with inside("files"):
                    return FilesCorpus(corpora, request.corpus.files)
            case "hub":
                with inside("hub"):
                    return HubCorpus(request.corpus.hub)
    return DemoCorpus(request.corpus.demo)


def plan(
    request: build_pb2.BuildDatasetRequest, model: model_pb2.GetModelResponse, source: Corpus
) -> Plan:
    """`request` is canonical. Raises InvalidArgument, FailedPrecondition, NotFound."""
    if not model.HasField("tokenizer"):
        raise FailedPrecondition(
            "the model is served without a tokenizer, so no text can be read: start the inference "
            "service with --tokenizer",
            reason="NO_TOKENIZER",
        )
    _check_hash("weights", request.weights_hash, model.model.weights_hash)
    _check_hash("tokenizer", request.tokenizer_hash, model.tokenizer.hash)
    length = _length(request, model)
    components = tuple(_components(request, model, length))
    bos = model.tokenizer.bos_id if model.tokenizer.prepends_bos else None
    dictionaries = {each.id: each.weights_hash for each in model.dictionaries}
    names = sorted({each.group.dictionary for each in components if each.group.dictionary})
    found = Plan(
        model=model.model.id,
        weights_hash=model.model.weights_hash,
        tokenizer_hash=model.tokenizer.hash,
        dictionaries=tuple((name, dictionaries[name]) for name in names),
        components=components,
        vocabulary=model.tokenizer.vocabulary,
        bos=bos,
        sequence_length=length,
        tokens=request.tokens,
        segment_tokens=max(length, request.segment_tokens),
        top_k=request.top_k,
        random=request.random,
        quantiles=request.quantiles,
        seed=request.seed,
        corpus=source.name,
        corpus_identity=source.identity(),
    )
    _check_size(found)
    return found


def _check_hash(what: str, wanted: str, found: str) -> None:
    if wanted and wanted != found:
        raise FailedPrecondition(
            f"the {what} of the model that is served are not those that are asked for: their hash "
            f"is {found or 'unknown'}, not {wanted}"
            if what == "weights"
            else f"the tokenizer of the model that is served is another than is asked for: its "
            f"hash is {found or 'unknown'}, not {wanted}",
            field=f"{what}_hash",
            reason="OTHER_MODEL",
        )


def _length(request: build_pb2.BuildDatasetRequest, model: model_pb2.GetModelResponse) -> int:
    context = model.dimensions.context
    if not request.HasField("sequence_length"):
        return min(DEFAULT_LENGTH, context)
    if request.sequence_length > context:
        raise InvalidArgument(f"the model reads at most {context} tokens", field="sequence_length")
    return request.sequence_length


def _components(
    request: build_pb2.BuildDatasetRequest, model: model_pb2.GetModelResponse, length: int
) -> Iterator[Components]:
    wanted: dict[Group, None] = {}
    for number, text in enumerate(request.groups):
        with inside(f"groups[{number}]"):
            for group in _named(text, model):
                if group in wanted:
                    raise InvalidArgument(f"{group} is named twice")
                wanted[group] = None
    latents = {each.id: each.latents for each in model.dictionaries}
    sizes = model.dimensions
    for group in sorted(wanted, key=lambda each: each.order):
        match group.kind:
            case Kind.NEURON:
                yield Components(str(group), sizes.neurons, length)
            case Kind.HEAD:
                yield Components(str(group), sizes.heads, reading.pairs(length, None))
            case _:
                yield Components(str(group), latents[group.dictionary], length)


def _named(text: str, model: model_pb2.GetModelResponse) -> Iterator[Group]:
    layers = model.dimensions.layers
    ids = [each.id for each in model.dictionaries]
    if text == Kind.LATENT:
        if not ids:
            raise FailedPrecondition("no dictionary is served with the model")
        yield from (Group(Kind.LATENT, dictionary=each) for each in ids)
    elif text in _KINDS:
        yield from (Group(Kind(text), layer) for layer in range(layers))
    else:
        group = groups.parse(text)
        if group.dictionary and group.dictionary not in ids:
            there = ", ".join(ids) or "none"
            raise InvalidArgument(f"no dictionary {group.dictionary!r} is served; served: {there}")
        if not group.dictionary and group.layer >= layers:
            raise InvalidArgument(f"{text}: the model has layers 0..{layers - 1}")
        yield group


def _check_size(found: Plan) -> None:
    """Whether every record fits into one message."""
    tokens = found.examples * found.sequence_length
    largest = max(each.places_per_sequence for each in found.components)
    size = found.examples * (4 * largest + 5 * found.sequence_length + 300)
    if tokens > records.MAX_RECORD_TOKENS or size > records.MAX_RECORD_BYTES:
        raise InvalidArgument(
            f"a record of {found.examples} examples of {found.sequence_length} tokens has "
            f"up to {size / 2**20:.0f} MiB, and one message holds "
            f"{records.MAX_RECORD_BYTES >> 20}: ask for shorter sequences or fewer examples",
            field="sequence_length",
        )
