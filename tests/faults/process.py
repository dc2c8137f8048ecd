"""The inference service as a process of its own, without a supervisor."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
import psutil
from tdb.inference.v1 import model_pb2, service_pb2_grpc

from tests.cli.helpers import Up

START_S = 90.0


def child(up: Up, name: str) -> int:
    """The process of a service that `tdb up` runs."""
    module = name if name == "gateway" else f"services.{name}"
    return next(pid for pid in up.children() if module in psutil.Process(pid).cmdline())


class Process:
    """`python -m services.inference` on a model folder."""

    def __init__(self, model: Path, data_dir: Path, **variables: str) -> None:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("TDB_")}
        defaults = {
            "TDB_MODEL": f"small={model}",
            "TDB_INFERENCE_PORT": "0",
            "TDB_DATA_DIR": str(data_dir),
            "HF_HUB_OFFLINE": "1",
            "TDB_LOG_LEVEL": "error",
            "TDB_CACHE_MIB": "0",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "services.inference"],
            env={**clean, **defaults, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.errors: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        assert self._process.stdout is not None
        self.port = int(json.loads(self._process.stdout.readline())["port"])

    def __enter__(self) -> Self:
        end = time.monotonic() + START_S
        with self.channel() as channel:
            stub = service_pb2_grpc.InferenceServiceStub(channel)
            while True:
                try:
                    stub.GetModel(model_pb2.GetModelRequest(), timeout=5)
                    return self
                except grpc.RpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > end:
                        raise
                    time.sleep(0.1)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self.end()

    @property
    def usage(self) -> psutil.Process:
        return psutil.Process(self._process.pid)

    @property
    def mib(self) -> float:
        """Resident memory."""
        return float(self.usage.memory_info().rss / 2**20)

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(f"127.0.0.1:{self.port}")

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def end(self) -> int:
        """The exit code, once it has ended."""
        code = self._process.wait(timeout=START_S)
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            self.errors += [line.rstrip("\n") for line in stream]
