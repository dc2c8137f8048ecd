"""Reading baselines out of request messages."""

from itertools import pairwise

from tdb.inference.v1 import attribute_pb2

from services.common.errors import InvalidArgument, inside
from services.inference import request_interventions
from services.inference.engine.baselines import Baseline, Reference
from services.inference.engine.interventions import Mean, Patch
from services.inference.engine.model import Model
from services.inference.engine.resolution import resolve


def baseline(
    message: attribute_pb2.Baseline, model: Model, tokens: int, whole_table: bool
) -> Baseline | None:
    """What effects in a run of `tokens` tokens are measured from; None: 0. Made canonical in place.

    `whole_table`: every node of the run must have an x0, not only those that are named.
    """
    match message.WhichOneof("kind"):
        case "zero":
            return None
        case "mean":
            with inside("mean"):
                mean = request_interventions.mean(message.mean, model)
                return Baseline(mean, _of_mean(mean, tokens) if whole_table else None)
        case "run":
            with inside("run"):
                patch = request_interventions.patch(message.run, model)
                return Baseline(patch, _of_patch(patch, model, tokens) if whole_table else None)
        case _:
            raise InvalidArgument(
                "one of zero, mean or run is required", field="kind", reason="REQUIRED"
            )


def _of_mean(mean: Mean, tokens: int) -> Reference:
    if not mean.per_position:
        raise InvalidArgument(
            "the table lists pairs of tokens, which have a mean at their own positions only; set "
            "per_position, or verify named components",
            field="per_position",
        )
    lengths = sorted({len(source.token_ids) for source in mean.prompts})
    if len(lengths) > 1 or lengths[0] < tokens:
        raise InvalidArgument(
            f"the run has {tokens} tokens and the reference prompts "
            f"{', '.join(map(str, lengths))}; all must have one count, at least the run's",
            field="prompts",
        )
    runs = tuple((source.token_ids, ()) for source in mean.prompts)
    return Reference(runs, tuple(range(tokens)))


def _of_patch(patch: Patch, model: Model, tokens: int) -> Reference:
    source = patch.source
    count = len(source.token_ids)
    if patch.alignment is None and count != tokens:
        raise InvalidArgument(
            f"the run has {tokens} tokens and the source {count}; say which of its tokens stands "
            "for which",
            field="alignment",
        )
    aligned = _alignment(patch, tokens, count)
    shape, widths = model.shape, model.architecture.widths
    with inside("source.interventions"):
        edits = resolve(source.interventions, shape, widths, count)
    return Reference(((source.token_ids, edits),), aligned)


def _alignment(patch: Patch, tokens: int, source: int) -> tuple[int, ...]:
    """The position in the source of every position here."""
    if patch.alignment is None:
        return tuple(range(tokens))
    places: dict[int, int] = {}
    for number, (to, origin) in enumerate(patch.alignment):
        with inside(f"alignment[{number}]"):
            for name, position, length in (("to", to, tokens), ("source", origin, source)):
                if not 0 <= position < length:
                    raise InvalidArgument(
                        f"position {position} does not exist; valid is 0..{length - 1}", field=name
                    )
            if to in places:
                raise InvalidArgument(f"position {to} is aligned twice", field="to")
        places[to] = origin
    missing = [position for position in range(tokens) if position not in places]
    if missing:
        raise InvalidArgument(
            f"position {missing[0]} stands for no token of the source, so its nodes have no "
            "baseline; align every token, or verify named nodes",
            field="alignment",
        )
    aligned = tuple(places[position] for position in range(tokens))
    for position, (before, after) in enumerate(pairwise(aligned)):
        if after < before:
            raise InvalidArgument(
                f"positions {position} and {position + 1} stand for {before} and {after}; a table "
                "has pairs of tokens, so their order must stay",
                field="alignment",
            )
    return aligned
