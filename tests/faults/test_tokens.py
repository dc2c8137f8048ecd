"""Who has no token, or a wrong one, gets no answer of any RPC, and costs no work."""

from pathlib import Path

import grpc
import httpx
import pytest

from gateway.app import create_app
from services.common.settings import Settings
from services.inference.engine.model import Model
from services.inference.scheduler import Scheduler
from services.inference.server import build_server
from tests.faults.test_leaving_clients import REQUESTS, SERVICE, code_of, end_of, grpc_call
from tests.faults.watching import SlowDevice
from tests.gateway.helpers import NOWHERE, listening

WRONG = (None, "Bearer", "Bearer wrong", "Basic YTpiCg==", "a-long-secret", "Bearer a-long-secre")


@pytest.mark.parametrize("rpc", REQUESTS)
async def test_it_is_refused(
    models: dict[str, Model], scheduler: Scheduler, device: SlowDevice, tmp_path: Path, rpc: str
) -> None:
    settings = Settings.from_env(
        {"TDB_MODEL": "tiny=/", "TDB_DATA_DIR": str(tmp_path), "TDB_TOKENS": "ann:a-long-secret"}
    )
    headers = {"accept": "text/event-stream", "content-type": "application/json"}
    async with build_server(settings, scheduler, {"tiny": models["tiny"]}, port=0) as server:
        app = create_app(settings, {"inference": f"127.0.0.1:{server.port}"}, NOWHERE)
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
            listening(app) as url,
            httpx.AsyncClient() as client,
        ):
            for token in WRONG:
                given = {} if token is None else {"authorization": token}
                call = grpc_call(channel, rpc, metadata=tuple(given.items()))
                assert await end_of(call) == "UNAUTHENTICATED"
                response = await client.post(
                    f"{url}/{SERVICE.full_name}/{rpc}", json=REQUESTS[rpc], headers=headers | given
                )
                assert (response.status_code, code_of(response)) == (401, "unauthenticated")
            assert not device.begun
            right = (("authorization", "Bearer a-long-secret"),)
            assert await end_of(grpc_call(channel, rpc, metadata=right)) == "OK"
