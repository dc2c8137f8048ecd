"""Interventions: what a user asks to be edited, and the edits of concrete sites it comes down to.

An edit of a value x is affine, x -> M x + c, except for MASK, which acts on a score before the
softmax. `resolution.resolve` turns interventions into `Edit`s on sites that are known to exist, so
the forward pass only writes numbers into places.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from services.common.addresses import Address
from services.inference.engine.targets import is_scalar


@dataclass(frozen=True)
class Zero:
    """Value becomes 0."""


@dataclass(frozen=True)
class SetTo:
    """A scalar becomes a number, a vector becomes a vector [w].

    In an `Edit`, also one number [P] or one vector [P, w] for each of its positions.
    """

    value: float | Tensor


@dataclass(frozen=True)
class Scale:
    """Value is multiplied."""

    factor: float


@dataclass(frozen=True)
class Add:
    """A number is added to a scalar, a vector [w] to a vector.

    `relative`: the vector counts in lengths of the value it is added to, token by token. In an
    `Edit` that was applied, one vector [P, w] for each of its positions.
    """

    value: float | Tensor
    relative: bool = False


@dataclass(frozen=True)
class ProjectOut:
    """The part of a vector along `direction` [w], of any length, is removed."""

    direction: Tensor


@dataclass(frozen=True)
class Mask:
    """A pair's score becomes minus infinity before the softmax, so that its row renormalises."""


@dataclass(frozen=True, eq=False)
class Source:
    """Another run: a prompt and what is done to the model while it reads it."""

    token_ids: tuple[int, ...]
    interventions: tuple["Intervention", ...] = ()


@dataclass(frozen=True)
class Mean:
    """Value becomes its mean over all tokens of the prompts.

    `per_position`: at each position its mean over the prompts there, which have equal lengths.
    """

    prompts: tuple[Source, ...]
    per_position: bool = False


@dataclass(frozen=True)
class Patch:
    """Value becomes what it is in another run at the aligned token.

    `alignment` has pairs (position here, position in the source); None: the same positions.
    """

    source: Source
    alignment: tuple[tuple[int, int], ...] | None = None


Operation = Zero | SetTo | Scale | Add | Mean | Patch | ProjectOut | Mask

NAMES: dict[type[Operation], str] = {
    Zero: "zero",
    SetTo: "set",
    Scale: "scale",
    Add: "add",
    Mean: "mean",
    Patch: "patch",
    ProjectOut: "project_out",
    Mask: "mask",
}
"""What requests and refusals call each operation."""


@dataclass(frozen=True)
class Intervention:
    """A target, an operation and, for a component, where it applies (None: at every position)."""

    target: Address
    operation: Operation
    positions: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class SourceRun:
    """A source with its interventions resolved."""

    token_ids: tuple[int, ...]
    edits: tuple["Edit", ...]


@dataclass(frozen=True)
class Reading:
    """Values of a target in another run, [P] or [P, w]."""

    run: SourceRun
    target: Address
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Borrow:
    """What MEAN and PATCH come down to: the mean of values that are still to be read.

    `pooled`: over all positions of all readings; else over the readings, position by position.
    """

    readings: tuple[Reading, ...]
    pooled: bool


@dataclass(frozen=True)
class Read:
    """Changes nothing; the pass keeps the value."""


Change = Zero | SetTo | Scale | Add | Borrow | ProjectOut | Mask | Read
"""What an edit does. `references.fill` turns every `Borrow` into a `SetTo` before a pass."""


@dataclass(frozen=True)
class Edit:
    """An intervention on concrete sites of one prompt: P positions, ascending."""

    target: Address
    positions: tuple[int, ...]
    operation: Change

    @property
    def is_scalar(self) -> bool:
        return is_scalar(self.target)

    @property
    def sets_value(self) -> bool:
        """Whether the value before does not matter (not so for SCALE by 0)."""
        return isinstance(self.operation, Zero | SetTo | Borrow)

    @property
    def zeroes(self) -> bool:
        return isinstance(self.operation, Zero)

    @property
    def masks(self) -> bool:
        return isinstance(self.operation, Mask)

    @property
    def reads(self) -> bool:
        return isinstance(self.operation, Read)

    @property
    def constant(self) -> Tensor | None:
        """c of a vector target, [w] or [P, w]; None where it is 0 or not yet known."""
        match self.operation:
            case SetTo(Tensor() as value) | Add(Tensor() as value, relative=False):
                return value
            case _:
                return None

    def only(self, positions: Sequence[int]) -> "Edit":
        """The edit at some of its positions, ascending."""
        operation = self.operation
        if isinstance(operation, Borrow):
            raise TypeError("what an edit borrows is read before it is cut")
        if isinstance(operation, SetTo | Add) and isinstance(operation.value, Tensor):
            each = operation.value.dim() == 2 or self.is_scalar
            if each:
                kept = [self.positions.index(position) for position in positions]
                operation = replace(operation, value=operation.value[kept])
        return replace(self, positions=tuple(positions), operation=operation)

    def fixed(self, value: Tensor) -> "Edit":
        """The edit of just these values [P, w], with a c that does not depend on them any more."""
        match self.operation:
            case Add(Tensor() as addend, relative=True):
                lengths = torch.linalg.vector_norm(value.detach(), dim=-1, keepdim=True)
                return replace(self, operation=Add(lengths * addend.to(value)))
            case _:
                return self

    def apply(self, value: Tensor) -> Tensor:
        """M x + c of scalars [P] or vectors [P, w]."""
        match self.operation:
            case Zero():
                return torch.zeros_like(value)
            case SetTo(constant):
                return torch.zeros_like(value) + _like(constant, value)
            case Scale(factor):
                return factor * value
            case Add(addend):
                return value + _like(addend, value)
            case ProjectOut():
                return self.linear(value)
            case Read():
                return value
            case Mask() | Borrow():
                raise TypeError(f"{self.operation} is no function of the value")

    def linear(self, vectors: Tensor) -> Tensor:
        """M x of vectors [P, w]; as M is symmetric, also the gradient before the edit."""
        match self.operation:
            case Zero() | SetTo():
                return torch.zeros_like(vectors)
            case Scale(factor):
                return vectors * factor
            case ProjectOut(direction):
                unit: Tensor = (direction / torch.linalg.vector_norm(direction)).to(vectors)
                return vectors - (vectors @ unit)[..., None] * unit
            case _:
                return vectors


def _like(constant: float | Tensor, value: Tensor) -> float | Tensor:
    return constant.to(value) if isinstance(constant, Tensor) else constant


@dataclass(frozen=True)
class Receipt:
    """What an edit really did: sites matched, norm of the change, value before and after.

    A masked pair's value is its probability: `before` without any mask, `after` 0.
    """

    target: Address
    sites: int
    positions: tuple[int, ...]
    applied: int
    delta_norm: float
    before: float | None = None
    after: float | None = None
