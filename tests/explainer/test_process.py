"""The explainer service as a process: start, refusals at the door, its file, the end."""

import signal
import socket
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tdb.explainer.v1 import explain_pb2, explanation_pb2, service_pb2

from services.explainer.database import STEPS, connect
from tests.explainer.process import Process

ASK = service_pb2.GetCapabilitiesRequest()
KEY = "sk-hush"
PROVIDER = {
    "TDB_PROVIDER_URL": "http://llm.example:8000/v1",
    "TDB_PROVIDER_MODEL": "judge-1",
    "TDB_PROVIDER_KEY": KEY,
}


def refusal(error: pytest.ExceptionInfo[grpc.RpcError]) -> tuple[str, str]:
    return error.value.code().name, error.value.details() or ""


def add_explanation(path: Path, text: str) -> None:
    """One as another process would leave it."""
    with closing(connect(path)) as connection:
        connection.execute(
            "INSERT INTO explanation (id, model_id, weights_hash, component, component_group, text,"
            " method, explainer_model, provider, prompt_hash, dataset, dataset_hash, code_version,"
            " author, based_on, created_ms)"
            " VALUES (?, 'm', '', 'neuron.0.1', 'neuron.0', ?, 'human', '', '', '', '', '', '',"
            " 'ann', '', 1)",
            (text, text),
        )


def test_it_serves_without_a_language_model_and_says_how_to_have_one(tmp_path: Path) -> None:
    with Process(tmp_path) as service:
        found = service.stub().GetCapabilities(ASK)
        file = tmp_path / "explanations.sqlite3"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700
        code, errors = service.end(signal.SIGTERM)
    assert (found.provider, found.provider_model, found.has_prices) == ("", "", False)
    assert "TDB_PROVIDER_URL" in found.how_to_configure
    assert list(found.methods) == [explanation_pb2.METHOD_TOKEN_PATTERN]
    assert found.explanations == 0
    assert code == 0, errors
    assert not list(tmp_path.glob("*-wal"))


def test_it_names_the_language_model_and_never_its_key(tmp_path: Path) -> None:
    with Process(tmp_path, **PROVIDER, TDB_PROVIDER_PRICES="0.15,0.6") as service:
        found = service.stub().GetCapabilities(ASK)
        _, errors = service.end(signal.SIGTERM)
    assert (found.provider, found.provider_model) == ("llm.example:8000", "judge-1")
    assert found.has_prices
    assert not found.how_to_configure
    assert explanation_pb2.METHOD_CONTRASTIVE in found.methods
    assert KEY not in str(found) + errors


def test_a_token_is_asked_for(tmp_path: Path) -> None:
    with Process(tmp_path, TDB_TOKENS="ann:hush") as service:
        stub = service.stub()
        for metadata in ((), (("authorization", "Bearer wrong"),)):
            with pytest.raises(grpc.RpcError) as refused:
                stub.GetCapabilities(ASK, metadata=metadata)
            assert refusal(refused)[0] == "UNAUTHENTICATED"
        assert stub.GetCapabilities(ASK, metadata=(("authorization", "Bearer hush"),)).methods


def test_what_is_stored_outlives_a_kill(tmp_path: Path) -> None:
    with Process(tmp_path) as service:
        add_explanation(tmp_path / "explanations.sqlite3", "fires on names")
        assert service.stub().GetCapabilities(ASK).explanations == 1
        service.end(signal.SIGKILL)
    with Process(tmp_path) as service:
        assert service.stub().GetCapabilities(ASK).explanations == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"not a database" * 100, "cannot be used (file is not a database)"),
        (None, f"has schema {len(STEPS) + 1}, and this version knows {len(STEPS)}"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, content: bytes | None, says: str
) -> None:
    file = tmp_path / "explanations.sqlite3"
    if content is not None:
        file.write_bytes(content)
    else:
        with closing(sqlite3.connect(file)) as connection:
            connection.execute(f"PRAGMA user_version = {len(STEPS) + 1}")
    code, errors = Process(tmp_path).end()
    assert code == 1
    assert says in errors
    assert str(file) in errors
    assert errors.count("\n") == 1


def test_two_do_not_work_on_one_file(tmp_path: Path) -> None:
    with Process(tmp_path):
        code, errors = Process(tmp_path).end()
    assert code == 1
    assert errors.startswith("another explainer service works on")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"TDB_EMBEDDING_KEY": KEY}, "TDB_EMBEDDING_URL is not"),
        ({"TDB_DATASET_ADDRESS": "", "TDB_DATASET_PORT": "0"}, "TDB_DATASET_ADDRESS says where"),
    ],
)
def test_settings_that_cannot_be_right_are_one_sentence(
    tmp_path: Path, variables: dict[str, str], says: str
) -> None:
    code, errors = Process(tmp_path, **variables).end()
    assert code == 1
    assert says in errors
    assert errors.count("\n") == 1
    assert KEY not in errors


def test_it_describes_itself_where_that_is_asked_for(tmp_path: Path) -> None:
    with Process(tmp_path, TDB_REFLECTION="1") as service:
        stub = reflection_pb2_grpc.ServerReflectionStub(service.channel())
        (answer,) = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
    names = [each.name for each in answer.list_services_response.service]
    assert "tdb.explainer.v1.ExplainerService" in names


def test_a_call_in_flight_ends_with_the_service(tmp_path: Path) -> None:
    """Told to stop, it gives a call TDB_DRAIN_SECONDS, then ends it, and itself with 0."""
    with socket.socket() as silent:  # takes connections, and never says anything
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with Process(tmp_path, TDB_DATASET_ADDRESS=address) as service:
            explained = service.stub().Explain(
                explain_pb2.ExplainRequest(
                    dataset="d", component="neuron.0.1", method=explanation_pb2.METHOD_TOKEN_PATTERN
                )
            )
            assert next(explained).WhichOneof("event") == "progress"
            service.process.send_signal(signal.SIGTERM)
            with pytest.raises(grpc.RpcError) as refused:
                list(explained)
            code, errors = service.end()
    assert refusal(refused)[0] == "UNAVAILABLE"
    assert code == 0, errors
    assert "Traceback" not in errors
