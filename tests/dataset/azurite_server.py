"""A real Azure Blob server on this machine."""

import base64
import hashlib
import hmac
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

import pytest

from tests.dataset.object_stores import ACCOUNT, KEY

FOLDER = Path(__file__).parent / "azurite"
SERVER = FOLDER / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
IN_CI = bool(os.environ.get("CI"))


class Azurite:
    """Makes containers and blobs, with the account's key."""

    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}/{ACCOUNT}"

    def container(self, name: str, *, public: bool) -> str:
        """The URL of a new container."""
        headers = {"x-ms-blob-public-access": "container"} if public else {}
        self._put(f"/{name}", "restype=container", headers, b"")
        return f"{self.root}/{name}"

    def blob(self, container: str, name: str, content: bytes) -> None:
        self._put(f"/{container}/{name}", "", {"x-ms-blob-type": "BlockBlob"}, content)

    def folder(self, container: str, folder: Path) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.blob(container, str(path.relative_to(folder)), path.read_bytes())

    def _put(self, path: str, query: str, given: dict[str, str], content: bytes) -> None:
        stated = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06", **given}
        lines = "".join(f"{name}:{stated[name]}\n" for name in sorted(stated))
        resource = f"/{ACCOUNT}/{ACCOUNT}{path}"
        if query:
            resource += "\n" + query.replace("=", ":")
        length = str(len(content)) if content else ""
        signed = f"PUT\n\n\n{length}\n\n{'application/json'}\n\n\n\n\n\n\n{lines}{resource}"
        digest = hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()
        headers = {
            **stated,
            "authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}",
            "content-type": "application/json",
        }
        url = f"{self.root}{path}" + (f"?{query}" if query else "")
        request = urllib.request.Request(url, data=content, headers=headers, method="PUT")
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.status == 201


@contextmanager
def serving(folder: Path) -> Iterator[Azurite]:
    """Azurite over a folder; skips the test where it is not installed."""
    node = shutil.which("node")
    if node is None or not SERVER.exists():
        if IN_CI:
            raise AssertionError("`make test` installs Azurite")
        pytest.skip("no Azurite here: `make .make/azurite` installs it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [
            node,
            str(SERVER),
            "--silent",
            "--skipApiVersionCheck",
            "--disableTelemetry",
            *("--location", str(folder), "--blobHost", "127.0.0.1", "--blobPort", str(port)),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(port, process)
        yield Azurite(port)
    finally:
        process.terminate()
        process.wait(10)


def wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    """Until a process listens."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert process.poll() is None, "the server ended"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the server does not listen")
