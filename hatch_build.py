"""Build hook: every install and every wheel carries stubs made from `protos/`."""

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StubBuildHook(BuildHookInterface):  # type: ignore[misc]  # hatchling ships no types
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        sys.path.insert(0, str(root))
        from tools.gen_protos import generate

        generate(root / "protos", root / "client")
