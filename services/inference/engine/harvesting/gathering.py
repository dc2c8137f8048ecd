"""The running state of one group of components: every batch of activations is added to it."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from services.common.addresses import Kind
from services.common.errors import FailedPrecondition
from services.common.harvest import keys
from services.common.harvest.state import Array, Keep, State
from services.inference.engine.harvesting.counts import Counts, binned
from services.inference.engine.harvesting.groups import Group
from services.inference.engine.harvesting.kept import Drawn, Offered, Strata, Top
from services.inference.engine.harvesting.moments import Moments, Sums
from services.inference.engine.harvesting.scratch import Scratch
from services.inference.engine.harvesting.token_sums import Located, TokenSums

_AT_ONCE = 2**18
"""Activations that are worked on at a time, so that they stay in a processor's cache."""
_AT_ONCE_GPU = 2**26
_MAXIMA_AT_ONCE = 2**17
"""Sequences and components whose sums are worked on at a time."""


class Gathering:
    """What is gathered of a group; see `harvest.state.State` for what comes out."""

    def __init__(
        self,
        group: Group,
        keep: Keep,
        sequences: Tensor,
        longest: int,
        tokens: Tensor,
        scratch: Scratch,
    ) -> None:
        """sequences, longest: all that will come, [S], and the tokens of the longest; tokens: those
        whose activations are summed, [V] ascending."""
        count, device, places = group.components, tokens.device, group.places(longest)
        self._group, self._keep, self._tokens = group, keep, tokens
        self._scratch = scratch
        self._at_once = _AT_ONCE if device.type == "cpu" else _AT_ONCE_GPU

        def salt(purpose: str) -> int:
            return keys.salt(keep.seed, str(group), purpose)

        self._moments = Moments(count, device)
        self._histogram = Counts(count, device)
        self._maxima = Counts(count, device)
        top, drawn = min(keep.top, len(sequences)), min(keep.random, len(sequences))
        self._top = Top(count, top, places, device)
        self._drawn = Drawn(count, drawn, places, sequences, salt("random"))
        self._strata = Strata(count, keep.strata, keep.per_stratum, places, device, salt("strata"))
        self._token_sums = {"token": TokenSums(count, tokens)}
        if group.kind is Kind.HEAD:
            self._token_sums["key_token"] = TokenSums(count, tokens)

    def add(self, values: Tensor, sequences: Tensor, located: Mapping[str, Located]) -> None:
        """values: [B, P, N]; sequences: their indices, [B]; located: where the tokens are in
        [B, P], by `token` (and `key_token`).

        Raises FailedPrecondition (NON_FINITE).
        """
        batch, places, components = values.shape
        offered = Offered(batch, places, components, self._scratch)
        largest = torch.empty(batch, components, device=values.device)
        for part in _parts(0, components, _MAXIMA_AT_ONCE // batch):
            sums = Sums(batch, part.stop - part.start, values.device)
            for block in _parts(part.start, part.stop, self._at_once // (batch * places)):
                self._add(values[..., block], block, sums, part.start, offered, located)
            self._moments.add(values[..., part], sums, part)
            largest[:, part] = sums.largest
        self._moments.advance(batch, places)
        of_largest = binned(largest)
        self._maxima.add_few(of_largest)
        self._top.offer(offered, largest, sequences)
        self._drawn.offer(offered, sequences)
        self._strata.offer(offered, of_largest, sequences)
        for name, token_sums in self._token_sums.items():
            token_sums.count(located[name])

    def _add(
        self,
        values: Tensor,
        block: slice,
        sums: Sums,
        first: int,
        offered: Offered,
        located: Mapping[str, Located],
    ) -> None:
        """All that is done with every value [B, P, n], while a processor's cache has them.

        first: which component `sums` begin with.
        """
        scratch = self._scratch
        values = scratch.take("values", values.shape).copy_(values)
        sums.add(values, slice(block.start - first, block.stop - first), scratch)
        if not sums.are_finite:
            raise FailedPrecondition(
                f"the model's numbers overflow: activations of {self._group} are not finite",
                reason="NON_FINITE",
            )
        offered.put(values, block)
        code, sign = (scratch.take(name, values.shape) for name in ("power", "square"))
        self._histogram.add(binned(values, code, sign), block)
        for name, token_sums in self._token_sums.items():
            token_sums.add(values, located[name], block)

    def finish(self, sequences: Tensor, lengths: Tensor) -> State:
        """The state of the sequences [S], which are all that came, and their lengths [S]."""
        moments = self._moments
        arrays: dict[str, Array] = {
            "sequences": _array(sequences.int()),
            "lengths": _array(lengths.int()),
            "mean": _array(moments.mean),
            "m2": _array(moments.m2),
            "m3": _array(moments.m3),
            "m4": _array(moments.m4),
            "smallest": _array(moments.smallest),
            "largest": _array(moments.largest),
            "histogram": _array(self._histogram.counts),
            "maxima": _array(self._maxima.counts),
        }
        kept = {"top": self._top, "random": self._drawn, "strata": self._strata}
        for name, each in kept.items():
            found, activations = each.finish()
            arrays |= {f"{name}_keys": _array(found), f"{name}_activations": _array(activations)}
        arrays["tokens"] = _array(self._tokens.int())
        for name, sums in self._token_sums.items():
            arrays |= {
                f"{name}_counts": _array(sums.counts),
                f"{name}_sums": np.ascontiguousarray(_array(sums.sums).T),
            }
        return State(str(self._group), self._keep, moments.count, self._group.window, arrays)


def _array(tensor: Tensor) -> Array:
    found: Array = tensor.cpu().numpy()
    return found


def _parts(first: int, last: int, step: int) -> Iterator[slice]:
    for start in range(first, last, max(1, step)):
        yield slice(start, min(start + max(1, step), last))
