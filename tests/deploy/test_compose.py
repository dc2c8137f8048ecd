"""docker-compose.yml in structure: nothing here starts a container."""

import copy
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.common.settings import Settings
from tests.deploy import dockerfile
from tests.deploy.compose import (
    PROFILES,
    TOKENS,
    active,
    interpolated,
    names_of,
    problems,
    read,
    settings_of,
    template,
)
from tests.deploy.dockerfile import ROOT

Change = Callable[[Any], object]


def test_nothing_is_wrong() -> None:
    assert problems(read(), dockerfile.read()) == []


def within(*path: Any, value: Any = None, drop: str = "") -> Change:
    """Sets `value` at a place in the services, or drops a key there."""

    def change(services: Any) -> None:
        place = services
        for key in path[:-1] if not drop else path:
            place = place[key]
        if drop:
            del place[drop]
        else:
            place[path[-1]] = value

    return change


def environment(service: str, **values: str) -> Change:
    return lambda services: services[service]["environment"].update(values)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (within("dataset", "build", "target", value="data"), "built from data, which is no target"),
        (within("gateway", "command", value=["tdb", "up"]), "does not run its image's command"),
        (within("gateway", "image", value="gateway"), "gateway has no tag of its own"),
        (within("redis", "image", value="valkey/valkey:latest"), "has no tag of its own"),
        (within("gateway", "image", value="gateway:0.0.9"), "is not of version"),
        (within("gateway", "user", value="0:0"), "does not run as its image's user"),
        (within("redis", drop="user"), "redis runs as root"),
        (within("redis", "deploy", "resources", "limits", drop="memory"), "no memory limit"),
        (within("dataset", drop="healthcheck"), "dataset has no health check"),
        (within("inference", drop="stop_grace_period"), "no stop grace period"),
        (within("inference", "stop_grace_period", value="10s"), "before it has drained for 30 s"),
        (environment("inference", TDB_DRAIN_SECONDS="60"), "before it has drained for 60 s"),
        (within("inference", "restart", value="no"), "is not started again"),
        (within("inference", "read_only", value=False), "lacks init or a read-only root"),
        (within("inference", drop="cap_drop"), "keeps privileges"),
        (within("inference", "networks", value=["front"]), "on one that is not declared"),
        (within("gateway", "ports", value=["8080:8080"]), "publishes 8080:8080 beyond"),
        (within("gateway", "ports", value=["0.0.0.0:8080:8080"]), "beyond this machine"),
        (within("gateway", "ports", value=["127.0.0.1:80:8000"]), "does not publish 8080"),
        (within("inference", "ports", value=["127.0.0.1:50051:50051"]), "is published"),
        (within("dataset", drop="env_file"), "does not read .env"),
        (within("gateway", "environment", drop="TDB_GATEWAY_PORT"), "change TDB_GATEWAY_PORT"),
        (environment("inference", TDB_MODLE="gpt2"), "sets TDB_MODLE, which is not a setting"),
        (environment("inference", TDB_DTYPE="float8"), "would not start: TDB_DTYPE"),
        (
            within("gateway", "environment", drop="TDB_MODEL"),
            "gateway would not start: TDB_MODEL names a folder that does not exist",
        ),
        (environment("dataset", TDB_TOKENS=""), "would not start: TDB_HOST is 0.0.0.0"),
        (environment("gateway", TDB_INFERENCE_ADDRESS="inference:50050"), "does not find"),
        (environment("gateway", TDB_DATASET_ADDRESS="data:50052"), "does not find dataset"),
        (environment("explainer", TDB_DATASET_ADDRESS=""), "explainer does not find dataset"),
        (within("gateway", "environment", drop="TDB_PROVIDER_KEY"), "gets TDB_PROVIDER_KEY"),
        (within("explainer", "volumes", value=["notes:/data"]), "volume notes, which is not"),
        (within("inference-gpu", "networks", "services", value={}), "0 services answer to infer"),
        (within("inference", drop="profiles"), "gpu: 2 services answer to inference"),
        (
            within("gateway", "depends_on", "inference", value={"condition": "service_healthy"}),
            "waits for inference, which not every profile starts",
        ),
        (within("gateway", "depends_on", "db", value={}), "waits for db, which does not exist"),
        (within("dataset", "volumes", value=["sets:/data"]), "volume sets, which is not declared"),
        (within("dataset", "volumes", value=["./sets:/data"]), "may write to ./sets of the host"),
        (
            within("dataset", "healthcheck", "test", -1, value="127.0.0.1:50051"),
            "is not asked for its health at 50052",
        ),
        (
            within("gateway", "healthcheck", "test", 3, value="services.common.prober"),
            "is not asked for its health at 8080",
        ),
    ],
)
def test_what_would_be_wrong_is_found(change: Change, problem: str) -> None:
    broken = copy.deepcopy(read())
    change(broken["services"])
    found = problems(broken, dockerfile.read())
    assert any(problem in each for each in found), found


