"""Clients that ask without end, each on a thread of its own, and how their calls ended.

    with Load([client, client, ...]) as load:
        ...                                   # break something
        load.until_answered()                 # every client has had an answer since
    load.ends                                 # Counter of (client's name, how a call ended)

A client is a function that makes one call and says how it ended: "OK", or whatever else. What it
raises fails the test.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import httpx

OK = "OK"
Client = Callable[[], str]


class Load:
    def __init__(self, clients: Sequence[tuple[str, Client]], pause_s: float = 0.01) -> None:
        self.ends: Counter[tuple[str, str]] = Counter()
        self._pause_s = pause_s
        self._answered: dict[int, float] = {}
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(number, name, client))
            for number, (name, client) in enumerate(clients)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self._failure and not error:
            raise self._failure

    def until_answered(self, within_s: float = 60.0) -> None:
        """Waits until every client has had an answer to a call that it made from now on."""
        since = time.monotonic()
        while any(self._answered.get(number, 0.0) <= since for number in range(len(self._threads))):
            assert time.monotonic() < since + within_s, f"no answers: {self.ends}"
            assert self._failure is None, self._failure
            time.sleep(0.02)

    def _ask(self, number: int, name: str, client: Client) -> None:
        try:
            while not self._stop.is_set():
                began = time.monotonic()
                end = client()
                self.ends[name, end] += 1
                if end == OK:
                    self._answered[number] = began
                time.sleep(self._pause_s)
        except BaseException as failure:
            self._failure = failure


def over_grpc(call: Callable[[], Any], expected: Callable[[Any], bool]) -> Client:
    """A client of a gRPC call, or of a stream that is read to its end. The answer must be as
    `expected`; "WRONG" otherwise."""

    def client() -> str:
        try:
            answer = call()
        except grpc.RpcError as error:
            return str(error.code().name)
        return OK if expected(answer) else "WRONG"

    return client


def over_http(url: str, body: Any, expected: Callable[[Any], bool]) -> Client:
    """The same over HTTP: a status other than 200 is named, with the code of its body, and a
    connection that broke is "BROKEN"."""

    def client() -> str:
        try:
            response = httpx.post(url, json=body, timeout=30)
        except httpx.TransportError:
            return "BROKEN"
        if response.status_code != 200:
            return f"{response.status_code} {response.json()['code']}"
        return OK if expected(response.json()) else "WRONG"

    return client
