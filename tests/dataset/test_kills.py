"""A writer that is killed and started again, over and over, ends with the very same bytes."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.dataset.library import Library
from tests.dataset import helpers
from tests.dataset import writer as program

ROOT = Path(__file__).parents[2]
PAUSE_S = 0.002
RECORDS = len(program.GROUPS) * program.PARTS * program.SIZE


def start(folder: Path) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'client'}"}
    command = [sys.executable, "-m", "tests.dataset.writer", str(folder), str(PAUSE_S)]
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE)


def check_whole(folder: Path, wanted: dict[str, bytes]) -> None:
    """Every file is as an uninterrupted writer leaves it. A kill between the manifest and the
    tidying up leaves marks that say nothing any more."""
    left = helpers.bytes_of(folder)
    assert {name: left.get(name) for name in wanted} == wanted
    assert all(name.endswith((".done", ".json", ".lock")) for name in left.keys() - wanted.keys())


def kill_and_resume(tmp_path: Path, kills: int) -> None:
    program.main(tmp_path / "whole", 0)
    wanted = helpers.bytes_of(tmp_path / "whole")
    broken = tmp_path / "library" / "d"
    library = Library(broken.parent)
    moments = random.Random(5)
    killed = resumed = 0
    while killed < kills:
        writer = start(broken)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        time.sleep(moments.uniform(0, 0.3))
        writer.kill()
        writer.stdout.close()
        killed += writer.wait() != 0
        if (broken / "manifest.json").exists():
            check_whole(broken, wanted)
            assert library.open("d").records == RECORDS
            library.delete("d")
        else:
            assert library.names() == [], "half a dataset is none"
            resumed += len(list(broken.glob("*.done"))) > 0
    assert resumed > 0, "nothing was ever left to go on from"
    with start(broken) as writer:
        assert writer.wait() == 0
    check_whole(broken, wanted)


def test_a_few_kills(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, 3)


@pytest.mark.long
def test_twenty_kills(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, 20)
