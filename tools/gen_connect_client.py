"""Makes the JavaScript code of the Connect client that the gateway is tested with:
`python -m tools.gen_connect_client`.

Beside our protos and the test's own it holds `google.rpc`'s details, so that the client can decode
what a refusal carries. Plain JavaScript: Node 20 runs no TypeScript.
"""

import shutil
from importlib.resources import files
from pathlib import Path


def generate(client: Path, protos: Path) -> None:
    """Compiles into `client`/gen. Raises RuntimeError when protoc refuses."""
    from grpc_tools import protoc

    out = client / "gen"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    arguments = [
        "protoc",
        f"-I{client}",
        f"-I{protos}",
        f"-I{files('google.rpc') / '..' / '..'}",
        f"-I{files('grpc_tools') / '_proto'}",
        f"--plugin=protoc-gen-es={client / 'node_modules' / '.bin' / 'protoc-gen-es'}",
        f"--es_out={out}",
        "--es_opt=target=js,import_extension=js",
        "echo.proto",
        "google/rpc/error_details.proto",
        *sorted(str(path.relative_to(protos)) for path in protos.rglob("*.proto")),
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc refused the files above")


if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    generate(root / "tests" / "gateway" / "connect_client", root / "protos")
