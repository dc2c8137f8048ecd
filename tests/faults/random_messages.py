"""Random requests of any RPC, built from the protos' descriptors.

Every field of every message can be set, to anything its type allows. Requests made of anything at
all would be refused at their first field, so most values are plausible: what a field stands for
(`HINTS`, by its full name) is drawn to fit the model served and the prompt drawn before it. A field
without a hint is drawn by its type, so that a new field, message or RPC is covered the day it is
there. How wild a request is, is drawn once for each: most have no wild value, some have many.

    draw(requests(descriptor, world))      one message
    draw(spoiled(message.SerializeToString()))   its bytes, or what is left of them
"""

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, OneofDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st
from tdb.inference.v1 import attribute_pb2, objective_pb2
from tdb.type.v1 import tensor_pb2

from tests.faults import random_explanations

NUMBERS = (0, 1, -1, 2, 7, 8, 15, 16, 31, 32, 33, 63, 64, 255, 256, 399, 400, 1000, 1001, 10_001)
INT32 = st.sampled_from((*NUMBERS, 100_000, 100_001, 2**31 - 1, -(2**31))) | st.integers(
    -(2**31), 2**31 - 1
)
DOUBLES = st.sampled_from(
    (
        0.0,
        -0.0,
        1.0,
        0.5,
        1e-320,
        1e-30,
        1e30,
        3.4e38,
        1e39,
        -1.7e308,
        math.nan,
        math.inf,
        -math.inf,
    )
)
_NO_ADDRESSES = "neuron head.0.0~ head.0.0~1-2-3 neuron.0.1~999999999 latent..1 ~ . resid_pre.0"
_NO_WORDS = ("", " ", "\x00", "\n", "é", "🙂", "\u202e", "a" * 201, "../../etc/passwd", "%s%n")
TEXTS = st.sampled_from((*_NO_ADDRESSES.split(), *_NO_WORDS)) | st.text(max_size=12)
BYTES = st.sampled_from((b"", b"\x00", b"\xff" * 4, b"\x00" * 64)) | st.binary(max_size=70)
EXTREMES = (0.0, 1.0, 1e-320, 1e-38, 1e10, 1e19, -1e25, 3.4e38, -3.4e38)
DEEPEST = 9


@dataclass(frozen=True)
class World:
    """What the service under test serves: what plausible values are drawn from."""

    models: tuple[str, ...]
    vocabulary: int
    layers: int
    heads: int
    neurons: int
    width: int
    head_width: int
    dictionaries: dict[str, int]
    """Latents by dictionary's id."""
    sets: tuple[str, ...]
    texts: tuple[str, ...]
    words: tuple[str, ...]
    """Texts that are one token each."""
    datasets: tuple[str, ...]
    components: tuple[str, ...]
    """Those that the data sets have records of."""
    explanations: tuple[str, ...] = ()
    """Ids of those that are stored."""


