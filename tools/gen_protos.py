"""Makes the Python stubs: `python -m tools.gen_protos`.

The proto package is the import path (`tdb.inference.v1`), so protoc's own imports are right as
they come and nothing is rewritten afterwards.
"""

from importlib.resources import files
from pathlib import Path


def generate(protos: Path, out: Path) -> None:
    """Compiles every file below `protos` into `out`. Raises RuntimeError when protoc refuses."""
    from grpc_tools import protoc

    sources = sorted(str(path) for path in protos.rglob("*.proto"))
    arguments = [
        "protoc",
        f"-I{protos}",
        f"-I{files('grpc_tools') / '_proto'}",
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out=quiet:{out}",
        f"--mypy_grpc_out=quiet:{out}",
        *sources,
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc refused the files above")


if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    generate(root / "protos", root / "client")
