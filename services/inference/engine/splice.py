"""Dictionaries in the forward pass: what each one reads, and the edits of its parts.

    x' = x + sum over edited latents of (f' - f) dec + what edits of its error, skip and bias change

f is the encoder's value of the site after everything upstream was edited; it is not computed again
after an edit. Without an edit of the dictionary nothing is added and the model's numbers stay as
they are, to the bit. With one the sum is differentiated as it stands, the encoder included.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from services.common.addresses import Kind
from services.inference.engine.bound import BoundDictionary
from services.inference.engine.dictionaries.dictionary import Normalised
from services.inference.engine.dictionaries.sites import Site
from services.inference.engine.interventions import Edit

EditsOf = Callable[[str], dict[int, list[tuple[int, Edit]]]]
"""The edits of a dictionary by row, numbered within it."""
Apply = Callable[[int, int, Edit, Tensor], Tensor]
"""From row, number of the edit in it, the edit and values before it to the values after it."""


@dataclass
class LatentSite:
    """One dictionary in one pass."""

    bound: BoundDictionary
    x: Tensor
    """[B, T, d_in]: what it encodes."""
    target: Tensor
    """[B, T, d_out]: its output site before edits of any dictionary there."""
    after: Tensor = field(init=False)
    """[B, T, d_out]: the same after them."""
    added: dict[int, list[tuple[Edit, Tensor]]] = field(default_factory=dict)
    """Per row the edits of its parts, in order, with what each added at its positions, detached."""
    _edited: dict[int, list[tuple[Edit, Tensor]]] = field(default_factory=dict)
    """Per row the edits of latents with the values they left at their positions, detached."""
    _pre_activations: dict[tuple[int, bool], Tensor] = field(default_factory=dict)

    def pre_activation(self, latent: int, *, frozen: bool) -> Tensor:
        """[B, T, 1]: what goes into a latent's activation, the same tensor of the graph each time;
        `frozen` holds norm_in's scale constant."""
        if (latent, frozen) not in self._pre_activations:
            index = torch.tensor([latent], device=self.x.device)
            pre = self.bound.dictionary.pre_activation_of(self.x, index, frozen=frozen)
            self._pre_activations[latent, frozen] = pre
        return self._pre_activations[latent, frozen]

    def normalised(self, row: int, length: int) -> Normalised:
        """norm_in of the row's real tokens, detached."""
        return self.bound.dictionary.normalise(self.x[row, :length].detach())

    @torch.no_grad()
    def clean(self, row: int, length: int) -> Tensor:
        """[T, N]: f before edits, detached."""
        return self.bound.dictionary.encode(self.x[row, :length])

    def values(self, row: int, clean: Tensor) -> Tensor:
        """[T, N]: `clean` with the row's edits, detached."""
        if row not in self._edited:
            return clean
        values = clean.clone()
        for edit, after in self._edited[row]:
            values[list(edit.positions), edit.target.index] = after
        return values

    def splice(self, row: int, edits: Sequence[tuple[int, Edit]], apply: Apply) -> Tensor:
        """[T, d_out]: what the row's edits of this dictionary add at the site."""
        dictionary = self.bound.dictionary
        x = self.x[row]
        _, scale, mean = dictionary.normalise(x)
        added = torch.zeros_like(self.target[row])

        def add(edit: Edit, change: Tensor) -> None:
            nonlocal added
            self.added.setdefault(row, []).append((edit, change.detach()))
            at = torch.tensor(edit.positions, device=x.device)
            added = added.index_add(0, at, change.to(added.dtype))

        latents = list(
            dict.fromkeys(
                edit.target.index
                for _, edit in edits
                if edit.target.kind is Kind.LATENT and edit.target.index is not None
            )
        )
        clean = dictionary.encode_of(x, torch.tensor(latents, device=x.device)) if latents else x
        values = clean
        for number, edit in edits:
            positions = list(edit.positions)
            if edit.target.kind is not Kind.LATENT:
                write = self._part(edit.target.kind, row, scale, mean)[positions]
                add(edit, apply(row, number, edit, write) - write)
                continue
            assert edit.target.index is not None
            where = (positions, latents.index(edit.target.index))
            before = values[where]
            values = values.clone()
            values[where] = after = apply(row, number, edit, before)
            self._edited.setdefault(row, []).append((edit, after.detach()))
            unit = dictionary.w_dec[edit.target.index] * scale[positions]
            add(edit, (after - before)[:, None] * unit)
        return added

    def _part(self, kind: Kind, row: int, scale: Tensor, mean: Tensor) -> Tensor:
        """[T, d_out]: what the dictionary's error, skip or bias writes at its site, unedited."""
        dictionary, x = self.bound.dictionary, self.x[row]
        match kind:
            case Kind.ERROR:
                return dictionary.error(x, self.target[row])
            case Kind.SKIP:
                return dictionary.skip_write(x)
            case _:
                return dictionary.bias_write(scale, mean)

    @torch.no_grad()
    def parts(self, row: int, clean: Tensor, tokens: Sequence[int]) -> dict[Kind, Tensor]:
        """What error, skip and bias write at the site at n tokens, each [n, d_out], after the
        row's edits. `clean` is f of all tokens, [T, N]."""
        at = list(tokens)
        x, target, clean = self.x[row, at], self.target[row, at], clean[at]
        dictionary = self.bound.dictionary
        _, scale, mean = dictionary.normalise(x)
        found = {
            Kind.BIAS: dictionary.bias_write(scale, mean),
            Kind.ERROR: dictionary.error(x, target, clean),
        }
        if dictionary.skip is not None:
            found[Kind.SKIP] = dictionary.skip_write(x)
        for edit, change in self.added.get(row, []):
            if edit.target.kind not in found:
                continue
            for number, position in enumerate(edit.positions):
                if position in at:
                    found[edit.target.kind][at.index(position)] += change[number]
        return found


