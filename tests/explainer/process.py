"""The explainer service as a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tdb.explainer.v1 import service_pb2_grpc

START_S = 30.0


class Process:
    """`python -m services.explainer` on a data folder; `port` is None where it did not start."""

    def __init__(self, data_dir: Path, **variables: str) -> None:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("TDB_")}
        defaults = {
            "TDB_EXPLAINER_PORT": "0",
            "TDB_DATA_DIR": str(data_dir),
            "TDB_DRAIN_SECONDS": "1",
            # Nobody listens on these.
            "TDB_DATASET_ADDRESS": "127.0.0.1:1",
            "TDB_INFERENCE_ADDRESS": "127.0.0.1:1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "services.explainer"],
            env={**clean, **defaults, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        lines = iter(self.process.stdout.readline, "")
        self.port = next(
            (event["port"] for event in map(json.loads, lines) if event["event"] == "listening"),
            None,
        )

    def __enter__(self) -> Self:
        health = health_pb2_grpc.HealthStub(self.channel())
        end = time.monotonic() + START_S
        while (
            health.Check(health_pb2.HealthCheckRequest()).status
            is not health_pb2.HealthCheckResponse.SERVING
        ):
            assert time.monotonic() < end
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.end()

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(f"127.0.0.1:{self.port}")

    def stub(self) -> Any:
        return service_pb2_grpc.ExplainerServiceStub(self.channel())

    def end(self, number: signal.Signals | None = None) -> tuple[int, str]:
        """Exit code and what was on standard error."""
        if number is not None:
            self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=START_S)
        return self.process.returncode, errors
