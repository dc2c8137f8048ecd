"""Dependencies point one way: web -> gateway -> stubs <- services.

Read from the source, not from what happens to be loaded, so that an import inside a function
counts too, except where a rule says that it may stand there.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCH = ("torch", "transformers", "interp_engine", "safetensors", "tokenizers")
PROTOCOL = ("google.protobuf", "google.rpc", "grpc", "tdb")
# Whoever imports one of these can send text to others.
LANGUAGE_MODELS = ("openai", "anthropic", "litellm")
ASKING = ("openai_calls.py", "openai_provider.py", "openai_embeddings.py")


def imports(source: str, *, lazy: bool = True) -> set[str]:
    """The modules that a file imports; without those inside functions where `lazy` is False."""
    return set(_imports(ast.parse(source), lazy))


def _imports(node: ast.AST, lazy: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute, so that the rules can be read"
            yield str(child.module)
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif lazy or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _imports(child, lazy)


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def forbidden(path: Path, source: str) -> set[str]:
    """What the file at `path` imports and must not."""
    parts = path.relative_to(ROOT).parts
    every = imports(source)
    found: set[str] = set()
    if parts[:2] != ("services", "inference") and parts[0] != "demo":
        found |= {module for module in every if within(module, TORCH)}
    if parts[0] == "services":
        mine = (f"services.{parts[1]}", "services.common")
        found |= {
            module
            for module in every
            if (within(module, ("services",)) and module != "services" and not within(module, mine))
            or within(module, ("gateway", "demo", "tdb.cli", "tdb.children", "tdb.supervisor"))
        }
        if parts[:3] != ("services", "explainer", "engine") or parts[-1] not in ASKING:
            found |= {module for module in every if within(module, LANGUAGE_MODELS)}
        if "engine" in parts:
            found |= {module for module in every if within(module, PROTOCOL)}
    if parts[0] == "gateway":
        found |= {
            module
            for module in every
            if within(module, ("services", "demo"))
            and module != "services"
            and not within(module, ("services.common",))
        }
    if parts[0] == "client":
        # The command starts services as processes; it reads their settings inside functions, so
        # that `import tdb` and `tdb --version` work with the client alone.
        at_import = imports(source, lazy=False)
        found |= {module for module in at_import if within(module, ("services", "gateway", "demo"))}
        found |= {
            module
            for module in every
            if within(module, ("services", "gateway", "demo"))
            and not within(module, ("services.common",))
        }
    return found


def sources() -> list[Path]:
    folders = ("services", "gateway", "client", "demo", "tools")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in files if "_pb2" not in path.name)


def test_there_is_something_to_check() -> None:
    names = {str(path.relative_to(ROOT)) for path in sources()}
    assert {"services/common/settings.py", "gateway/app.py", "client/tdb/cli.py"} <= names


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    assert forbidden(path, path.read_text()) == set()


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("services/common/x.py", "import torch.nn", {"torch.nn"}),
        ("services/inference/x.py", "import torch.nn", set()),
        ("services/inference/x.py", "import services.dataset.x", {"services.dataset.x"}),
        ("services/inference/x.py", "import services.common.errors", set()),
        ("services/inference/engine/x.py", "import grpc.aio", {"grpc.aio"}),
        ("services/inference/engine/x.py", "def f():\n  import tdb", {"tdb"}),
        ("services/explainer/engine/x.py", "import torch", {"torch"}),
        ("services/explainer/engine/x.py", "import tdb.dataset.v1", {"tdb.dataset.v1"}),
        ("services/explainer/engine/x.py", "import services.dataset", {"services.dataset"}),
        ("services/explainer/engine/x.py", "from openai import a", {"openai", "openai.a"}),
        ("services/explainer/engine/openai_provider.py", "import openai", set()),
        ("services/explainer/x.py", "import openai", {"openai"}),
        ("gateway/x.py", "import services.inference.x", {"services.inference.x"}),
        ("gateway/x.py", "import services.common.x", set()),
        ("client/tdb/x.py", "import services.common.x", {"services.common.x"}),
        ("client/tdb/x.py", "def f():\n  import services.common.x", set()),
        ("client/tdb/x.py", "def f():\n  import gateway.app", {"gateway.app"}),
        ("client/tdb/x.py", "def f():\n  import torch", {"torch"}),
    ],
)
def test_the_rules_find_what_they_are_for(path: str, source: str, found: set[str]) -> None:
    assert forbidden(ROOT / path, source) == found