@dataclass
class Builder:
    """Draws one request. What was drawn before says what fits: the tokens of the prompt around a
    field, the target of the intervention around it."""

    draw: Callable[[st.SearchStrategy[Any]], Any]
    world: World
    wild: int
    """Of a hundred values."""
    tokens: list[int] = field(default_factory=lambda: [5])
    extreme: bool = False
    """Whether numbers are as large and small as they may be."""
    target: str = "scalar"
    is_node: bool = False
    built: list[Any] = field(default_factory=list)
    """The request and the messages in it that are being built, innermost last."""

    def asks(self, rpc: str) -> bool:
        """Whether the request is one of this RPC."""
        return bool(self.built[0].DESCRIPTOR.name == f"{rpc}Request")

    def unless(self, rpc: str, percent: int) -> int:
        return 0 if self.asks(rpc) else percent

    @property
    def here(self) -> Any:
        """The message being built: its fields of lower numbers are drawn by now."""
        return self.built[-1]

    def if_set(self, name: str, percent: int) -> int:
        return percent if getattr(self.here, name) else 0

    @property
    def is_scalar(self) -> bool:
        return self.target in ("scalar", "pair")

    def if_scalar(self, scalar: str, vector: str) -> Sequence[str]:
        return (scalar,) if self.is_scalar else (vector,)

    def one(self, options: Sequence[Any]) -> Any:
        return options[self.number(len(options) - 1)]

    def number(self, most: int, least: int = 0) -> int:
        return int(self.draw(st.integers(least, most)))

    def chance(self, percent: int) -> bool:
        # Ends of a range are drawn more often than the rest: they stand for neither.
        return (self.number(99) + 62) % 100 < percent

    def goes_wild(self) -> bool:
        return self.wild > 0 and self.chance(self.wild)

    def message(self, descriptor: Descriptor, depth: int = 0) -> Message:
        built = message_factory.GetMessageClass(descriptor)()
        self.built.append(built)
        chosen: dict[str, FieldDescriptor | None] = {}
        is_run = descriptor.full_name == _V + "Run"
        if is_run:
            self.tokens.append(self.tokens[-1])
        for each in descriptor.fields:
            oneof = each.containing_oneof
            if oneof is not None and len(oneof.fields) > 1:
                if oneof.name not in chosen:
                    chosen[oneof.name] = self._choice(oneof)
                if chosen[oneof.name] is each:
                    self._set(built, each, depth)
            elif self._is_wanted(each, depth):
                self._set(built, each, depth)
        if is_run:
            self.tokens.pop()
        self.built.pop()
        return built

    def _choice(self, oneof: OneofDescriptor) -> FieldDescriptor | None:
        if self.goes_wild() and self.chance(30):
            return None
        fitting = CHOICES.get(oneof.full_name)
        if fitting is None or self.goes_wild():
            chosen: FieldDescriptor = self.one(oneof.fields)
            return chosen
        names = {each.name: each for each in oneof.fields}
        return names[self.one(fitting(self))]

    def _is_wanted(self, each: FieldDescriptor, depth: int) -> bool:
        if each.message_type is not None and depth >= DEEPEST:
            return False
        if self.goes_wild():
            return self.chance(50)
        percent = PRESENCE.get(each.full_name, 8 if each.full_name in HINTS else 4)
        if not isinstance(percent, int):
            percent = percent(self)
        return percent == 100 or (percent > 0 and self.chance(percent))

    def _set(self, built: Message, each: FieldDescriptor, depth: int) -> None:
        if each.is_repeated:
            count = self._count(each)
            values = [self._value(each, depth) for _ in range(count)]
            if each.full_name in UNIQUE and not self.goes_wild():
                values = list({str(value): value for value in values}.values())
            getattr(built, each.name).extend(values)
        elif each.message_type is not None:
            getattr(built, each.name).CopyFrom(self._value(each, depth))
            getattr(built, each.name).SetInParent()
        else:
            setattr(built, each.name, self._value(each, depth))

    def _count(self, each: FieldDescriptor) -> int:
        if self.goes_wild():
            return int(self.one((0, 1, 2, 3, 17, 65)))
        counts = COUNTS.get(each.full_name, (1, 1, 2))
        return self.tokens[-1] if counts is ALL_TOKENS else int(self.one(counts))

    def _value(self, each: FieldDescriptor, depth: int) -> Any:
        hint = HINTS.get(each.full_name)
        if hint is not None and not self.goes_wild():
            return hint(self)
        if each.message_type is not None:
            return self.message(each.message_type, depth + 1)
        if each.enum_type is not None:
            defined = [value.number for value in each.enum_type.values]
            return self.one([*defined, 17, -1] if self.goes_wild() else defined)
        match each.cpp_type:
            case FieldDescriptor.CPPTYPE_BOOL:
                return self.draw(st.booleans())
            case FieldDescriptor.CPPTYPE_DOUBLE:
                return self.double()
            case FieldDescriptor.CPPTYPE_FLOAT:
                return struct.unpack("<f", struct.pack("<f", self.number(30, -30) / 10))[0]
            case FieldDescriptor.CPPTYPE_STRING:
                is_text = each.type == FieldDescriptor.TYPE_STRING
                return self.draw(TEXTS if is_text else BYTES)
            case FieldDescriptor.CPPTYPE_UINT32 | FieldDescriptor.CPPTYPE_UINT64:
                return abs(self.draw(INT32))
            case _:
                return self.draw(INT32) if self.goes_wild() else self.number(4)

    # What fields stand for.

    def double(self) -> float:
        if self.goes_wild():
            return float(self.draw(DOUBLES))
        if self.extreme:
            return float(self.one(EXTREMES))
        return self.number(30, -30) / 10

    def position(self) -> int:
        return self.number(max(0, self.tokens[-1] - 1))

    def prompt_ids(self) -> int:
        return self.number(self.world.vocabulary - 1)

    def vector(self) -> Message:
        width = self.world.head_width if self.target == "head" else self.world.width
        return self.tensor(width)

    def tensor(self, width: int) -> Message:
        kind, code = self.one(
            (
                (tensor_pb2.DATA_TYPE_FLOAT32, "f"),
                (tensor_pb2.DATA_TYPE_FLOAT64, "d"),
                (tensor_pb2.DATA_TYPE_FLOAT16, "e"),
            )
        )
        most = 6e4 if code == "e" else 3.4e38
        first, step = (max(-most, min(most, self.double())) for _ in range(2))
        values = [step if number % 3 == 0 else first for number in range(width)]
        return tensor_pb2.Tensor(
            data_type=kind, shape=[width], data=struct.pack(f"<{width}{code}", *values)
        )

    def component(self, kinds: Sequence[str]) -> str:
        """An address; `target` remembers what kind of value stands there."""
        world = self.world
        kind = self.one(kinds)
        layer, head = self.number(world.layers - 1), self.number(world.heads - 1)
        self.target = "vector"
        match kind:
            case "neuron":
                self.target = "scalar"
                return f"neuron.{layer}.{self.number(world.neurons - 1)}"
            case "latent" if world.dictionaries:
                self.target = "scalar"
                name = self.one(sorted(world.dictionaries))
                return f"latent.{name}.{self.number(world.dictionaries[name] - 1)}"
            case "head":
                self.target = "head"
                return f"head.{layer}.{head}"
            case "head.q" | "head.k" | "head.v":
                self.target = "head"
                return f"head.{layer}.{head}.{kind[-1]}"
            case "embed" | "latent":
                return "embed"
            case "bias" | "skip" | "error":
                self.target = "error" if kind == "error" else "bias"
                return f"{kind}.{self.one(sorted(world.dictionaries) or ('none',))}"
            case _:
                self.target = "bias" if kind.startswith("bias") else "vector"
                return f"{kind}.{layer}"

    def address(self, kinds: Sequence[str], node_percent: int = 50) -> str:
        component = self.component(kinds)
        self.is_node = self.chance(node_percent)
        if not self.is_node:
            return component
        position = self.position()
        if self.target == "head" and component.count(".") == 2 and self.chance(60):
            self.target = "pair"
            return f"{component}~{position}-{self.number(position)}"
        return f"{component}~{position}"

    def point(self) -> str:
        layer = self.number(self.world.layers - 1)
        name = self.one(POINTS)
        if name == "latents":
            return f"latents.{self.one(sorted(self.world.dictionaries) or ('none',))}"
        return name if name in ("embed", "final_norm", "logits") else f"{name}.{layer}"


