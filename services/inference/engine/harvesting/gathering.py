"""The running state of one group of components: every batch of activations is added to it."""

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
from services.inference.engine.harvesting.moments import Moments
from services.inference.engine.harvesting.token_sums import TokenSums

_AT_ONCE = 2**19
"""Activations that are worked on at a time, so that they stay in a processor's cache."""
_AT_ONCE_GPU = 2**26


class Gathering:
    """What is gathered of a group; see `harvest.state.State` for what comes out."""

    def __init__(
        self,
        group: Group,
        keep: Keep,
        sequences: int,
        longest: int,
        tokens: Tensor,
    ) -> None:
        """sequences, longest: how many will come and the tokens of the longest; tokens: those whose
        activations are summed, [V] ascending."""
        count, device, places = group.components, tokens.device, group.places(longest)
        self._group, self._keep, self._tokens = group, keep, tokens
        self._at_once = _AT_ONCE if device.type == "cpu" else _AT_ONCE_GPU

        def salt(purpose: str) -> int:
            return keys.salt(keep.seed, str(group), purpose)

        self._moments = Moments(count, device)
        self._histogram = Counts(count, device)
        self._maxima = Counts(count, device)
        top, drawn = min(keep.top, sequences), min(keep.random, sequences)
        self._kept = {
            "top": Top(count, top, places, device),
            "random": Drawn(count, drawn, places, device, salt("random")),
            "strata": Strata(count, keep.strata, keep.per_stratum, places, device, salt("strata")),
        }
        self._token_sums = {"token": TokenSums(count, tokens)}
        if group.kind is Kind.HEAD:
            self._token_sums["key_token"] = TokenSums(count, tokens)

    def add(self, values: Tensor, sequences: Tensor, ids: dict[str, Tensor]) -> None:
        """values: [B, P, N]; sequences: their indices, [B]; ids: by `token` (and `key_token`) the
        token of every place, [B, P].

        Raises FailedPrecondition (NON_FINITE).
        """
        batch, places, components = values.shape
        step = max(1, self._at_once // (batch * places))
        for start in range(0, components, step):
            part = slice(start, min(start + step, components))
            self._add(values[..., part].float().contiguous(), sequences, ids, part)
        self._moments.advance(batch, places)
        for name, sums in self._token_sums.items():
            sums.count(ids[name])

    def _add(self, values: Tensor, sequences: Tensor, ids: dict[str, Tensor], part: slice) -> None:
        smallest, largest = values.amin(1), values.amax(1)
        if not bool(torch.isfinite(smallest).all() & torch.isfinite(largest).all()):
            raise FailedPrecondition(
                f"the model's numbers overflow: activations of {self._group} are not finite",
                reason="NON_FINITE",
            )
        self._moments.add(values, largest, smallest, part)
        self._histogram.add(binned(values), part)
        self._maxima.add(binned(largest), part)
        offered = Offered(values)
        for kept in self._kept.values():
            kept.offer(offered, largest, sequences, part)
        for name, sums in self._token_sums.items():
            sums.add(values, ids[name], part)

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
        for name, kept in self._kept.items():
            found, activations = kept.finish()
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
