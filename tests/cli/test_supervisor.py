"""The supervisor over small services: every way in which one can end."""

import contextlib
import http.client
import os
import re
import signal
import sys
import urllib.request
from pathlib import Path

import pytest
from tdb.children import Log

from tests.cli.helpers import Up, alive, until

PROGRAM = str(Path(__file__).with_name("supervise.py"))


def supervise(folder: Path, inference: str = "", gateway: str = "") -> Up:
    return Up([sys.executable, PROGRAM, inference, gateway], folder)


def get(url: str) -> int:
    with urllib.request.urlopen(url, timeout=5) as response:
        return int(response.status)


def test_the_url_stands_alone_and_everything_stops_cleanly(tmp_path: Path) -> None:
    with supervise(tmp_path) as up:
        url = up.url()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
        assert get(f"{url}/readyz") == 200
        children = up.children()
        assert len(children) == 2
        assert up.stop(signal.SIGINT) == 0
    assert not any(alive(pid) for pid in children)
    assert up.out.empty()
    assert any(line.startswith("inference: listening on port") for line in up.errors)
    assert up.errors[-1] == "Stopping."
    assert "listening" in (tmp_path / "gateway.log").read_text()


def test_warnings_of_services_are_shown(tmp_path: Path) -> None:
    with supervise(tmp_path) as up:
        get(up.url())
        until("the warning", lambda: "gateway: gateway was asked" in up.errors)
        up.stop()


def test_how_far_a_service_is_with_long_work_is_shown(tmp_path: Path) -> None:
    with supervise(tmp_path, "building") as up:
        up.url()
        until("the line", lambda: "inference: 5 of 7 tokens" in up.errors)
        up.stop()


@pytest.mark.parametrize("which", ["inference", "gateway"])
def test_a_service_that_refuses_before_ready_ends_everything(tmp_path: Path, which: str) -> None:
    with supervise(tmp_path, **{which: "refuse"}) as up:
        assert up.end() == 1
    assert up.errors[-1] == "the model folder is empty"
    assert up.out.empty()


def test_a_service_that_dies_silently_before_ready_is_described(tmp_path: Path) -> None:
    with supervise(tmp_path, "crash") as up:
        assert up.end() == 1
    log = tmp_path / "inference.log"
    assert up.errors == [f"the inference service ended with exit code 7; its log is {log}"]


def test_a_service_that_is_killed_while_loading_ends_everything(tmp_path: Path) -> None:
    with supervise(tmp_path, gateway="loading") as up:
        until("loading", lambda: "Loading ..." in up.errors)
        children = up.children()
        os.kill(children[0], signal.SIGKILL)
        assert up.end() == 1
    assert "ended by signal SIGKILL" in up.errors[-1]
    assert not any(alive(pid) for pid in children)


def test_stopping_while_loading_is_no_error(tmp_path: Path) -> None:
    with supervise(tmp_path, gateway="loading") as up:
        until("loading", lambda: "Loading ..." in up.errors)
        children = up.children()
        assert up.stop() == 0
    assert up.out.empty()
    assert not any(alive(pid) for pid in children)


def test_a_dead_service_comes_back_on_its_port_five_times(tmp_path: Path) -> None:
    with supervise(tmp_path) as up:
        url = up.url()
        inference, gateway = up.children()
        os.kill(gateway, signal.SIGKILL)
        until("a new gateway", lambda: any("listening again" in line for line in up.errors))
        assert get(f"{url}/readyz") == 200
        assert inference in up.children()
        os.kill(inference, signal.SIGKILL)
        until("both", lambda: sum("listening again" in line for line in up.errors) == 2)
        assert up.stop() == 0


def test_a_service_that_lost_its_device_is_started_again(tmp_path: Path) -> None:
    with supervise(tmp_path, "lost") as up:
        up.url()
        listening = next(line for line in up.errors if line.startswith("inference: listening"))
        _, gateway = up.children()
        with contextlib.suppress(http.client.RemoteDisconnected):
            get(f"http://127.0.0.1:{listening.split()[-1]}/lose")
        until("a new one", lambda: listening.replace("on", "again on") in up.errors)
        assert gateway in up.children()
        assert "the device failed: start it again; starting it again in 0.5 s" in up.errors
        assert up.stop() == 0


def test_a_full_log_is_set_aside_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdb.children.LOG_BYTES", 1000)
    log = Log(tmp_path / "gateway.log")
    for number in range(100):
        log.write(b"%090d\n" % number)
    log.close()
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(files) == {"gateway.log", "gateway.log.1"}
    assert all(len(content) <= 1000 + 91 for content in files.values())
    lines = (files["gateway.log.1"] + files["gateway.log"]).splitlines()
    assert [int(line) for line in lines] == list(range(100 - len(lines), 100))


def test_a_service_that_keeps_dying_ends_everything(tmp_path: Path) -> None:
    """With pauses of nothing, so that it takes a moment rather than a minute."""
    program = f"import tdb.supervisor as s; s.FIRST_PAUSE_S = 0; import runpy; import sys; \
sys.argv = [{PROGRAM!r}, '', '']; runpy.run_path({PROGRAM!r})"
    with Up([sys.executable, "-c", program], tmp_path) as up:
        up.url()
        bystander, victim = up.children()
        for deaths in range(1, 7):
            os.kill(victim, signal.SIGKILL)
            if deaths <= 5:
                until(
                    f"restart {deaths}",
                    lambda: sum("listening again" in line for line in up.errors) == deaths,  # noqa: B023
                )
                victim = next(pid for pid in up.children() if pid != bystander)
        assert up.end() == 1
    assert "it was restarted 5 times in ten minutes" in up.errors[-1]
    assert not alive(bystander)


def test_children_end_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    with supervise(tmp_path) as up:
        up.url()
        children = up.children()
        up.process.kill()
        until("the children's end", lambda: not any(alive(pid) for pid in children))


def test_a_service_that_does_not_listen_to_reason_is_killed(tmp_path: Path) -> None:
    with supervise(tmp_path, "stubborn") as up:
        up.url()
        children = up.children()
        assert up.stop() == 0
    assert not any(alive(pid) for pid in children)
