"""Holds the protos against those of the newest tag: `python -m tools.breaking`.

The packages are frozen from the first tag `v*` on; before that there is nothing to break.
"""

import subprocess
import sys
from pathlib import Path


def newest_tag(root: Path) -> str | None:
    """The highest `v*` by version, wherever it is; a release stands above its candidates."""
    order = ("-c", "versionsort.suffix=-", "tag", "--list", "v*", "--sort=-version:refname")
    listed = subprocess.run(
        ["git", "-C", str(root), *order], stdout=subprocess.PIPE, text=True, check=True
    )
    return next(iter(listed.stdout.split()), None)


def check(root: Path, buf: str) -> tuple[bool, str]:
    """Whether all is well with the protos below `root`, and what to say about it."""
    tag = newest_tag(root)
    if tag is None:
        return True, "no tag v* yet: nothing to compare the protos with"
    run = subprocess.run(
        [buf, "breaking", "--against", f".git#tag={tag}"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode == 0:
        return True, f"the protos break nothing that {tag} has"
    return False, f"{run.stdout}{run.stderr}the protos break what {tag} has"


def main() -> int:
    buf = Path(sys.executable).parent / "buf"
    good, text = check(Path(__file__).resolve().parent.parent, str(buf))
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