def test_it_does_not_start_without_tokens() -> None:
    def defaulted(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: defaulted(each) for key, each in value.items()}
        return TOKENS if isinstance(value, str) and "TDB_TOKENS:?" in value else value

    assert "it starts without TDB_TOKENS" in problems(defaulted(read()), dockerfile.read())
    assert "TDB_TOKENS" not in template()


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_serves_the_demo_on_its_device(profile: str) -> None:
    filled = interpolated(read(), {**template(), "TDB_TOKENS": TOKENS})
    (service,) = [
        service
        for name, service in active(filled, profile).items()
        if "inference" in names_of(name, service)
    ]
    settings = settings_of(service, dockerfile.read())
    assert [model.name for model in settings.models] == ["demo-gpt2"]
    assert [each.name for each in settings.dictionaries] == ["demo"]
    assert settings.device == {"cpu": "cpu", "gpu": "cuda"}[profile]
    reserved = service["deploy"]["resources"].get("reservations", {}).get("devices", [])
    assert [each["capabilities"] for each in reserved] == ([["gpu"]] if profile == "gpu" else [])
    assert settings.redis is not None


def has_compose() -> bool:
    """Whether `docker compose` is there; it needs no engine to read a file."""
    if not shutil.which("docker"):
        return False
    return subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0


@pytest.mark.skipif(
    not has_compose(), reason="no docker compose here: the file is read by us alone"
)
@pytest.mark.parametrize("profile", PROFILES)
def test_compose_itself_reads_it(profile: str, tmp_path: Path) -> None:
    written = {**template(), "TDB_TOKENS": TOKENS}
    (tmp_path / ".env").write_text("".join(f"{key}={value}\n" for key, value in written.items()))
    shutil.copy(ROOT / "docker-compose.yml", tmp_path)
    command = ["docker", "compose", "--profile", profile, "config", "--services"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == set(active(read(), profile))


def test_redis_keeps_a_bounded_cache_and_nothing_else() -> None:
    command = " ".join(each or '""' for each in read()["services"]["redis"]["command"])
    assert command == (
        'valkey-server --save "" --appendonly no --maxmemory 512mb --maxmemory-policy allkeys-lfu'
    )


def test_make_compose_env_writes_tokens_that_only_their_owner_reads(tmp_path: Path) -> None:
    (tmp_path / "deploy").mkdir()
    for name in ("Makefile", "deploy/compose.env"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())

    def make() -> str:
        command = ["make", "-s", "compose-env"]
        # Not the flags of a make that runs this test.
        env = {"PATH": os.environ["PATH"]}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=True)
        return done.stdout.decode()

    shown = make()
    written = (tmp_path / ".env").read_text()
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600
    match = re.search(r"^TDB_TOKENS=(me:([0-9a-f]{48}))$", written, re.M)
    assert match is not None
    assert match[2] in shown
    assert Settings.from_env({"TDB_TOKENS": match[1]}).tokens.users == ("me",)
    assert make() == shown, "what is there is kept"
    assert (tmp_path / ".env").read_text() == written
    assert ".env" in (ROOT / ".gitignore").read_text().split()
