"""What the images run, as near as it comes without a container engine: the wheel in an environment
of its own, each process with the settings of its image and of the compose file, asked for its
health by the compose file's own check."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.helpers import until
from tests.deploy import compose, dockerfile
from tests.deploy.dockerfile import ROOT, TARGETS

pytestmark = pytest.mark.long

SERVICE = "/tdb.inference.v1.InferenceService"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with our wheel, and with this one's packages for the rest."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip"]
    beside = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # protoc's plug-ins
    subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)],
        check=True,
        env={**os.environ, "PATH": beside},
    )
    venv.create(folder / "venv")
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "-t", packages, wheel], check=True)
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv/bin/python"


class Stack:
    """The processes of the compose file, on free ports of this machine and without its Redis."""

    def __init__(self, python: Path, folder: Path) -> None:
        self.python = python
        self.folder = folder
        self.ports = {target: _free_port() for target in TARGETS}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        tokens = {**compose.template(), "TDB_TOKENS": compose.TOKENS}
        self._services = compose.interpolated(compose.read(), tokens)["services"]
        self._image = dockerfile.read()

    def start(self, name: str) -> None:
        command = dockerfile.exec_form(self._image.last(name, "CMD"))
        assert command is not None
        with (self.folder / f"{name}.log").open("w") as log:
            self.processes[name] = subprocess.Popen(
                [str(self.python), *command[1:]],
                env=self._env(name),
                cwd=self.folder,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def healthy(self, name: str) -> bool:
        port = compose.DEFAULTS[TARGETS[name][1]]
        check = [each.replace(port, self.ports[name]) for each in self._check(name)]
        command = [str(self.python), *check[2:]]
        return subprocess.run(command, env=self._env(name), capture_output=True).returncode == 0

    def _check(self, name: str) -> list[str]:
        check: list[str] = self._services[name]["healthcheck"]["test"]
        return check

    def _env(self, name: str) -> dict[str, str]:
        (demo,) = self.python.parents[1].glob("lib/python*/site-packages/demo")
        settings = compose.environment(self._services[name], self._image)
        here = {
            **{key: value.replace("/opt/tdb/demo", str(demo)) for key, value in settings.items()},
            "PATH": os.environ["PATH"],
            "OMP_NUM_THREADS": "1",
            "HF_HOME": str(self.folder / "hub"),
            "TDB_DATA_DIR": str(self.folder / "data"),
            "TDB_HOST": "127.0.0.1",
            "TDB_REDIS_URL": "",
            f"TDB_{name.upper()}_METRICS_PORT": "",
            TARGETS[name][1]: self.ports[name],
        }
        for target, port in self.ports.items():
            here[f"TDB_{target.upper()}_ADDRESS"] = f"127.0.0.1:{port}"
        del here["TDB_GATEWAY_ADDRESS"]
        return here

    def ask(self, method: str, path: str, body: str = "", token: str = "") -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", int(self.ports["gateway"]), timeout=60)
        headers = {"content-type": "application/json", "authorization": f"Bearer {token}"}
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, text


def _free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.fixture
def stack(python: Path, tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(python, tmp_path)
    yield stack
    for process in stack.processes.values():
        process.kill()
        process.wait()


def test_the_processes_serve_the_demo_and_stop_when_told(stack: Stack) -> None:
    assert not stack.healthy("inference")
    for name in ("inference", "dataset", "explainer", "gateway"):
        stack.start(name)
    for name in stack.processes:
        until(f"{name} is healthy", lambda name=name: stack.healthy(name), 90)  # type: ignore[misc]
    until("the gateway reaches them", lambda: stack.ask("GET", "/readyz")[0] == 200)
    status, page = stack.ask("GET", "/")
    assert (status, "<!doctype html>" in page) == (200, True)
    assert stack.ask("POST", f"{SERVICE}/ListModels", "{}")[0] == 401
    token = compose.TOKENS.partition(":")[2]
    status, models = stack.ask("POST", f"{SERVICE}/GetModel", "{}", token)
    assert status == 200
    assert json.loads(models)["model"]["id"] == "demo-gpt2"
    assert json.loads(models)["dictionaries"], "the demo's"
    for name, process in stack.processes.items():
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=40) == 0, (stack.folder / f"{name}.log").read_text()
