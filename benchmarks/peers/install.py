"""Installs a peer into an environment of its own: `python -m benchmarks.peers.install NAME`."""

import subprocess
import sys
import venv
from pathlib import Path

TORCH = "torch==2.13.0"
PEERS = {"transformer-lens": ("transformer-lens==3.9.0",)}
"""By name, what is installed after torch."""

FOLDER = Path(__file__).parent / "environments"


def python_of(peer: str) -> Path:
    """The peer's interpreter; installs it the first time."""
    folder = FOLDER / peer
    python = folder / "bin" / "python"
    done = folder / "installed"
    if not done.exists():
        venv.create(folder, with_pip=True)
        # torch first and by its own line, or pip would take the largest CUDA build there is.
        for packages in ((TORCH,), PEERS[peer]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        done.touch()
    return python


if __name__ == "__main__":
    print(python_of(sys.argv[1]))
