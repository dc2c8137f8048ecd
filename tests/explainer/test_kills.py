"""The explainer killed under `tdb up`: started again on its port, with all that was answered."""

import os
import signal
import urllib.error
from pathlib import Path
from typing import Any

from tests.cli.helpers import Up, alive, tdb, until
from tests.cli.test_up import model, post, ready
from tests.explainer.test_process import KEY, PROVIDER
from tests.faults.process import child

__all__ = ["model"]

SERVICE = "tdb.explainer.v1.ExplainerService"
WRITTEN = {"model": {"id": "small"}, "component": "neuron.0.1", "text": "fires on names"}
LISTED = {"model": {"id": "small"}, "components": ["neuron.0.1"]}


def answers(url: str) -> bool:
    try:
        post(f"{url}/{SERVICE}/GetCapabilities", {})
    except urllib.error.HTTPError as error:
        return error.code != 503
    return True


def test_a_killed_explainer_comes_back_with_what_it_had(model: Path, tmp_path: Path) -> None:
    with Up(tdb("up", "--model", f"small={model}"), tmp_path, **PROVIDER) as up:
        url = up.url()
        told = {pid: KEY in Path(f"/proc/{pid}/environ").read_text() for pid in up.children()}
        assert [pid for pid, has_key in told.items() if has_key] == [child(up, "explainer")]
        stored: Any = post(f"{url}/{SERVICE}/WriteExplanation", WRITTEN)["explanation"]
        others = set(up.children()) - {child(up, "explainer")}
        os.kill(child(up, "explainer"), signal.SIGKILL)
        until("the crash to show", lambda: any("SIGKILL" in line for line in up.errors))
        until("readiness again", lambda: ready(url), within_s=60)
        until("an answer", lambda: answers(url))
        assert others < set(up.children())
        assert post(f"{url}/{SERVICE}/ListExplanations", LISTED)["explanations"] == [stored]
        listening = [line for line in up.errors if line.startswith("explainer: listening")]
        assert len({line.split()[-1] for line in listening}) == 1, "on the same port"
        children = up.children()
        assert up.stop() == 0
    assert not any(alive(pid) for pid in children)