SCALARS = ("neuron", "neuron", "latent")
VECTORS = ("head", "head.q", "head.k", "head.v", "embed", "attn", "mlp", "resid_mid", "resid_post")
ANY = (*SCALARS, *SCALARS, *VECTORS, "resid_pre", "bias.attn", "bias.mlp", "bias", "error")
RESIDUALS = ("embed", "resid_pre", "resid_mid", "resid_post", "final_norm")
OF_HEADS = ("q", "k", "v", "z", "attn_scores", "attn_probs")
POINTS = (*RESIDUALS, *OF_HEADS, "attn_out", "mlp_in", "mlp_act", "mlp_out", "latents", "logits")

OPERATIONS = {
    "scalar": ("zero", "set", "scale", "add", "mean", "patch"),
    "vector": ("zero", "set", "scale", "add", "mean", "patch", "project_out"),
    "head": ("zero", "set", "scale", "add", "mean", "patch", "project_out"),
    "pair": ("zero", "set", "scale", "add", "mean", "patch", "mask"),
    "bias": ("zero", "scale"),
    "error": ("zero", "scale", "patch"),
}

_V = "tdb.inference.v1."
_T = "tdb.type.v1."
_D = "tdb.dataset.v1."

CHOICES: dict[str, Callable[[Builder], Sequence[str]]] = {
    _T + "Prompt.source": lambda _: ("token_ids", "token_ids", "token_ids", "text", "text", "chat"),
    _T + "TokenRef.ref": lambda _: ("id", "id", "text"),
    _V + "Positions.which": lambda builder: (
        ("all", "list", "list", "start") + (("generated",) if builder.asks("Generate") else ())
    ),
    _V + "Intervention.op": lambda builder: OPERATIONS[builder.target],
    _V + "Intervention.Set.to": lambda builder: builder.if_scalar("value", "vector"),
    _V + "Intervention.Add.addend": lambda builder: builder.if_scalar("value", "direction"),
}
"""Which of a oneof, and how often."""


def _ranks(table: attribute_pb2.AttributeRequest) -> bool:
    return table.HasField("top_k") or bool(table.rank_by) or table.per_kind


