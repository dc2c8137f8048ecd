"""Runs the supervisor over two of `service.py`: `python supervise.py FIRST LAST`, behaviours."""

import asyncio
import os
import sys
from pathlib import Path

from tdb.children import Service
from tdb.supervisor import Plan, Supervisor, SupervisorError

program = str(Path(__file__).with_name("service.py"))
command = (sys.executable, program)
plan = Plan(
    services=[
        Service(
            "inference",
            (*command, "inference", "TDB_INFERENCE_PORT", sys.argv[1]),
            "TDB_INFERENCE_PORT",
        ),
        Service(
            "gateway", (*command, "gateway", "TDB_GATEWAY_PORT", sys.argv[2]), "TDB_GATEWAY_PORT"
        ),
    ],
    env=dict(os.environ),
    host="127.0.0.1",
    log_folder=Path(os.environ["TDB_DATA_DIR"]),
    stop_grace_s=1,
    loading="Loading ...",
)


async def main() -> None:
    await Supervisor(plan).run()


try:
    asyncio.run(main())
except SupervisorError as error:
    sys.exit(str(error))
