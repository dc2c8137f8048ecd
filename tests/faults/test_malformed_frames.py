"""Bytes that are no gRPC and no HTTP, or almost: refused or cut off, and everybody else is served.

HTTP/2 is written by hand here, since no client would send such frames.
"""

import asyncio
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import httpx
import pytest_asyncio
from tdb.inference.v1 import model_pb2, service_pb2_grpc

from gateway.app import create_app
from services.common.settings import Settings
from tests.common.backend import SERVICE, Backend, serving
from tests.faults.watching import Held, until
from tests.gateway.helpers import NOWHERE, listening

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
END_STREAM, END_HEADERS = 1, 4
PATH = f"/{SERVICE}/ListModels"
GARBAGE = bytes(range(256)) * 8


def frame(kind: int, payload: bytes, *, flags: int = 0, stream: int = 0, length: int = -1) -> bytes:
    size = len(payload) if length < 0 else length
    return struct.pack(">I", size)[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def headers(**values: str) -> bytes:
    """A block of literal headers, neither indexed nor compressed."""
    given = {
        ":method": "POST",
        ":scheme": "http",
        ":path": PATH,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    given |= {name.replace("_", "-"): value for name, value in values.items()}
    return b"".join(
        b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode("latin-1")
        for name, value in given.items()
    )


OPEN = PREFACE + frame(SETTINGS, b"")
CALL = OPEN + frame(HEADERS, headers(), flags=END_HEADERS, stream=1)


def message(payload: bytes, *, compressed: int = 0, length: int = -1) -> bytes:
    size = len(payload) if length < 0 else length
    return bytes([compressed]) + struct.pack(">I", size) + payload


def sent(payload: bytes) -> bytes:
    return CALL + frame(DATA, payload, flags=END_STREAM, stream=1)


OVER_GRPC = {
    "garbage": GARBAGE,
    "nothing": b"",
    "HTTP/1.1": b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n{}",
    "TLS": bytes.fromhex("1603010200010001fc0303") + os.urandom(128),
    "half a preface": PREFACE[:11],
    "garbage behind the preface": PREFACE + GARBAGE,
    "a frame larger than allowed": OPEN + frame(DATA, b"", stream=1, length=2**24 - 1) + GARBAGE,
    "a frame that is cut": OPEN + frame(HEADERS, headers(), flags=END_HEADERS, stream=1)[:20],
    "headers that are none": OPEN + frame(HEADERS, b"\xff" * 40, flags=END_HEADERS, stream=1),
    "data of no stream": OPEN + frame(DATA, b"x" * 10, stream=7),
    "a stream of the server's": OPEN + frame(HEADERS, headers(), flags=END_HEADERS, stream=2),
    "a ping of a wrong size": OPEN + frame(PING, b"123"),
    "settings of a wrong size": PREFACE + frame(SETTINGS, b"12345"),
    "an unknown frame": OPEN + frame(0xEE, b"x" * 100, stream=1),
    "reset at once": CALL + frame(RST, b"\x00\x00\x00\x08", stream=1),
    "a thousand resets": CALL
    + b"".join(
        frame(HEADERS, headers(), flags=END_HEADERS, stream=2 * number + 1)
        + frame(RST, b"\x00\x00\x00\x08", stream=2 * number + 1)
        for number in range(1, 1000)
    ),
    "no message": sent(b""),
    "half a message's head": sent(b"\x00\x00"),
    "a message that is cut": sent(message(b"abc", length=100)),
    "a message of 4 GiB": sent(message(b"abc", length=2**32 - 1)),
    "compressed garbage": sent(message(GARBAGE, compressed=1)),
    "an unknown compression": OPEN
    + frame(HEADERS, headers(grpc_encoding="zip"), flags=END_HEADERS, stream=1)
    + frame(DATA, message(b"abc", compressed=1), flags=END_STREAM, stream=1),
    "a flag that is none": sent(message(b"", compressed=77)),
    "two messages": sent(message(b"") * 2),
    "no message of ours": sent(message(b"\xff" * 10)),
    "another content type": OPEN
    + frame(HEADERS, headers(content_type="application/json"), flags=END_HEADERS, stream=1)
    + frame(DATA, b"{}", flags=END_STREAM, stream=1),
    "no content type": OPEN
    + frame(HEADERS, headers(content_type=""), flags=END_HEADERS | END_STREAM, stream=1),
    "a path that is none": OPEN
    + frame(HEADERS, headers(**{":path": "no path"}), flags=END_HEADERS | END_STREAM, stream=1),
    "a deadline that is none": OPEN
    + frame(HEADERS, headers(grpc_timeout="soon"), flags=END_HEADERS, stream=1)
    + frame(DATA, message(b""), flags=END_STREAM, stream=1),
    "a request id that is none": OPEN
    + frame(HEADERS, headers(x_request_id="\x80\xff"), flags=END_HEADERS, stream=1)
    + frame(DATA, message(b""), flags=END_STREAM, stream=1),
}


def post(body: bytes, length: int = -1, **more: str) -> bytes:
    given = {
        "host": "localhost",
        "content-type": "application/json",
        "content-length": str(len(body) if length < 0 else length),
    } | {name.replace("_", "-"): value for name, value in more.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"POST {PATH} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + body


OVER_HTTP: dict[str, tuple[bytes, bytes]] = {
    "garbage": (GARBAGE, b"400"),
    "nothing": (b"", b""),
    "HTTP/2": (OPEN, b"4"),
    "a head without end": (b"POST / HTTP/1.1\r\nhost: localhost\r\n", b""),
    "a body that is cut": (post(b"{", length=10), b""),
    "no length": (b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: x\r\n\r\n", b"400"),
    "two lengths": (
        b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n{}",
        b"400",
    ),
    "a broken chunk": (
        f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        "transfer-encoding: chunked\r\n\r\nZZ\r\n{}\r\n".encode(),
        b"400",
    ),
    "a head of 1 MB": (b"GET / HTTP/1.1\r\nx: " + b"y" * 10**6 + b"\r\n\r\n", b"4"),
    "no JSON": (post(b"{"), b"400"),
    "a list": (post(b"[]"), b"400"),
    "no UTF-8": (post(b'{"model": "\xff\xfe"}'), b"400"),
    "half a surrogate": (post(b'{"model": "\\ud800"}'), b"400"),
    "a null byte": (post(b"\x00"), b"400"),
    "nested beyond measure": (post(b'{"a":' * 50_000), b"400"),
    "another content type": (post(b"{}", content_type="text/plain"), b"415"),
    "another charset": (post(b"{}", content_type="application/json; charset=latin-1"), b"415"),
    "compressed": (post(b"{}", content_encoding="gzip"), b"501"),
    "a token that is no text": (post(b"{}", authorization="Bearer \xff\xfe"), b"200"),
    "a request id that is no text": (post(b"{}", x_request_id="\xff"), b"200"),
    "a trace that is no text": (post(b"{}", traceparent="\xff", tracestate="\xff"), b"200"),
    "a deadline that is none": (post(b"{}", connect_timeout_ms="soon"), b"400"),
}


@pytest_asyncio.fixture
async def port() -> AsyncIterator[int]:
    async with serving(Backend()) as server:
        yield server.port


@pytest_asyncio.fixture
async def gateway(port: int, tmp_path: Path) -> AsyncIterator[str]:
    settings = Settings.from_env({"TDB_DATA_DIR": str(tmp_path)})
    app = create_app(settings, {"inference": f"127.0.0.1:{port}"}, NOWHERE)
    async with listening(app) as url:
        yield url


async def answer_to(port: int, data: bytes, wait_s: float = 0.3) -> bytes:
    """What comes back within a moment or until the other side hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    found = b""
    try:
        writer.write(data)
        await writer.drain()
        while piece := await asyncio.wait_for(reader.read(65536), wait_s):
            found += piece
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.close()
    return found


async def test_over_grpc(port: int) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = service_pb2_grpc.InferenceServiceStub(channel)
        await stub.ListModels(model_pb2.ListModelsRequest())
        before = Held.now()
        for name, data in OVER_GRPC.items():
            answer = await answer_to(port, data, wait_s=0.1)
            assert b"Traceback" not in answer, name
            assert b"Unexpected" not in answer, name  # gRPC's words for an exception of ours
            await stub.ListModels(model_pb2.ListModelsRequest(), timeout=5)
        await until("as much is held as before", lambda: not Held.now().exceeds(before))


async def test_what_is_well_formed_is_answered(port: int) -> None:
    """Or the frames above would all be refused for the same reason."""
    assert b"grpc-status\x010" in await answer_to(port, sent(message(b"")))


async def test_over_http(gateway: str) -> None:
    port = urlsplit(gateway).port or 0
    async with httpx.AsyncClient(base_url=gateway) as client:
        assert (await client.post(PATH, json={})).status_code == 200
        before = Held.now()
        for name, (data, status) in OVER_HTTP.items():
            answer = await answer_to(port, data)
            line = answer.partition(b"\r\n")[0]
            assert status in line if status else not answer, (name, line)
            assert b"Traceback" not in answer, name
            assert (await client.post(PATH, json={})).status_code == 200
        await until("as much is held as before", lambda: not Held.now().exceeds(before))
