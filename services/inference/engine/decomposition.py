"""Dictionaries in the node table: latents for the nodes of a sublayer, and views of the stream.

A dictionary that is asked for stands for the neurons or heads of the sublayer it reads: its
latents, bias, skip and error add up to what stood there before. One that reads the residual stream
is a view: its latents have the same columns, but are outside the table's sum and close on their
own. An edit of a dictionary that stands for nothing adds a row `edit.<target>~t` of what it wrote.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from services.common.addresses import Address, Kind
from services.inference.engine.bound import BoundDictionary, residual_point
from services.inference.engine.direct_path import DirectPath
from services.inference.engine.latents import LatentNodes
from services.inference.engine.numerics import precise
from services.inference.engine.run_view import RunView, before_post_norm
from services.inference.engine.splice import LatentSite


@dataclass(frozen=True)
class View:
    """Sums of one dictionary of the residual stream: latents + bias + error = site."""

    dictionary: str
    latents: float
    bias: float
    error: float
    site: float
    """x . G(x)"""


@dataclass
class Decomposition:
    """What dictionaries put in the table of one run."""

    groups: list[LatentNodes] = field(default_factory=list)
    remainder: dict[str, float] = field(default_factory=dict)
    views: list[View] = field(default_factory=list)


class Standing:
    """The dictionaries of a table."""

    def __init__(self, dictionaries: Sequence[BoundDictionary]) -> None:
        """No two of them may stand for the same sublayer."""
        self.dictionaries = tuple(sorted(dictionaries, key=lambda bound: bound.id))
        self._of = {
            (bound.sublayer, bound.layer): bound for bound in dictionaries if not bound.is_view
        }

    def of(self, sublayer: Kind, layer: int) -> BoundDictionary | None:
        """The one whose latents stand for this sublayer's nodes."""
        return self._of.get((sublayer, layer))

    def absorbs(self, edited: BoundDictionary) -> bool:
        """Whether what edits of a dictionary write is in the rows of one that stands here."""
        if edited.is_view or edited.sublayer is None:
            return False
        standing = self.of(edited.sublayer, edited.layer)
        if standing is None:
            return False
        return standing.id == edited.id or edited.precedes(standing)


def decompose(
    run: RunView,
    standing: Standing,
    path: DirectPath,
    gradients: dict[str, Tensor],
    reads: tuple[int, ...],
) -> Decomposition:
    """`gradients` has G at each standing dictionary's site, [B, T, d_out]; `reads` are the tokens
    at which g* is not 0."""
    found = Decomposition()
    for bound in standing.dictionaries:
        site = run.captured.sites.found[bound.id]
        _add(found, run, site, met_at(run, path, bound), gradients[bound.id], reads)
    for site in run.captured.sites.found.values():
        if not standing.absorbs(site.bound):
            for node, effect in _edit_rows(run, site, met_at(run, path, site.bound)).items():
                name = f"edit.{node}"
                found.remainder[name] = found.remainder.get(name, 0.0) + effect
    return found


def met_at(run: RunView, path: DirectPath, bound: BoundDictionary) -> Tensor:
    """[T, d_out]: the gradient that writes at a dictionary's site meet on the direct path."""
    if bound.sublayer is None:
        return path.residual[residual_point(bound.site)]
    if bound.passes_post_norm:
        gradient = before_post_norm(run, path, bound.sublayer, bound.layer)
    else:
        gradient = (path.attention if bound.sublayer is Kind.ATTN else path.mlp)[bound.layer]
    return bound.from_residual(gradient)


def _add(
    found: Decomposition,
    run: RunView,
    site: LatentSite,
    met: Tensor,
    gradient: Tensor,
    reads: tuple[int, ...],
) -> None:
    bound, row, length = site.bound, run.row, run.tokens
    clean = site.clean(row, length)
    gradient = gradient[row, :length]
    post_scale = None
    if bound.sublayer is not None and bound.passes_post_norm:
        post_scale = run.post_norm_scale(bound.sublayer, bound.layer)
    nodes = LatentNodes(
        bound,
        site.values(row, clean),
        site.normalised(row, length).scale,
        post_scale,
        gradient,
        met,
        reads,
    )
    found.groups.append(nodes)
    if not bound.is_view:
        for kind, write in site.parts(row, clean, reads).items():
            found.remainder[f"{kind.value}.{bound.id}"] = dot(write, met[list(reads)])
        return
    parts = site.parts(row, clean, range(length))
    found.views.append(
        View(
            bound.id,
            latents=nodes.total_total(),
            bias=dot(parts[Kind.BIAS], gradient),
            error=dot(parts[Kind.ERROR], gradient),
            site=dot(site.after[row, :length].detach(), gradient),
        )
    )


def _edit_rows(run: RunView, site: LatentSite, met: Tensor) -> dict[Address, float]:
    """Direct effect of what edits of a dictionary write, by the edited node."""
    rows: dict[Address, float] = defaultdict(float)
    for edit, change in site.added.get(run.row, []):
        effects = (precise(change) * precise(met[list(edit.positions)])).sum(1)
        for position, effect in zip(edit.positions, effects.tolist(), strict=True):
            if effect:
                rows[edit.target.component.at(position)] += effect
    return rows


def dot(left: Tensor, right: Tensor) -> float:
    """The sum of all products, in float64."""
    return float((precise(left) * precise(right)).sum())
