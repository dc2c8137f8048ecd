"""systemd's units: in structure, and as `systemd-analyze verify` sees them where it is there."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.units import FOLDER, environment, parse, problems, read


def test_nothing_is_wrong() -> None:
    assert set(read()) == {
        "tdb-inference.service",
        "tdb-dataset.service",
        "tdb-explainer.service",
        "tdb-gateway.service",
        "tdb-redis.service",
    }
    assert problems(read(), environment()) == []


@pytest.mark.parametrize(
    ("name", "old", "new", "problem"),
    [
        ("inference", "-m services.inference", "-m services.infer", "does not run services.infer"),
        ("inference", "/opt/tdb/bin/python -P", "/usr/bin/python3", "does not run"),
        ("inference", "PrivateTmp=yes", "PrivateTmp=yes\nProtectClock=yes", "cannot open the GPU"),
        ("gateway", "EnvironmentFile=/etc/tdb/tdb.env", "", "does not read /etc/tdb/tdb.env"),
        ("dataset", "User=tdb", "User=root", "runs as root"),
        ("redis", "DynamicUser=yes", "", "runs as root"),
        ("gateway", "Restart=on-failure", "Restart=no", "is not started again"),
        ("gateway", "StartLimitBurst=5", "", "is started again without end"),
        ("inference", "MemoryMax=80%", "", "has no memory limit"),
        ("redis", "TimeoutStopSec=5", "", "has no stop grace period"),
        ("inference", "TimeoutStopSec=40", "TimeoutStopSec=30", "before it has drained for 30 s"),
        ("gateway", "TDB_DRAIN_SECONDS=30", "TDB_DRAIN_SECONDS=60", "drained for 60 s"),
        ("gateway", "TDB_DRAIN_SECONDS=30", "TDB_DRAIN_SECOND=30", "TDB_DRAIN_SECONDS?"),
        ("gateway", " tdb-dataset.service", " tdb-data.service", "which does not exist"),
        ("dataset", "StateDirectory=tdb", "StateDirectory=tdb/data", "its state folder"),
        ("dataset", "ProtectSystem=strict", "ProtectSystem=full", "ProtectSystem=strict"),
        ("redis", "NoNewPrivileges=yes", "", "does not have NoNewPrivileges=yes"),
        ("redis", "WantedBy=multi-user.target", "", "cannot be enabled"),
    ],
)
def test_what_would_be_wrong_is_found(name: str, old: str, new: str, problem: str) -> None:
    text = (FOLDER / f"tdb-{name}.service").read_text()
    assert old in text
    broken = {**read(), f"tdb-{name}.service": parse(text.replace(old, new))}
    found = problems(broken, environment())
    assert any(problem in each for each in found), found


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("TDB_MODLE", "gpt2", "TDB_MODLE is not a setting"),
        ("TDB_HOST", "0.0.0.0", "would not start: TDB_HOST is 0.0.0.0"),
        ("TDB_GATEWAY_PORT", "80", "does not listen at 8080"),
        ("TDB_EXPLAINER_PORT", "80", "does not listen at 50053"),
        ("TDB_PROVIDER_KEY", "sk-1", "reads TDB_PROVIDER_KEY with all others"),
    ],
)
def test_what_would_be_wrong_in_the_environment_is_found(
    variable: str, value: str, problem: str
) -> None:
    found = problems(read(), {**environment(), variable: value})
    assert any(problem in each for each in found), found


def test_a_missing_unit_is_found() -> None:
    units = read()
    del units["tdb-dataset.service"]
    assert "there is no tdb-dataset.service" in problems(units, environment())


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
def test_systemd_accepts_them(tmp_path: Path) -> None:
    def verify(old: str = "", new: str = "") -> subprocess.CompletedProcess[str]:
        for path in FOLDER.glob("*.service"):
            text = path.read_text()
            # It wants the programs to be there.
            for program in ("/opt/tdb/bin/python", "/usr/bin/valkey-server"):
                text = text.replace(program, sys.executable)
            (tmp_path / path.name).write_text(text.replace(old, new) if old else text)
        units = sorted(str(path) for path in tmp_path.glob("*.service"))
        return subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)

    done = verify()
    assert (done.returncode, done.stderr) == (0, "")
    assert "Restrat" in verify("Restart=", "Restrat=").stderr
