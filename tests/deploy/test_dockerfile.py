"""The Dockerfile in structure, and by building it where there is a container engine."""

import os
import re
import shutil
import subprocess

import pytest

from services.common.settings import setting_fields
from tests.deploy.dockerfile import ROOT, TARGETS, Dockerfile, problems, read

DEFAULTS = {each.metadata["variable"]: each.metadata["default"]({}) for each in setting_fields()}
TEXT = (ROOT / "Dockerfile").read_text()


def engine() -> str | None:
    """A container engine that answers; a client without one does not count."""
    for name in ("docker", "podman"):
        path = shutil.which(name)
        if path and subprocess.run([path, "info"], capture_output=True).returncode == 0:
            return path
    return None


def test_nothing_is_wrong() -> None:
    assert problems(read(), DEFAULTS) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("python:3.12-slim", "python", "python has no tag of its own"),
        ("node:24-slim", "node:latest", "node:latest has no tag of its own"),
        ("FROM runtime AS dataset", "FROM runtime AS data", "there is no target dataset"),
        ('CMD ["python", "-m", "gateway"]', "CMD python -m gateway", "gateway does not run"),
        ("services.dataset", "services.datasets", "dataset does not run services.dataset"),
        ("EXPOSE 50051", "EXPOSE 50050", "inference does not expose 50051"),
        ("127.0.0.1:50052", "127.0.0.1:50051", "dataset has no health check at 50052"),
        ("services.common.probe", "services.common.prober", "has no health check"),
        ("USER 10001:10001", "USER tdb", "runs as root, or as a user without a number"),
        ("USER 10001:10001", "USER 0:0", "runs as root"),
        ("STOPSIGNAL SIGTERM", "STOPSIGNAL SIGKILL", "is not stopped by SIGTERM"),
        ("[gateway,otel]", "[inference,otel]", "gateway does not install its own extra"),
        ("[gateway,otel]", "[gateway,otel] torch", "gateway and torch do not belong together"),
        ('pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"', "true", "and torch do"),
    ],
)
def test_what_would_be_wrong_is_found(old: str, new: str, problem: str) -> None:
    assert old in TEXT
    broken = TEXT.replace(old, new)
    found = problems(Dockerfile.parse(broken), DEFAULTS)
    assert any(problem in each for each in found), found


def test_what_is_copied_exists_and_is_in_the_context() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert "*" in ignored, "the context is an allow-list"
    for stage in read().stages.values():
        for name, rest in stage.instructions:
            if name != "COPY" or "--from=" in rest:
                continue
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source.split('/')[0]}" in ignored, source
    for secret in (".env", ".git", ".venv"):
        assert f"!{secret}" not in ignored


def test_what_is_copied_from_another_stage_is_made_there() -> None:
    stages = read().stages
    for stage in stages.values():
        for _, rest in stage.instructions:
            for source in re.findall(r"(?:--from=|from=)([\w-]+)", rest):
                assert source in stages, source


def test_torch_is_the_one_that_make_installs() -> None:
    makefile = (ROOT / "Makefile").read_text()
    pinned = re.search(r"^TORCH := (\S+)$", makefile, re.M)
    assert pinned is not None
    assert ("ARG", f"TORCH={pinned[1]}") in read().stages["inference-environment"].instructions


def test_the_image_keeps_what_the_compose_file_mounts() -> None:
    file = read()
    for target in TARGETS:
        environment = file.environment(target)
        assert environment["TDB_DATA_DIR"] == "/data"
        assert environment["HF_HOME"] == "/hub"
        assert environment["TDB_HOST"] == "0.0.0.0"


@pytest.mark.long
@pytest.mark.skipif(engine() is None, reason="no container engine here: images are not built")
@pytest.mark.parametrize("target", TARGETS)
def test_the_image_builds_and_its_command_starts(target: str) -> None:
    docker = engine()
    assert docker is not None
    tag = f"transformer-debugger-test-{target}"
    subprocess.run(
        [docker, "build", "--target", target, "--tag", tag, str(ROOT)],
        check=True,
        env={**os.environ, "DOCKER_BUILDKIT": "1"},
    )
    done = subprocess.run(
        [docker, "run", "--rm", "--read-only", tag], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "set TDB_TOKENS as well" in done.stderr
