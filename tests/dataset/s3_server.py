"""A server that speaks S3 on this machine (moto's)."""

import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.dataset.azurite_server import wait_for


class S3:
    """Makes buckets and objects; nobody is asked for credentials."""

    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"

    def bucket(self, name: str) -> None:
        self._put(f"/{name}", b"")

    def object(self, bucket: str, name: str, content: bytes) -> None:
        self._put(f"/{bucket}/{name}", content)

    def folder(self, bucket: str, folder: Path) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.object(bucket, str(path.relative_to(folder)), path.read_bytes())

    def _put(self, path: str, content: bytes) -> None:
        url, headers = f"{self.root}{path}", {"content-type": "application/octet-stream"}
        request = urllib.request.Request(url, data=content, headers=headers, method="PUT")
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.status == 200


@contextmanager
def serving() -> Iterator[S3]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(port, process)
        yield S3(port)
    finally:
        process.terminate()
        process.wait(10)