PRESENCE: dict[str, int | Callable[[Builder], int]] = dict.fromkeys(
    (
        _V + "Run.prompt",
        _V + "RunRequest.run",
        _V + "AttributeRequest.run",
        _V + "AttributeRequest.objective",
        _V + "VerifyRequest.table",
        _V + "GenerateRequest.run",
        _V + "StreamActivationsRequest.run",
        _V + "StreamActivationsRequest.points",
        _V + "HarvestRequest.groups",
        _V + "HarvestRequest.sequences",
        _V + "StreamOutputTokensRequest.group",
        _V + "HarvestSequence.index",
        _V + "HarvestSequence.ids",
        _V + "TokenizeRequest.prompt",
        _V + "DescribeComponentRequest.component",
        _V + "Intervention.target",
        _V + "Intervention.Scale.factor",
        _V + "Intervention.Mean.prompts",
        _V + "Intervention.Patch.source",
        _V + "Intervention.ProjectOut.direction",
        _V + "Positions.PositionList.positions",
        _V + "LogitDiff.targets",
        _V + "LogitMinusMean.targets",
        _V + "LogProb.targets",
        _V + "Prob.targets",
        _V + "Along.point",
        _V + "Along.direction",
        _V + "TracedNode.node",
        _T + "TokenIds.ids",
        _T + "Chat.messages",
        _T + "ChatMessage.role",
        _T + "ChatMessage.content",
        _V + "ReadOuts.tokens",
    ),
    100,
)
PRESENCE |= {
    _D + "GetRecordRequest.dataset": 100,
    _D + "GetRecordRequest.component": 100,
    _D + "StreamRecordsRequest.dataset": 100,
    _D + "StreamRecordsRequest.selections": 60,
    _D + "StreamExplanationsRequest.dataset": 100,
    _D + "SearchRequest.dataset": 100,
    _D + "SearchRequest.groups": 40,
    _D + "SearchRequest.ranges": 40,
    _D + "SearchRequest.text": 30,
    _D + "SearchRequest.order_by": 30,
    _D + "StatisticRange.statistic": 100,
    _D + "StatisticRange.at_least": 60,
    _D + "ComponentRange.first": 100,
    _D + "ComponentRange.last": 100,
    _V + "Run.interventions": 50,
    _V + "LogitDiff.distractors": 60,
    _V + "AttributeRequest.compare": lambda builder: builder.unless("Verify", 20),
    _V + "AttributeRequest.compare_objective": lambda builder: (
        50 if builder.here.HasField("compare") else 0
    ),
    _V + "AttributeRequest.dictionaries": lambda builder: (
        0 if builder.here.model == "gated" else 30
    ),
    _V + "AttributeRequest.norm_mode": 40,
    _V + "AttributeRequest.top_k": 60,
    _V + "AttributeRequest.rank_by": 40,
    _V + "AttributeRequest.per_kind": 20,
    _V + "AttributeRequest.read_outs": lambda builder: builder.unless("Verify", 25),
    _V + "AttributeRequest.verify": lambda builder: builder.unless("Verify", 10),
    _V + "AttributeRequest.integrated_steps": lambda builder: builder.unless("Verify", 15),
    _V + "AttributeRequest.integrated_path": lambda builder: builder.if_set("integrated_steps", 50),
    _V + "AttributeRequest.baseline": 15,
    _V + "AttributeRequest.model": 30,
    _V + "Objective.position": lambda builder: 0 if builder.here.HasField("traced_node") else 25,
    _V + "TracedNode.through": 60,
    _V + "TracedNode.downstream": lambda builder: (
        100 if builder.here.through == objective_pb2.THROUGH_VALUE else 0
    ),
    _V + "TracedNode.side": 10,
    _V + "VerifyRequest.nodes": lambda builder: 0 if _ranks(builder.here.table) else 80,
    _V + "VerifyRequest.all_heads": lambda builder: 0 if builder.here.nodes else 20,
    _V + "GenerateRequest.top_k": lambda builder: builder.if_set("temperature", 30),
    _V + "GenerateRequest.top_p": lambda builder: builder.if_set("temperature", 30),
    _V + "GenerateRequest.seed": lambda builder: builder.if_set("temperature", 50),
    _V + "GenerateRequest.twin": lambda builder: 40,
    _V + "GenerateRequest.max_new_tokens": 70,
    _V + "GenerateRequest.temperature": 40,
    _V + "RunRequest.activations": 30,
    _V + "RunRequest.logit_lens": 30,
    _V + "RunRequest.positions": 40,
    _V + "RunRequest.tokens": 30,
    _T + "Prompt.prepend_bos": lambda builder: builder.if_set("text", 20),
    _V + "Intervention.positions": lambda builder: 0 if builder.is_node else 40,
    _V + "Intervention.Add.strength": lambda builder: 0 if builder.is_scalar else 30,
    _V + "Intervention.Add.relative": lambda builder: 0 if builder.is_scalar else 30,
    _V + "Intervention.Mean.per_position": lambda builder: 100 if builder.target == "pair" else 30,
}
"""How often of a hundred a field outside a oneof is set."""

