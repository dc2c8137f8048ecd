"""Does a dictionary belong where it was put? Measured on a sample when it is loaded.

A dictionary read at the wrong site, with the wrong normalisation or on the wrong model gives
plausible numbers that mean nothing. Three figures tell:

    FVU     sum of |target - recon - skip|^2 over sum of |target - mean target|^2
    L0      active latents per token
    dead    share of latents that were never active on the sample

It is refused when FVU is above 0.9, when the L0 that its publisher declares is off by more than a
factor of 2 (and by more than 2 latents), or when FVU is above 1.5 times the declared one + 0.1.
Figures depend on the sample, hence the wide margins; a wrong site misses them by far.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from services.common.errors import FailedPrecondition
from services.inference.engine.dictionaries.dictionary import Dictionary
from services.inference.engine.dictionaries.overrides import spelled
from services.inference.engine.dictionaries.sites import Header, Point, Site
from services.inference.engine.dictionaries.widths import Widths

FVU_LIMIT = 0.9
L0_FACTOR, L0_SLACK = 2.0, 2.0
FVU_FACTOR, FVU_SLACK = 1.5, 0.1

_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Measured:
    """What a dictionary does on a sample."""

    sample: str
    tokens: int
    fvu: float
    l0: float
    dead: float

    def __str__(self) -> str:
        return f"FVU {self.fvu:.3g}, L0 {self.l0:.3g}, {self.dead:.0%} dead"


@dataclass(frozen=True)
class Trial:
    """The same weights at other sites."""

    site_in: Site
    site_out: Site
    measured: Measured


class Meter:
    """Adds up activations, so that a sample may come in pieces. Sums are kept in float64."""

    def __init__(self, dictionary: Dictionary, sample: str) -> None:
        self._dictionary = dictionary
        self._sample = sample
        device, width = dictionary.w_enc.device, dictionary.header.d_out
        # MPS has no float64: sums live on the CPU.
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._fired = torch.zeros(dictionary.latents, dtype=torch.bool, device=device)
        self._tokens = 0
        self._active = 0
        self._square = self._unexplained = 0.0

    @torch.no_grad()
    def add(self, x_in: Tensor, x_out: Tensor, positions: Tensor | None = None) -> None:
        """x_in [n, d_in] and x_out [n, d_out] of n tokens, the same tensor but for a transcoder.

        `positions` [n] are the tokens' places in their sequences: those that the dictionary's
        training left out are left out here.
        """
        if positions is not None:
            kept = positions >= self._dictionary.header.declared.leave_out_first
            x_in, x_out = x_in[kept], x_out[kept]
        rows = max(1, _CHUNK_BYTES // (4 * self._dictionary.latents))
        if len(x_in) != len(x_out):
            raise ValueError(f"{len(x_in)} tokens in, {len(x_out)} out")
        for start in range(0, len(x_in), rows):
            x, target = x_in[start : start + rows], x_out[start : start + rows]
            f = self._dictionary.encode(x)
            error = self._dictionary.error(x, target, f).cpu().double()
            target = target.cpu().double()
            active = f != 0
            self._tokens += len(x)
            self._active += int(active.sum())
            self._fired |= active.any(0)
            self._sum += target.sum(0)
            self._square += float(target.square().sum())
            self._unexplained += float(error.square().sum())

    def measured(self) -> Measured:
        """The figures so far. Raises FailedPrecondition if no token was added."""
        if not self._tokens:
            raise FailedPrecondition(
                f"the sample {self._sample!r} has no token that dictionary "
                f"{self._dictionary.id} was trained for"
            )
        variance = self._square - float(self._sum.square().sum()) / self._tokens
        if variance > 1e-12 * self._square:
            fvu = self._unexplained / variance
        else:
            fvu = 0.0 if not self._unexplained else math.inf
        dead = 1 - float(self._fired.float().mean())
        return Measured(self._sample, self._tokens, fvu, self._active / self._tokens, dead)


def measure(
    dictionary: Dictionary,
    x_in: Tensor,
    x_out: Tensor,
    sample: str,
    positions: Tensor | None = None,
) -> Measured:
    """A whole sample at once; arguments as of `Meter.add`."""
    meter = Meter(dictionary, sample)
    meter.add(x_in, x_out, positions)
    return meter.measured()


def faults(header: Header, measured: Measured) -> list[str]:
    """What is wrong, with both numbers each; empty if it belongs there."""
    found = []
    declared = header.declared
    if not measured.fvu <= FVU_LIMIT:
        found.append(f"FVU is {measured.fvu:.3g}, above {FVU_LIMIT}")
    elif declared.fvu is not None and measured.fvu > FVU_FACTOR * declared.fvu + FVU_SLACK:
        found.append(f"FVU is {measured.fvu:.3g}, where its files declare {declared.fvu:.3g}")
    if declared.l0 is not None:
        apart = max(measured.l0, declared.l0) > L0_FACTOR * min(measured.l0, declared.l0)
        if apart and abs(measured.l0 - declared.l0) > L0_SLACK:
            found.append(f"L0 is {measured.l0:.3g}, where its files declare {declared.l0:.3g}")
    return found


def candidates(header: Header, widths: Widths) -> list[tuple[Site, Site]]:
    """Other sites of the same width that its weights may have been meant for.

    The other side of a post-norm, then the other points of the layer, then the neighbouring layers;
    of a transcoder, both sides of the MLP's gain and the residual. `Registered.at` reads weights
    for them.
    """
    if header.is_transcoder:
        pairs = [
            (site_in, replace(header.site_out, before_post_norm=before))
            for site_in in (
                Site(Point.MLP_IN, header.site_in.layer),
                Site(Point.MLP_IN, header.site_in.layer, before_gain=True),
                Site(Point.RESID_MID, header.site_in.layer),
            )
            for before in (False, True)
        ]
    else:
        site = header.site_in
        sides = [Site(p, site.layer, before) for p in Point for before in (False, True)]
        sides.sort(key=lambda other: other.point is not site.point)
        near = [replace(site, layer=site.layer + step) for step in (-1, 1)]
        pairs = [(other, other) for other in (*sides, *near)]
    found: list[tuple[Site, Site]] = []
    for pair in pairs:
        moved = replace(header, site_in=pair[0], site_out=pair[1])
        if pair not in found and pair != (header.site_in, header.site_out) and widths.fits(moved):
            found.append(pair)
    return found


def refusal(header: Header, measured: Measured, tried: Sequence[Trial] = ()) -> FailedPrecondition:
    """The refusal of a dictionary with `faults`, naming what was tried and the site that fits."""
    sentences = [
        f"dictionary {header.id} does not fit {_where(header.site_in, header.site_out)}: "
        f"{' and '.join(faults(header, measured))} "
        f"({measured} on {measured.tokens:,} tokens of {measured.sample})"
    ]
    fitting = None
    if tried:
        shown = ", ".join(
            f"{_where(trial.site_in, trial.site_out)} (FVU {trial.measured.fvu:.3g}, "
            f"L0 {trial.measured.l0:.3g})"
            for trial in tried
        )
        sentences.append(f"tried instead: {shown}")
        good = [
            t
            for t in tried
            if not faults(replace(header, site_in=t.site_in, site_out=t.site_out), t.measured)
        ]
        fitting = min(good, key=lambda trial: trial.measured.fvu, default=None)
    if fitting is None:
        sentences.append("none of them fits" if tried else "no other site was tried")
    else:
        sentences.append(
            f"it fits {_where(fitting.site_in, fitting.site_out)}: end its URI in "
            f"{spelled(fitting.site_in, fitting.site_out)}"
        )
    sentences.append("to serve it all the same, end it in ,unchecked")
    return FailedPrecondition("; ".join(sentences), reason="DICTIONARY_DOES_NOT_FIT")


def warning(header: Header, measured: Measured | None) -> str:
    """What every result with an unchecked dictionary says; empty if its self-test is passed."""
    if measured is None:
        return f"dictionary {header.id} was loaded unchecked, without a self-test"
    if found := faults(header, measured):
        return (
            f"dictionary {header.id} was loaded unchecked although it fails its self-test: "
            f"{' and '.join(found)}"
        )
    return ""


def _where(site_in: Site, site_out: Site) -> str:
    named = spelled(site_in, site_out).removeprefix("#site=")
    return named.replace(":", " to ")
