"""The suffix of a URI that says where a dictionary belongs: `folder#site=mlp_out.3`.

    #site=mlp_out.3                 reads and writes there
    #site=mlp_in.3:mlp_out.3        a transcoder
    #site=mlp_out                   the layer, as the file names say it

It beats what the files say, and the load-time self-test still has to agree.
"""

import re
from dataclasses import dataclass, replace

from services.common.errors import FailedPrecondition
from services.inference.engine.dictionaries.sites import Point, Site

_SITE = re.compile(r"([a-z_]+)(?:\.(\d+))?\Z")


@dataclass(frozen=True)
class Override:
    """Points in place of the files'; a layer of None leaves the files' layer."""

    point_in: Point
    point_out: Point
    layer: int | None

    def apply(self, site_in: Site, site_out: Site) -> tuple[Site, Site]:
        """The sites in place of these. A point that stays keeps its side of the post-norm."""
        return self._moved(site_in, self.point_in), self._moved(site_out, self.point_out)

    def sites(self, layer: int | None, before_post_norm: bool) -> tuple[Site, Site] | None:
        """The sites of a file that names none; None where the layer is not known either."""
        layer = self.layer if self.layer is not None else layer
        if layer is None:
            return None
        return (
            Site(self.point_in, layer, before_post_norm),
            Site(self.point_out, layer, before_post_norm),
        )

    def _moved(self, site: Site, point: Point) -> Site:
        layer = site.layer if self.layer is None else self.layer
        if point is site.point:
            return replace(site, layer=layer, before_gain=False)
        return Site(point, layer)


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
    points, layers = [], set()
    for match in matches:
        assert match is not None
        if match[1] not in set(Point):
            raise FailedPrecondition(
                f"{uri!r}: {match[1]!r} is no point; the points are {', '.join(Point)}"
            )
        points.append(Point(match[1]))
        layers.add(int(match[2]) if match[2] else None)
    if len(layers) != 1:
        raise FailedPrecondition(f"{uri!r}: both sites need the same layer")
    return location, Override(points[0], points[-1], layers.pop())