ALL_TOKENS: tuple[int, ...] = ()
COUNTS: dict[str, tuple[int, ...]] = {
    _T + "TokenIds.ids": ALL_TOKENS,
    _V + "StreamActivationsRequest.points": (1, 1, 2, 3),
    _V + "VerifyRequest.nodes": (1, 2, 5),
    _V + "HarvestRequest.sequences": (1, 2, 3),
    _V + "HarvestSequence.ids": ALL_TOKENS,
}

UNIQUE = {
    _V + "LogitDiff.targets",
    _V + "LogitDiff.distractors",
    _V + "LogitMinusMean.targets",
    _V + "LogProb.targets",
    _V + "Prob.targets",
    _V + "VerifyRequest.nodes",
    _V + "StreamActivationsRequest.points",
    _V + "HarvestRequest.groups",
    _V + "HarvestRequest.tokens",
    _V + "RunRequest.activations",
    _V + "Positions.PositionList.positions",
    _V + "LogitLens.points",
    _V + "AttributeRequest.dictionaries",
}


def _dictionary(builder: Builder) -> str:
    names = [*builder.world.dictionaries, *builder.world.sets]
    return str(builder.one(names or ("none",)))


def _model(builder: Builder) -> str:
    return str(builder.one(("", *builder.world.models)))


def _text(builder: Builder) -> str:
    return str(builder.one(builder.world.texts))


def _group(builder: Builder) -> str:
    kind = builder.one(("neuron", "neuron", "head", "latent"))
    layer = builder.number(builder.world.layers - 1)
    return f"{kind}.{_dictionary(builder) if kind == 'latent' else layer}"