class Sites:
    """All dictionaries of one pass, by where they read and write."""

    def __init__(self, dictionaries: Sequence[BoundDictionary]) -> None:
        self._read: dict[Site, list[BoundDictionary]] = {}
        self._written: dict[Site, list[BoundDictionary]] = {}
        for bound in dictionaries:
            self._read.setdefault(bound.site_in, []).append(bound)
            self._written.setdefault(bound.site, []).append(bound)
        self._inputs: dict[str, Tensor] = {}
        self.found: dict[str, LatentSite] = {}

    def wants(self, site: Site) -> bool:
        return site in self._read or site in self._written

    def visit(self, site: Site, x: Tensor, edits_of: EditsOf, apply: Apply) -> Tensor:
        """Captures what is read here and adds what edits change; [B, T, w] -> [B, T, w]."""
        for bound in self._read.get(site, ()):
            self._inputs[bound.id] = x
        here = [
            LatentSite(bound, self._inputs[bound.id], x) for bound in self._written.get(site, ())
        ]
        # Not x itself: what reads x is not reached by what dictionaries write here.
        after = x.view_as(x)
        for latents in here:
            for row, edits in edits_of(latents.bound.id).items():
                added = latents.splice(row, edits, apply)
                after = after.index_add(0, torch.tensor([row], device=x.device), added[None])
        for latents in here:
            latents.after = after
            self.found[latents.bound.id] = latents
        return after


class Probe:
    """Stands in for `Sites` in a pass that only looks: keeps what stands at some sites."""

    def __init__(self, sites: Collection[Site]) -> None:
        self._sites = frozenset(sites)
        self.seen: dict[Site, Tensor] = {}
        """[B, T, w] of the last pass, detached."""
        self.found: dict[str, LatentSite] = {}

    def wants(self, site: Site) -> bool:
        return site in self._sites

    def visit(self, site: Site, x: Tensor, edits_of: EditsOf, apply: Apply) -> Tensor:
        self.seen[site] = x.detach()
        return x
