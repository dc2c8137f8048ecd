"""The suffix of a URI that says where a dictionary belongs: `folder#site=mlp_out.3`.

    #site=mlp_out.3                 reads and writes there
    #site=mlp_in.3:mlp_out.3        a transcoder
    #site=mlp_out                   the layer as the files say it
    #site=mlp_out.3.before          before a post-norm (or `.after` it), where the model has one
    #site=mlp_in.3.before:mlp_out.3 before the gain of the MLP's norm (or `.after` it)

It beats what the files say, and the load-time self-test still has to agree.
"""

import re
from dataclasses import dataclass

from services.common.errors import FailedPrecondition
from services.inference.engine.dictionaries.sites import Point, Site

_SITE = re.compile(r"([a-z_]+)(?:\.(\d+))?(?:\.(before|after))?\Z")
_SIDED = (Point.ATTN_OUT, Point.MLP_OUT, Point.MLP_IN)


@dataclass(frozen=True)
class End:
    """One end of a dictionary as a URI names it; None leaves what the files or formats say."""

    point: Point
    layer: int | None
    before: bool | None
    """Before the post-norm; of `mlp_in`, before the gain."""

    def in_place_of(self, site: Site) -> Site:
        """The named site. A point that stays keeps its side of the post-norm unless told."""
        layer = site.layer if self.layer is None else self.layer
        return self._placed(layer, self.point is site.point and site.before_post_norm)

    def site(self, layer: int | None, before_post_norm: bool) -> Site | None:
        """The site for a file that names none; None if its layer is not known either."""
        layer = layer if self.layer is None else self.layer
        return None if layer is None else self._placed(layer, before_post_norm)

    def _placed(self, layer: int, before_post_norm: bool) -> Site:
        if self.point is Point.MLP_IN:
            return Site(self.point, layer, before_gain=bool(self.before))
        before = before_post_norm if self.before is None else self.before
        return Site(self.point, layer, before_post_norm=before)


@dataclass(frozen=True)
class Override:
    """Both ends; the same end twice where the URI names one."""

    reads: End
    writes: End


def spelled(site_in: Site, site_out: Site) -> str:
    """The suffix that names these sites, the side of a post-norm included."""
    ends = [site_in] if site_in == site_out else [site_in, site_out]
    return "#site=" + ":".join(map(_end, ends))


def _end(site: Site) -> str:
    if site.point not in _SIDED:
        return str(site)
    return f"{site}.{'before' if site.before_post_norm or site.before_gain else 'after'}"


def split(uri: str) -> tuple[str, Override | None]:
    """A URI without its suffix, and what the suffix says. Raises FailedPrecondition."""
    location, hash_, fragment = uri.partition("#")
    if not hash_:
        return uri, None
    key, _, value = fragment.partition("=")
    parts = value.split(":")
    matches = [_SITE.match(part) for part in parts]
    if key != "site" or not 1 <= len(parts) <= 2 or not all(matches):
        raise FailedPrecondition(
            f"{uri!r} ends in #{fragment}, but only #site=POINT.LAYER or "
            "#site=POINT.LAYER:POINT.LAYER is understood"
        )
    ends = []
    for match in matches:
        assert match is not None
        if match[1] not in set(Point):
            raise FailedPrecondition(
                f"{uri!r}: {match[1]!r} is no point; the points are {', '.join(Point)}"
            )
        if match[3] and match[1] not in _SIDED:
            raise FailedPrecondition(
                f"{uri!r}: .{match[3]} means something at {', '.join(_SIDED)} only"
            )
        layer = int(match[2]) if match[2] else None
        ends.append(End(Point(match[1]), layer, match[3] == "before" if match[3] else None))
    if ends[0].layer != ends[-1].layer:
        raise FailedPrecondition(f"{uri!r}: both sites need the same layer")
    return location, Override(ends[0], ends[-1])
