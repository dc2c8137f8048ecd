"""Reading points out of request messages, and refusing more than an answer holds."""

from collections.abc import Iterable, Sequence

from google.protobuf.internal.containers import RepeatedScalarFieldContainer
from tdb.inference.v1 import run_pb2

from services.common.errors import InvalidArgument, inside
from services.inference.engine import activations, lens, points
from services.inference.engine.asked import ReadPoints
from services.inference.engine.model import Model
from services.inference.engine.points import Point

MAX_TENSOR_BYTES = 2**20
MAX_STREAM_BYTES = 2**30


def of_run(request: run_pb2.RunRequest, model: Model, tokens: int) -> ReadPoints:
    """The points of a RunRequest on a prompt of `tokens` tokens; made canonical in place."""
    read = ReadPoints(
        _lens(request, model), _points(request.activations, "activations", model, tokens)
    )
    left = MAX_TENSOR_BYTES
    for number, point in enumerate(read.activations):
        left -= activations.size(point, model.architecture, tokens)
        if left < 0:
            with inside(f"activations[{number}]"):
                raise InvalidArgument(
                    f"with {point} the activations come to more than "
                    f"{MAX_TENSOR_BYTES // 2**20} MiB ({_shown(point, model, tokens)}); "
                    "StreamActivations sends them in pieces",
                    reason="TOO_LARGE",
                )
    return read


def of_stream(
    request: run_pb2.StreamActivationsRequest, model: Model, tokens: int
) -> tuple[Point, ...]:
    """The points of a StreamActivationsRequest; made canonical in place."""
    if not request.points:
        raise InvalidArgument(
            "at least one point is required, for example mlp_act.0", field="points"
        )
    wanted = _points(request.points, "points", model, tokens)
    total = size(wanted, model, tokens)
    if total > MAX_STREAM_BYTES:
        raise InvalidArgument(
            f"the activations come to {total:,} bytes; one call sends at most "
            f"{MAX_STREAM_BYTES:,}: ask for fewer points at a time",
            field="points",
            reason="TOO_LARGE",
        )
    return wanted


def size(wanted: Iterable[Point], model: Model, tokens: int) -> int:
    """Bytes of the points' activations on a prompt of `tokens` tokens."""
    return sum(activations.size(point, model.architecture, tokens) for point in wanted)


def _lens(request: run_pb2.RunRequest, model: Model) -> tuple[Point, ...]:
    if not request.HasField("logit_lens"):
        return ()
    names = request.logit_lens.points
    if not names:
        names.extend(map(str, lens.default_points(model.architecture)))
    with inside("logit_lens"):
        wanted = _points(names, "points", model, None)
        for number, point in enumerate(wanted):
            if point.name not in points.RESIDUAL:
                raise InvalidArgument(
                    f"{point} is not the residual stream; the logit lens reads embed, "
                    "resid_pre.L, resid_mid.L and resid_post.L",
                    field=f"points[{number}]",
                )
    in_order = tuple(sorted(wanted, key=_place))
    _write(names, in_order)
    return in_order


def _place(point: Point) -> tuple[int, bool]:
    """Where a point of the residual stream stands in the order of the model."""
    return (-1 if point.layer is None else point.layer, point.name == "resid_post")


def _points(
    names: "RepeatedScalarFieldContainer[str]", field: str, model: Model, tokens: int | None
) -> tuple[Point, ...]:
    found: list[Point] = []
    for number, name in enumerate(names):
        with inside(f"{field}[{number}]"):
            point = points.parse(name, model.architecture, model.shelf.shapes)
            if point in found:
                raise InvalidArgument(f"{point} is listed twice; name it once")
        found.append(point)
    _write(names, found)
    return tuple(found)


def _write(names: "RepeatedScalarFieldContainer[str]", wanted: Iterable[Point]) -> None:
    texts = [str(point) for point in wanted]
    del names[:]
    names.extend(texts)


def _shown(point: Point, model: Model, tokens: int) -> str:
    shape: Sequence[int] = points.shape(point, model.architecture, tokens)
    return f"{point} alone is {' x '.join(map(str, shape))} numbers"
