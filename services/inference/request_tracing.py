"""Reading traced nodes out of request messages: which value of which node, through which input."""

from collections.abc import Callable

from tdb.inference.v1 import objective_pb2

from services.common import addresses
from services.common.addresses import Address, Kind
from services.common.errors import InvalidArgument, inside
from services.inference.engine.bound import Place
from services.inference.engine.dictionaries.sites import Point
from services.inference.engine.model import Model
from services.inference.engine.objectives import Objective
from services.inference.engine.traced_latents import TracedLatent
from services.inference.engine.tracing import Branch, Side, TracedNeuron, TracedScore, TracedValue

PRE = objective_pb2.ACTIVATION_SIDE_PRE
POST = objective_pb2.ACTIVATION_SIDE_POST
VALUE = objective_pb2.THROUGH_VALUE

_SIDES = {
    objective_pb2.THROUGH_QUERY: Side.QUERY,
    objective_pb2.THROUGH_KEY: Side.KEY,
    objective_pb2.THROUGH_QUERY_KEY: Side.BOTH,
}
_BRANCHES = {objective_pb2.THROUGH_GATE: Branch.GATE, objective_pb2.THROUGH_UP: Branch.UP}

ReadObjective = Callable[[objective_pb2.Objective, Model, int], Objective]


def traced_node(
    message: objective_pb2.TracedNode, model: Model, tokens: int, read: ReadObjective
) -> Objective:
    """A node's own value; made canonical in place. `read` reads the downstream objective."""
    with inside("node"):
        node = addresses.parse(message.node)
        model.shape.check(node, tokens)
    message.node = str(node)
    if message.HasField("downstream") and message.through != VALUE:
        raise InvalidArgument(
            "downstream says what a write is measured on, so it goes with THROUGH_VALUE only",
            field="downstream",
        )
    match node.kind:
        case Kind.NEURON:
            return _neuron(message, node, model)
        case Kind.HEAD:
            return _head(message, node, model, tokens, read)
        case Kind.LATENT:
            return _latent(message, node, model)
        case _:
            raise InvalidArgument(
                f"{node} has no value that can be traced; name a neuron, a latent or a head's pair "
                "at a token, for example neuron.3.17~5, latent.mine.7~5 or head.2.3~13-1",
                field="node",
            )


def _check_token(node: Address) -> None:
    if not node.is_node:
        raise InvalidArgument(
            f"{node} has a value at every token; name one, for example {node}~0", field="node"
        )


def _latent(message: objective_pb2.TracedNode, node: Address, model: Model) -> Objective:
    _check_token(node)
    if message.through:
        raise InvalidArgument(
            f"{node} is a latent: it has one input, the site that {node.dictionary} reads; leave "
            "through unset",
            field="through",
        )
    place = Place(model.shelf.served[node.dictionary].header, model.architecture)
    if place.site_in.point is Point.RESID_PRE:
        # It is encoded before any edit of the embedding: nothing that can be named moves it.
        raise InvalidArgument(
            f"{node} reads the embedding, and nothing is upstream of that", field="node"
        )
    message.side = message.side or PRE
    return TracedLatent(node, place, post=message.side == POST)


def _neuron(message: objective_pb2.TracedNode, node: Address, model: Model) -> Objective:
    _check_token(node)
    layer = model.architecture.layers[node.layer or 0]
    message.side = message.side or PRE
    if message.through and message.through not in _BRANCHES:
        raise InvalidArgument(
            f"{node} is a neuron: {_name(message.through)} is for heads"
            + ("; THROUGH_GATE or THROUGH_UP names its branch" if layer.gated else ""),
            field="through",
        )
    if message.through and not layer.gated:
        raise InvalidArgument(
            f"{node} is not gated: it has one input, so leave through unset", field="through"
        )
    if message.side == POST:
        if message.through:
            raise InvalidArgument(
                "both branches are live after the non-linearity; leave through unset",
                field="through",
            )
        return TracedNeuron(node, None)
    if layer.gated:
        message.through = message.through or objective_pb2.THROUGH_GATE
    return TracedNeuron(node, _BRANCHES.get(message.through, Branch.GATE))


def _head(
    message: objective_pb2.TracedNode, node: Address, model: Model, tokens: int, read: ReadObjective
) -> Objective:
    if node.key is None:
        at = node.position or 0
        raise InvalidArgument(
            f"{node} has no single score: a query reads many keys; name one pair, for example "
            f"{node.component}~{at}-{at}",
            field="node",
        )
    if message.through == VALUE:
        if message.side:
            raise InvalidArgument(
                "a value has no non-linearity, so it has no sides; leave side unset", field="side"
            )
        return TracedValue(node, _downstream(message, model, tokens, read))
    if message.through not in _SIDES:
        given = f", not {_name(message.through)}" if message.through else ""
        raise InvalidArgument(
            f"{node} is traced through one of its inputs: THROUGH_QUERY, THROUGH_KEY, "
            f"THROUGH_QUERY_KEY or THROUGH_VALUE{given}",
            field="through",
        )
    message.side = message.side or PRE
    return TracedScore(node, _SIDES[message.through], post=message.side == POST)


def _downstream(
    message: objective_pb2.TracedNode, model: Model, tokens: int, read: ReadObjective
) -> Objective:
    with inside("downstream"):
        if not message.HasField("downstream"):
            raise InvalidArgument(
                "THROUGH_VALUE measures the pair's write on another objective; name it, for "
                "example a logit_diff",
                reason="REQUIRED",
            )
        if message.downstream.traced_node.through == VALUE:
            raise InvalidArgument(
                "the downstream objective cannot itself be traced through a value: its own "
                "gradient would depend on yet another objective; trace it through query, key or "
                "both",
                field="traced_node.through",
            )
        return read(message.downstream, model, tokens)


def _name(through: "objective_pb2.Through.ValueType") -> str:
    return objective_pb2.Through.Name(through)