_position: Callable[[Builder], Any] = Builder.position
HINTS: dict[str, Callable[[Builder], Any]] = {
    _T + "TokenIds.ids": Builder.prompt_ids,
    _T + "TokenRef.id": Builder.prompt_ids,
    _T + "TokenRef.text": lambda builder: builder.one(builder.world.words),
    _T + "Prompt.text": _text,
    _T + "ChatMessage.role": lambda builder: builder.one(("user", "assistant", "system")),
    _T + "ChatMessage.content": _text,
    _V + "Positions.start": _position,
    _V + "Positions.PositionList.positions": _position,
    _V + "Objective.position": _position,
    _V + "Intervention.PositionPair.to": _position,
    _V + "Intervention.PositionPair.source": _position,
    _V + "Intervention.target": lambda builder: builder.address(ANY),
    _V + "Intervention.Set.vector": Builder.vector,
    _V + "Direction.vector": Builder.vector,
    _V + "Direction.write_of": lambda builder: builder.component(SCALARS),
    _V + "VerifyRequest.nodes": lambda builder: builder.address((*SCALARS, *VECTORS), 70),
    _V + "DescribeComponentRequest.component": lambda builder: builder.component(
        (*SCALARS, "head", "mlp")
    ),
    _V + "DescribeComponentRequest.tokens": lambda builder: builder.number(100, 1),
    _V + "DescribeComponentRequest.similar": lambda builder: builder.number(100),
    _V + "DescribeComponentRequest.circuits": lambda builder: builder.number(8, 1),
    _V + "TracedNode.node": lambda builder: builder.address((*SCALARS, "head"), 95),
    _V + "Along.point": lambda builder: builder.one(
        ("embed", "resid_mid.0", "resid_post.1", "resid_pre.1", "final_norm")
    ),
    _V + "LogitLens.points": lambda builder: builder.one(("embed", "resid_mid.1", "resid_post.0")),
    _V + "RunRequest.activations": Builder.point,
    _V + "StreamActivationsRequest.points": Builder.point,
    _V + "HarvestRequest.groups": _group,
    _V + "HarvestRequest.tokens": Builder.prompt_ids,
    _V + "HarvestRequest.top_k": lambda builder: builder.number(9, 1),
    _V + "HarvestRequest.per_stratum": lambda builder: builder.number(3, 1),
    _V + "StreamOutputTokensRequest.group": _group,
    _V + "StreamOutputTokensRequest.count": lambda builder: builder.number(9, 1),
    _V + "StreamOutputTokensRequest.tokens": lambda builder: builder.number(9, 1),
    _V + "HarvestSequence.index": lambda builder: builder.number(10_000),
    _V + "HarvestSequence.ids": Builder.prompt_ids,
    _V + "RunRequest.top_k": lambda builder: builder.number(20, 1),
    _V + "AttributeRequest.top_k": lambda builder: builder.one((1, 3, 20, 60)),
    _V + "AttributeRequest.dictionaries": _dictionary,
    _V + "AttributeRequest.integrated_steps": lambda builder: builder.number(4, 1),
    _V + "ReadOuts.tokens": lambda builder: builder.number(5, 1),
    _V + "ReadOuts.sources": lambda builder: builder.number(5),
    _V + "GenerateRequest.max_new_tokens": lambda builder: builder.number(5, 1),
    _V + "GenerateRequest.temperature": lambda builder: builder.one((0.0, 0.5, 1.0, 3.0)),
    _V + "GenerateRequest.top_k": lambda builder: builder.number(20, 1),
    _V + "GenerateRequest.top_p": lambda builder: builder.one((0.1, 0.9, 1.0)),
    _V + "GenerateRequest.seed": lambda builder: builder.number(2**31 - 1),
    _V + "GenerateRequest.top_log_probs": lambda builder: builder.number(20),
    _V + "GenerateRequest.stop": lambda builder: builder.one(builder.world.words),
}
HINTS |= {
    _D + name + ".dataset": lambda builder: builder.one(builder.world.datasets)
    for name in (
        "GetRecordRequest",
        "StreamRecordsRequest",
        "StreamExplanationsRequest",
        "SearchRequest",
    )
}
HINTS |= {
    _D + name: lambda builder: builder.one(builder.world.components)
    for name in (
        "GetRecordRequest.component",
        "Selection.component",
        "ComponentRange.first",
        "ComponentRange.last",
    )
}
HINTS |= {
    _D + "SearchRequest.groups": lambda builder: builder.one(("neuron.0", "neuron.1", "head.0")),
    _D + "SearchRequest.text": lambda builder: f"w{builder.number(60)}",
    _D + "SearchRequest.limit": lambda builder: builder.number(50, 1),
}
HINTS |= {
    _V + name + ".model": _model
    for name in (
        "RunRequest",
        "AttributeRequest",
        "GenerateRequest",
        "StreamActivationsRequest",
        "HarvestRequest",
        "StreamOutputTokensRequest",
        "DescribeComponentRequest",
        "TokenizeRequest",
        "GetModelRequest",
    )
}
"""What a plausible value of a field is, by the field's full name."""

CHOICES |= random_explanations.CHOICES
PRESENCE |= random_explanations.PRESENCE
COUNTS |= random_explanations.COUNTS
UNIQUE |= random_explanations.UNIQUE
HINTS |= random_explanations.HINTS


@st.composite
def requests(draw: st.DrawFn, descriptor: Descriptor, world: World) -> Message:
    """One request: most have nothing wild in them."""
    wild = draw(st.sampled_from((0, 0, 0, 0, 0, 0, 2, 5, 15)))
    builder = Builder(draw, world, wild, extreme=draw(st.integers(0, 9)) == 0)
    builder.tokens = [draw(st.integers(1, 9))]
    return builder.message(descriptor)


@st.composite
def spoiled(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes of a message, now and then cut, turned, lengthened or nested out of all measure."""
    how = draw(st.sampled_from(("cut", "turn", "append", "nest", "utf8")))
    place = draw(st.integers(0, max(0, len(data) - 1)))
    match how:
        case "cut":
            return data[:place]
        case "turn" if data:
            turned = bytearray(data)
            turned[place] = draw(st.integers(0, 255))
            return bytes(turned)
        case "nest":
            for _ in range(draw(st.sampled_from((5, 99, 101, 300)))):
                data = b"\x12" + _varint(len(data)) + data
            return data
        case "utf8":
            return data + b"\x0a\x02\xff\xfe"  # field 1, where it is text: no UTF-8
        case _:
            return data + draw(st.binary(max_size=9))


def _varint(number: int) -> bytes:
    found = bytearray()
    while number >= 128:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])
