"""docs/points.md, written from the registry of points.

`python -m services.inference.points_page` writes it anew; with `--check` it only says whether that
is due.
"""

import sys
from pathlib import Path

from services.inference.engine.points import as_page

PAGE = Path(__file__).parents[2] / "docs" / "points.md"


def main() -> int:
    if "--check" not in sys.argv:
        PAGE.write_text(as_page())
    elif PAGE.read_text() != as_page():
        print(f"{PAGE} is behind: run python -m services.inference.points_page")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
