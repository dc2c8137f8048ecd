"""The Dockerfile as stages and instructions, and what is wrong with it."""

import importlib.util
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSION: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

# Where an image with the demo has it, without versions in the path.
DEMO = "/opt/tdb/demo"

# Target -> the module that it runs and the port that it listens on by default.
TARGETS = {
    "gateway": ("gateway", "TDB_GATEWAY_PORT"),
    "dataset": ("services.dataset", "TDB_DATASET_PORT"),
    "explainer": ("services.explainer", "TDB_EXPLAINER_PORT"),
    "inference": ("services.inference", "TDB_INFERENCE_PORT"),
}


@dataclass
class Stage:
    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Dockerfile:
    arguments: dict[str, str]
    """ARGs before the first stage, which base images may use."""
    stages: dict[str, Stage]

    @classmethod
    def parse(cls, text: str) -> "Dockerfile":
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
        joined = re.sub(r"\\\n", " ", "\n".join(lines))
        arguments: dict[str, str] = {}
        stages: dict[str, Stage] = {}
        stage: Stage | None = None
        for line in filter(None, (line.strip() for line in joined.splitlines())):
            name, _, rest = line.partition(" ")
            if name == "FROM":
                base, _, alias = rest.partition(" AS ")
                stage = stages[alias] = Stage(alias, base.strip())
            elif stage is None:
                variable, _, default = rest.partition("=")
                arguments[variable] = default
            else:
                stage.instructions.append((name, " ".join(rest.split())))
        return cls(arguments, stages)

    def chain(self, target: str) -> list[tuple[str, str]]:
        """All instructions that make a target's image, its bases' first."""
        stage = self.stages[target]
        before = self.chain(stage.base) if stage.base in self.stages else []
        return before + stage.instructions

    def last(self, target: str, name: str) -> str:
        found = [rest for each, rest in self.chain(target) if each == name]
        return found[-1] if found else ""

    def environment(self, target: str) -> dict[str, str]:
        pairs = [rest for name, rest in self.chain(target) if name == "ENV"]
        return dict(pair.partition("=")[::2] for each in pairs for pair in each.split())

    def found(self, target: str, environment: Mapping[str, str]) -> dict[str, str]:
        """The environment with the demo's folders, if the image has them, as they are here."""
        chain = self.chain(f"{target}-environment")
        if not any(name == "RUN" and rest.endswith(f" {DEMO}") for name, rest in chain):
            return dict(environment)
        return {key: each.replace(DEMO, str(ROOT / "demo")) for key, each in environment.items()}

    def images(self) -> list[str]:
        """The images that are built on."""
        bases = [stage.base for stage in self.stages.values() if stage.base not in self.stages]
        return [re.sub(r"\$\{(\w+)\}", lambda m: self.arguments.get(m[1], ""), b) for b in bases]


def read() -> Dockerfile:
    return Dockerfile.parse((ROOT / "Dockerfile").read_text())


def tag_problem(image: str) -> str:
    """Why a name does not say which image it is; "" when it does."""
    _, colon, tag = image.rpartition(":")
    if not colon or "/" in tag or tag in ("", "latest"):
        return f"{image} has no tag of its own"
    return ""


def module_problem(command: list[str]) -> str:
    """What a command runs that is not there; "" when all is."""
    if command[:2] != ["python", "-m"]:
        return f"{command} is not python -m"
    module = command[2]
    if importlib.util.find_spec(module) is None:
        return f"{module} is not a module"
    if "." not in module and importlib.util.find_spec(f"{module}.__main__") is None:
        return f"{module} cannot be run"
    return ""


def exec_form(text: str) -> list[str] | None:
    """A command as a list; None for one that a shell would run, which keeps signals to itself."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, list) else None


def problems(file: Dockerfile, ports: dict[str, str]) -> list[str]:
    """`ports`: the default of each port's setting."""
    found = [problem for image in file.images() if (problem := tag_problem(image))]
    for target, (module, port_variable) in TARGETS.items():
        if target not in file.stages:
            found.append(f"there is no target {target}")
            continue
        port = ports[port_variable]
        command = exec_form(file.last(target, "CMD"))
        if command != ["python", "-m", module]:
            found.append(f"{target} does not run {module} in exec form")
        elif problem := module_problem(command):
            found.append(problem)
        if file.last(target, "EXPOSE") != port:
            found.append(f"{target} does not expose {port}")
        check = exec_form(file.last(target, "HEALTHCHECK").partition("CMD ")[2])
        if check is None or module_problem(check) or f":{port}" not in check[-1]:
            found.append(f"{target} has no health check at {port}")
        if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", file.last(target, "USER")):
            found.append(f"{target} runs as root, or as a user without a number")
        if file.last(target, "STOPSIGNAL") != "SIGTERM":
            found.append(f"{target} is not stopped by SIGTERM")
        installs = " ".join(
            rest
            for name, rest in file.chain(f"{target}-environment")
            if name == "RUN" and "pip install" in rest
        )
        if f"[{target}," not in installs:
            found.append(f"{target} does not install its own extra")
        if ("torch" in installs.lower()) != (target == "inference"):
            found.append(f"{target} and torch do not belong together")
    return found
