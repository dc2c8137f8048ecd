"""One service as a child process: its output, its port, its last words.

A child prints one JSON line on standard output when it listens, logs JSON lines on standard error,
and says why it cannot go on in one plain line there. Everything is kept in a log file; warnings and
errors are shown as they come. The child watches a pipe from us (TDB_PARENT_FD) and ends with us.
"""

import asyncio
import contextlib
import io
import json
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LOG_BYTES = 16 * 1024 * 1024
LINE_BYTES = 1024 * 1024
SHOWN_LEVELS = ("warning", "error", "critical")


@dataclass(frozen=True)
class Service:
    """What to run, and which variable tells it its port. It is not given the variables `without`:
    secrets that are no matter of its own."""

    name: str
    command: Sequence[str]
    port_variable: str
    without: Sequence[str] = ()


def say(text: str) -> None:
    """Shows a line of progress; standard output is kept for the URL."""
    print(text, file=sys.stderr, flush=True)


class Log:
    """A file that is set aside as NAME.1 when it is full, so that two of them bound the disk.

    A full disk, or a file that cannot be opened, costs the log, not the service.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: io.FileIO | None = None

    @classmethod
    def of(cls, service: Service, folder: Path) -> "Log":
        return cls(folder / f"{service.name}.log")

    def open(self) -> None:
        """Raises OSError where it cannot be opened; `write` tries again each time."""
        # Unbuffered: what a full disk did not take must not wait to fail again at the end.
        self._file = self.path.open("ab", buffering=0)

    def write(self, line: bytes) -> None:
        """Keeps a line, if it can."""
        with contextlib.suppress(OSError):
            self._write(line)

    def _write(self, line: bytes) -> None:
        if self._file is not None and self._file.tell() > LOG_BYTES:
            self.close()
            self.path.replace(self.path.with_name(self.path.name + ".1"))
        if self._file is None:
            self.open()
        assert self._file is not None
        self._file.write(line)

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()


class Child:
    """A running service. `listening` is done with its port once it has announced itself."""

    def __init__(self, service: Service, process: asyncio.subprocess.Process, log: Log) -> None:
        self.service = service
        self.listening: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.last_words = ""
        self._process = process
        self._log = log
        self._reading = asyncio.gather(self._read_out(), self._read_errors())
        self.ended = asyncio.ensure_future(self._wait())

    @classmethod
    async def start(
        cls, service: Service, env: Mapping[str, str], lifeline: int, log_folder: Path
    ) -> "Child":
        """Starts the service; it ends when the other side of the pipe `lifeline` closes."""
        given = {name: value for name, value in env.items() if name not in service.without}
        process = await asyncio.create_subprocess_exec(
            *service.command,
            env={**given, "TDB_PARENT_FD": str(lifeline), "PYTHONUNBUFFERED": "1"},
            pass_fds=[lifeline],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=LINE_BYTES,
            start_new_session=True,  # Ctrl-C is for us; the children are told in order
        )
        return cls(service, process, Log.of(service, log_folder))

    def failure(self) -> str:
        """Why it ended, in one sentence: its own where it left one."""
        code = self._process.returncode or 0
        if code == 1 and self.last_words:
            return self.last_words
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"the {self.service.name} service ended {how}; its log is {self._log.path}"

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL for a child that is still there after `grace_s`."""
        self._signal(signal.SIGTERM)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(self.ended), grace_s)
        self.kill()
        await self.ended

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _wait(self) -> None:
        await self._process.wait()
        await self._reading
        self._log.close()

    async def _read_out(self) -> None:
        async for line in _lines(self._process.stdout):
            self._log.write(line)
            event = _json(line)
            if event.get("event") == "listening" and not self.listening.done():
                self.listening.set_result(int(str(event["port"])))
            elif event.get("event") == "metrics":
                say(f"{self.service.name}: metrics on port {event['port']}")
            elif event.get("event") == "progress":
                say(f"{self.service.name}: {event['message']}")

    async def _read_errors(self) -> None:
        async for line in _lines(self._process.stderr):
            self._log.write(line)
            record = _json(line)
            if record.get("level") in SHOWN_LEVELS:
                say(f"{self.service.name}: {record.get('message')}")
            elif not record and line.strip():
                self.last_words = line.decode(errors="replace").strip()


async def _lines(stream: asyncio.StreamReader | None) -> AsyncIterator[bytes]:
    assert stream is not None
    while True:
        try:
            line = await stream.readline()
        except ValueError:  # longer than LINE_BYTES: dropped, and reading goes on
            continue
        if not line:
            return
        yield line


def _json(line: bytes) -> dict[str, object]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
