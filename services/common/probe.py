"""Whether a service answers, for health checks: `python -m services.common.probe TARGET`.

TARGET is `host:port` of a gRPC service, which must say SERVING, or a URL of the gateway, which must
answer 200: /healthz while it runs, /readyz while calls get through. A service that speaks TLS is
asked as the settings say (TDB_TLS_CA and what goes with it). Exit code 0, or 1 with one sentence on
standard error, which container engines keep.
"""

import http.client
import os
import sys
from collections.abc import Sequence
from urllib.parse import urlsplit

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.settings import Settings, SettingsError
from services.common.tls import ClientTls

TIMEOUT_S = 5.0

_STATUS = health_pb2.HealthCheckResponse.ServingStatus


def main(arguments: Sequence[str]) -> int:
    """Asks once; the exit code."""
    if len(arguments) != 1:
        print("usage: python -m services.common.probe HOST:PORT|URL", file=sys.stderr)
        return 2
    target = arguments[0]
    try:
        http = target.startswith("http://")
        problem = http_problem(target) if http else grpc_problem(target, _secured())
    except SettingsError as error:
        problem = f"cannot be asked: {error}"
    if problem:
        print(f"{target} {problem}", file=sys.stderr)
        return 1
    return 0


def _secured() -> ClientTls | None:
    settings = Settings.from_env(os.environ)
    if settings.tls_cert and not settings.tls_ca:
        raise SettingsError("TDB_TLS_CERT is set: TDB_TLS_CA says whose certificate to expect.")
    return ClientTls.of(settings)


def grpc_problem(
    target: str, secured: ClientTls | None = None, timeout_s: float = TIMEOUT_S
) -> str:
    """Why the whole server at `target` is not SERVING; "" when it is."""
    options = [("grpc.enable_http_proxy", 0)]  # not by the proxy that the Hub may need
    with (
        grpc.secure_channel(target, secured.credentials(), [*options, *secured.options()])
        if secured
        else grpc.insecure_channel(target, options)
    ) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                return f"does not answer within {timeout_s:g} s"
            if secured and (trouble := secured.trouble(target)):
                return f"cannot be asked: {trouble}"
            return f"cannot be asked: {error.code().name}: {error.details()}"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return ""
    return f"is {_STATUS.Name(answer.status)}: it is loading its model, or stopping"


def http_problem(url: str, timeout_s: float = TIMEOUT_S) -> str:
    """Why `url` does not answer 200; "" when it does."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=timeout_s)
    try:
        connection.request("GET", parts.path or "/")
        response = connection.getresponse()
        body = response.read(1000).decode(errors="replace")
    except TimeoutError:
        return f"does not answer within {timeout_s:g} s"
    except (OSError, http.client.HTTPException) as error:
        return f"cannot be asked: {error}"
    finally:
        connection.close()
    return "" if response.status == 200 else f"answered {response.status}: {body}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
