"""Resolution: interventions checked against the model and prompt before anything runs.

Refuses what matches nothing, what does not fit its target, two value-setting operations that reach
the same scalar, and masks that leave a row nothing to attend to.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from services.common.addresses import Address, Shape
from services.common.errors import InvalidArgument, inside
from services.inference.engine.interventions import (
    NAMES,
    Add,
    Borrow,
    Edit,
    Intervention,
    Mean,
    Patch,
    ProjectOut,
    Reading,
    SetTo,
    Source,
    SourceRun,
)
from services.inference.engine.targets import (
    Widths,
    check_operation,
    is_scalar,
    pair_example,
    target_of,
)


def resolve(
    interventions: Sequence[Intervention],
    shape: Shape,
    widths: Widths,
    tokens: int,
    prompt: int | None = None,
) -> tuple[Edit, ...]:
    """Checks and expands, over `tokens` tokens. Refusals carry fields such as `[i].target`.

    During generation `prompt` says how many of the tokens are the prompt's, else None.
    """
    return _Resolver(shape, widths, {}).edits(interventions, tokens, prompt or tokens)


def resolve_each(
    interventions: Sequence[Intervention], shape: Shape, widths: Widths, tokens: int
) -> tuple[Edit, ...]:
    """Like `resolve`, for interventions that are never made in one run, so that none conflict."""
    resolver = _Resolver(shape, widths, {})
    edits = []
    for number, intervention in enumerate(interventions):
        with inside(f"[{number}]"):
            edits.append(resolver.edit(intervention, tokens, tokens))
    return tuple(edits)


@dataclass(frozen=True)
class _Resolver:
    shape: Shape
    widths: Widths
    runs: dict[Source, SourceRun]
    """Each source is resolved once, and so run once."""

    def edits(
        self, interventions: Sequence[Intervention], tokens: int, prompt: int
    ) -> tuple[Edit, ...]:
        edits: list[Edit] = []
        taken: dict[tuple[object, ...], int] = {}
        masked: dict[Address, dict[int, int]] = defaultdict(dict)
        for number, intervention in enumerate(interventions):
            with inside(f"[{number}]"):
                edit = self.edit(intervention, tokens, prompt)
                if edit.sets_value:
                    _claim(edit, number, taken)
                if edit.masks:
                    _mask(edit.target, number, masked, self.shape)
                edits.append(edit)
        return tuple(edits)

    def edit(self, intervention: Intervention, tokens: int, prompt: int) -> Edit:
        target, operation = intervention.target, intervention.operation
        with inside("target"):
            check_target(target, self.shape, tokens)
        check_operation(target, NAMES[type(operation)])
        positions = _positions(intervention, tokens)
        match operation:
            case SetTo(value):
                _check_width("set", value, target, self.widths)
            case Add(value, relative):
                _check_width("add", value, target, self.widths)
                if relative and is_scalar(target):
                    raise InvalidArgument(f"{target} has no length to be relative to", field="add")
            case ProjectOut(direction):
                _check_width("project_out", direction, target, self.widths)
            case Mean():
                with inside("mean"):
                    return Edit(target, positions, self._mean(operation, target, positions))
            case Patch():
                with inside("patch"):
                    return Edit(
                        target, positions, self._patch(operation, target, positions, tokens, prompt)
                    )
        return Edit(target, positions, operation)

    def _mean(self, mean: Mean, target: Address, positions: tuple[int, ...]) -> Borrow:
        if not mean.prompts:
            raise InvalidArgument("at least one reference prompt is required", field="prompts")
        runs = [self._run(source) for source in mean.prompts]
        lengths = sorted({len(run.token_ids) for run in runs})
        if not mean.per_position:
            if target.key is not None:
                raise InvalidArgument(
                    f"{target}: a pair has a mean at its own positions only; set per_position, "
                    "with reference prompts of one token count",
                    field="per_position",
                )
            readings = [
                Reading(run, target.component, tuple(range(len(run.token_ids)))) for run in runs
            ]
            return Borrow(tuple(readings), pooled=True)
        if len(lengths) > 1:
            raise InvalidArgument(
                "per_position needs prompts of one token count; these have "
                f"{', '.join(map(str, lengths))}",
                field="prompts",
            )
        if positions[-1] >= lengths[0]:
            raise InvalidArgument(
                f"position {positions[-1]} is edited, but the reference prompts have "
                f"{lengths[0]} tokens, so there is no mean at it",
                field="prompts",
            )
        there = target.component if target.key is None else target
        return Borrow(tuple(Reading(run, there, positions) for run in runs), pooled=False)

    def _patch(
        self, patch: Patch, target: Address, positions: tuple[int, ...], tokens: int, prompt: int
    ) -> Borrow:
        source = len(patch.source.token_ids)
        aligned = _alignment(patch, tokens, prompt, source)
        for position in (*positions, *([] if target.key is None else [target.key])):
            if position not in aligned:
                raise InvalidArgument(
                    f"{target}: position {position} stands for no token of the source; align it, "
                    "or leave it out of the positions",
                    field="alignment",
                )
        there = target.component
        moved = tuple(aligned[position] for position in positions)
        if target.key is not None:
            query, key = moved[0], aligned[target.key]
            there = target.at(query, key)
            if key > query:
                raise InvalidArgument(
                    f"{target} stands for query {query} and key {key} of the source, a masked pair",
                    field="alignment",
                )
            with inside("alignment"):
                self.shape.check(there, source)
        with inside("source.interventions"):
            run = self._run(patch.source)
        return Borrow((Reading(run, there, moved),), pooled=False)

    def _run(self, source: Source) -> SourceRun:
        if source not in self.runs:
            tokens = len(source.token_ids)
            edits = self.edits(source.interventions, tokens, tokens)
            self.runs[source] = SourceRun(source.token_ids, edits)
        return self.runs[source]


def _alignment(patch: Patch, tokens: int, prompt: int, source: int) -> dict[int, int]:
    """Position here -> position in the source."""
    if patch.alignment is None:
        if prompt != source:
            raise InvalidArgument(
                f"this prompt has {prompt} tokens and the source {source}; say which of its tokens "
                "stands for which",
                field="alignment",
            )
        return {position: position for position in range(prompt)}
    aligned: dict[int, int] = {}
    for number, (to, origin) in enumerate(patch.alignment):
        with inside(f"alignment[{number}]"):
            for name, position, count in (("to", to, tokens), ("source", origin, source)):
                if not 0 <= position < count:
                    raise InvalidArgument(
                        f"position {position} does not exist; valid is 0..{count - 1}", field=name
                    )
            if to in aligned:
                raise InvalidArgument(f"position {to} is aligned twice", field="to")
        aligned[to] = origin
    return aligned


def check_target(target: Address, shape: Shape, tokens: int) -> None:
    """Raises InvalidArgument unless the address can be edited."""
    shape.check(target, tokens)
    target_of(target)


def _claim(edit: Edit, number: int, taken: dict[tuple[object, ...], int]) -> None:
    """Enters the edit's sites into `taken`; raises if another edit sets one of them already.

    A head's row covers all its pairs, so a pair is entered under its row too.
    """
    target = edit.target
    for position in edit.positions:
        site = (target.component, position)
        row_edited, pair_edited = (*site, "row"), (*site, "some pair")
        edited = row_edited if target.key is None else (*site, str(target.key))
        conflicts = [edited, pair_edited if target.key is None else row_edited]
        claims = [edited] if target.key is None else [edited, pair_edited]
        for conflict in conflicts:
            if conflict in taken:
                raise InvalidArgument(
                    f"{target} at position {position} is already set by "
                    f"interventions[{taken[conflict]}]; keep one of the two",
                    field="target",
                )
        for claim in claims:
            taken.setdefault(claim, number)


def _mask(
    target: Address, number: int, masked: dict[Address, dict[int, int]], shape: Shape
) -> None:
    """Enters a masked pair under its row; raises if nothing would be left to attend to."""
    layer, query, key = target.layer, target.position, target.key
    assert layer is not None
    assert query is not None
    assert key is not None
    row = masked[target.component.at(query)]
    if key in row:
        raise InvalidArgument(
            f"{target} is already masked by interventions[{row[key]}]; keep one of the two",
            field="target",
        )
    row[key] = number
    if len(row) == query + 1 - shape.first_visible(layer, query):
        raise InvalidArgument(
            f"{target} is the last pair that is visible in row {target.component.at(query)}: with "
            "it masked the row has nothing to attend to; zero the row to remove its output",
            field="target",
        )


def _check_width(name: str, value: float | Tensor, target: Address, widths: Widths) -> None:
    """Raises InvalidArgument unless a number meets a scalar, a vector a target of its width."""
    if isinstance(value, float):
        if not is_scalar(target):
            raise InvalidArgument(
                f"{target}: its value is a vector of width {widths.of(target)}, so it takes no "
                "single number; zero or scale it, or give a vector"
                + (f", or name one pair{pair_example(target)}" if pair_example(target) else ""),
                field=f"{name}.value",
            )
        return
    field = "set.vector" if name == "set" else f"{name}.direction"
    if is_scalar(target):
        raise InvalidArgument(
            f"{target}: its value is one number, so it takes no vector; give value", field=field
        )
    if value.shape != (widths.of(target),):
        raise InvalidArgument(
            f"{target}: its value has width {widths.of(target)}, the vector has shape "
            f"{list(value.shape)}",
            field=field,
        )


def _positions(intervention: Intervention, tokens: int) -> tuple[int, ...]:
    target, positions = intervention.target, intervention.positions
    if target.position is not None:
        if positions is not None:
            raise InvalidArgument(
                f"{target} names its own position; leave positions out, or target "
                f"{target.component}",
                field="positions",
            )
        return (target.position,)
    if positions is None:
        return tuple(range(tokens))
    return tuple(sorted(positions))
