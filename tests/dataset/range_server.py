"""A server of files that answers range requests, counts them and fails as it is told."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit


@dataclass
class Asked:
    name: str
    range: tuple[int, int] | None
    query: str


@dataclass
class Server:
    folder: Path
    port: int = 0
    asked: list[Asked] = field(default_factory=list)
    status: Callable[[str], int | None] = lambda name: None
    """A status to answer with instead."""
    change: Callable[[str, bytes], bytes] = lambda name, content: content
    """What is sent instead of what was asked for."""
    delay_s: float = 0.0
    answers: threading.Event = field(default_factory=threading.Event)
    """Cleared, it hangs until this is set again."""
    ranges: bool = True
    cut: bool = False
    """Announces all and closes half way."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/data"


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    state = Server(folder)
    state.answers.set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            name = parts.path.removeprefix("/data/")
            asked: str = self.headers.get("range") or self.headers.get("x-ms-range") or ""
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
            wanted = (int(found[1]), int(found[2])) if found else None
            state.asked.append(Asked(name, wanted, parts.query))
            time.sleep(state.delay_s)
            state.answers.wait()
            status = state.status(name)
            path = state.folder / name
            if status is None:
                status = 200 if path.is_file() else 404
            content = path.read_bytes() if status == 200 else b"<Error/>"
            total = len(content)
            if status == 200 and wanted and state.ranges:
                status = 206 if wanted[0] < len(content) else 416
                content = content[wanted[0] : wanted[1] + 1]
            if status in (200, 206):
                content = state.change(name, content)
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.send_header("etag", '"one"')
            if status == 206 and wanted:
                last = min(wanted[1], total - 1)
                self.send_header("content-range", f"bytes {wanted[0]}-{last}/{total}")
            if 300 <= status < 400:
                self.send_header("location", "http://127.0.0.1:1/elsewhere")
            self.end_headers()
            if state.cut:
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            else:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """Clients that leave are part of the tests."""

    server = Quiet(("127.0.0.1", 0), Handler)
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        state.answers.set()
        server.shutdown()
        server.server_close()
        thread.join()
