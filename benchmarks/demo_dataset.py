"""The demo's dataset, built as at the first `tdb up --demo`: on the clock, and in processor time.

    python -m benchmarks.demo_dataset [--threads 2] [--data FOLDER]

The inference service and the dataset service in processes of their own, nobody else calling. The
clock runs from the first sign of the build to its dataset. `--data` keeps what was built.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
from tdb.dataset.v1 import dataset_pb2, service_pb2_grpc

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.dataset.v1.service_pb2_grpc import DatasetServiceAsyncStub as Stub

DEMO = Path(__file__).parents[1] / "demo"
PORTS = {"inference": 51_951, "dataset": 51_952}


def processor_seconds(process: "subprocess.Popen[bytes]") -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def follow(
    processes: dict[str, "subprocess.Popen[bytes]"],
) -> tuple[dataset_pb2.Dataset, dict[str, float], dict[str, dict[str, float]]]:
    """The dataset, seconds by phase and processor seconds by phase and process."""
    seconds: dict[str, float] = {}
    spent: dict[str, dict[str, float]] = {}
    phase, begun, before = "", time.perf_counter(), dict.fromkeys(processes, 0.0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{PORTS['dataset']}") as channel:
        stub: Stub = service_pb2_grpc.DatasetServiceStub(channel)
        while True:
            listed = await stub.ListDatasets(
                dataset_pb2.ListDatasetsRequest(), wait_for_ready=True, timeout=60
            )
            now = next((each.phase for each in listed.builds), "done" if listed.datasets else "")
            if now != phase:
                at = {name: processor_seconds(process) for name, process in processes.items()}
                elapsed = time.perf_counter() - begun
                seconds[phase] = seconds.get(phase, 0.0) + elapsed
                of = spent.setdefault(phase, dict.fromkeys(processes, 0.0))
                for name in processes:
                    of[name] += at[name] - before[name]
                phase, begun, before = now, time.perf_counter(), at
            if phase == "done":
                return listed.datasets[0], seconds, spent
            await asyncio.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile())
        data = arguments.data or stack.enter_context(tempfile.TemporaryDirectory())
        env = {
            **os.environ,
            "TDB_MODEL": f"demo={DEMO / 'model'}",
            "TDB_DICTIONARIES": f"demo={DEMO / 'dictionaries'}",
            "TDB_DATA_DIR": str(data),
            "TDB_DEMO_DATASET": "1",
            "OMP_NUM_THREADS": str(arguments.threads),
            **{f"TDB_{name.upper()}_PORT": str(port) for name, port in PORTS.items()},
        }
        processes = {
            name: subprocess.Popen(
                [sys.executable, "-m", f"services.{name}"], env=env, stdout=log, stderr=log
            )
            for name in PORTS
        }
        try:
            dataset, seconds, spent = asyncio.run(follow(processes))
        finally:
            for process in processes.values():
                process.terminate()
                process.wait(60)
        size = sum(path.stat().st_size for path in Path(data).rglob("*") if path.is_file())
    load = os.getloadavg()[0]
    print(
        f"{os.cpu_count()} cores, {arguments.threads} threads, load {load:.1f}: "
        f"{dataset.records:,} records of {dataset.header.corpus.tokens:,} tokens, "
        f"{size / 2**20:.0f} MiB"
    )
    for phase in spent:
        if phase:
            parts = ", ".join(f"{name} {of:.1f} s" for name, of in spent[phase].items())
            print(f"{phase:>12} {seconds[phase]:6.1f} s on the clock; processor time: {parts}")


if __name__ == "__main__":
    main()
