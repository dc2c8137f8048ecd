"""The suffix of a URI that says where a dictionary belongs: `folder#site=mlp_out.3`.

    #site=mlp_out.3                 reads and writes there
    #site=mlp_in.3:mlp_out.3        a transcoder
    #site=mlp_out                   the layer as the files say it
    #site=mlp_out.3.before          before a post-norm (or `.after` it), where the model has one

It beats what the files say, and the load-time self-test still has to agree.
"""

import re
from dataclasses import dataclass

from services.common.errors import FailedPrecondition
from services.inference.engine.dictionaries.sites import Point, Site

_SITE = re.compile(r"([a-z_]+)(?:\.(\d+))?(?:\.(before|after))?\Z")


@dataclass(frozen=True)
class End:
    """One end of a dictionary as a URI names it; None leaves what the files or formats say."""

    point: Point
    layer: int | None
    before_post_norm: bool | None

    def in_place_of(self, site: Site) -> Site:
        """The named site. A point that stays keeps its side of the post-norm unless told."""
        layer = site.layer if self.layer is None else self.layer
        stays = self.point is site.point and site.before_post_norm
        return Site(self.point, layer, self._before(stays))

    def site(self, layer: int | None, before_post_norm: bool) -> Site | None:
        """The site for a file that names none; None if its layer is not known either."""
        layer = layer if self.layer is None else self.layer
        return None if layer is None else Site(self.point, layer, self._before(before_post_norm))

    def _before(self, otherwise: bool) -> bool:
        return otherwise if self.before_post_norm is None else self.before_post_norm


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
    if site.point not in (Point.ATTN_OUT, Point.MLP_OUT):
        return str(site)
    return f"{site}.{'before' if site.before_post_norm else 'after'}"


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
        layer = int(match[2]) if match[2] else None
        ends.append(End(Point(match[1]), layer, match[3] == "before" if match[3] else None))
    if ends[0].layer != ends[-1].layer:
        raise FailedPrecondition(f"{uri!r}: both sites need the same layer")
    return location, Override(ends[0], ends[-1])
