"""`tdb up` as a process of its own, and what it leaves behind."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

START_S = 90.0


def until(what: str, condition: Callable[[], bool], within_s: float = 20.0) -> None:
    """Waits for `condition`; fails with `what` when it does not come."""
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"not within {within_s:g} s: {what}")
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits to be collected does not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return False
    return fields[0] != "Z"


class Up:
    """A running `tdb up`, or another command with the same habits."""

    def __init__(self, command: list[str], data_dir: Path, **variables: str) -> None:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("TDB_")}
        defaults = {
            "TDB_GATEWAY_PORT": "0",
            "TDB_INFERENCE_PORT": "0",
            "TDB_DATASET_PORT": "0",
            "TDB_EXPLAINER_PORT": "0",
            "TDB_DATA_DIR": str(data_dir),
            "TDB_DRAIN_SECONDS": "1",
            "TDB_DEMO_DATASET": "0",  # a minute of work that only its own test waits for
            "HF_HUB_OFFLINE": "1",
        }
        self.process = subprocess.Popen(
            command,
            env={**clean, **defaults, **variables},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=data_dir,
        )
        self.out: queue.Queue[str] = queue.Queue()
        self.errors: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.out.put)),
            threading.Thread(target=self._read, args=(self.process.stderr, self.errors.append)),
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> "Up":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.end()

    @staticmethod
    def _read(stream: IO[str] | None, keep: Callable[[str], None]) -> None:
        assert stream is not None
        with stream:
            for line in stream:
                keep(line.rstrip("\n"))

    def url(self) -> str:
        """The URL that it prints, alone on its line, when all is ready."""
        try:
            return self.out.get(timeout=START_S)
        except queue.Empty:
            pytest.fail(f"no URL within {START_S:g} s: {self.errors}")

    def children(self) -> list[int]:
        """The services' process ids, oldest first."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.end()

    def end(self) -> int:
        """The exit code, once it has ended and everything it wrote is read."""
        code = self.process.wait(timeout=START_S)
        for reader in self._readers:
            reader.join()
        return code


def tdb(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tdb.cli", *arguments]
