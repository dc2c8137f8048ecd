"""The command's own refusals and answers; nothing is started here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tdb
from tdb.cli import main

from services.common.settings import setting_fields

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for field in setting_fields():
        monkeypatch.delenv(field.metadata["variable"], raising=False)
    monkeypatch.setenv("TDB_DATA_DIR", str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "a command is needed"),
        (("down",), "invalid choice: 'down'"),
        (("up",), "--demo, or --model ID_OR_FOLDER"),
        (("up", "--demo", "--model", "gpt2"), "--demo and --model exclude each other"),
        (("up", "--model", "a,b"), "--model takes one model"),
        (("up", "--model", ""), "--model takes one model"),
        (("up", "--demo", "--dictionary", "a=x,b=y"), "--dictionary takes one NAME=URI"),
        (("up", "--demo", "--dictionary", " "), "--dictionary takes one NAME=URI"),
        (("up", "--mod", "gpt2"), "unrecognized arguments"),
        (("up", "--model"), "expected one argument"),
    ],
)
def test_wrong_usage_is_exit_2(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "variables", "says"),
    [
        (("up", "--model", "/no/such/folder"), {}, "names a folder that does not exist"),
        (("up", "--model", "gpt2", "--host", "0.0.0.0"), {}, "set TDB_TOKENS as well"),
        (
            ("up", "--model", "gpt2", "--host", "::"),
            {"TDB_TRUSTED_GATEWAYS": "10.0.0.9"},
            "the gateway needs TDB_TOKENS or TDB_TRUSTED_PROXIES",
        ),
        (("up", "--model", "gpt2"), {"TDB_TLS_CERT": "/no/such.pem"}, "which cannot be read"),
        (("up", "--model", "gpt2", "--data-dir", __file__), {}, "TDB_DATA_DIR must be a folder"),
        (("up", "--model", "gpt2"), {"TDB_GATEWAY_PORT": "x"}, "TDB_GATEWAY_PORT must be a port"),
        (
            ("up", "--model", "gpt2", "--dictionary", "a=/no/such,unchecked"),
            {},
            "TDB_DICTIONARIES names a path that does not exist: /no/such",
        ),
        (
            ("up", "--model", "gpt2", "--dictionary", "a=org/r", "--dictionary", "a=org/s"),
            {},
            "TDB_DICTIONARIES names two dictionaries 'a'",
        ),
        (
            ("up", "--model", "gpt2"),
            {"TDB_INFERENCE_ADDRESS": "a:1"},
            "TDB_INFERENCE_ADDRESS is for",
        ),
        (("up",), {"TDB_MODEL": "/no/such/folder"}, "names a folder that does not exist"),
    ],
)
def test_what_cannot_be_right_is_one_sentence_and_exit_1(
    arguments: tuple[str, ...],
    variables: dict[str, str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"tdb {tdb.__version__}\n"


def test_config_prints_every_setting_and_no_token(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TDB_TOKENS", "ann:hush")
    assert main(["config"]) == 0
    out = capsys.readouterr().out
    assert "hush" not in out
    assert "TDB_TOKENS=(tokens of ann)  # environment" in out
    names = [line.partition("=")[0] for line in out.splitlines()]
    assert names == [field.metadata["variable"] for field in setting_fields()]


def test_a_flag_beats_its_variable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TDB_DICTIONARIES", "other=org/repo")
    assert main(["up", "--model", "gpt2", "--dictionary", "mine=nowhere"]) == 1
    assert "not 'nowhere'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "given", "reflection"),
    [
        (["up", "--demo"], None, "1"),
        (["up", "--demo"], "0", "0"),
        (["up", "--model", "gpt2"], None, None),
        (["up", "--model", "gpt2"], "1", "1"),
    ],
)
def test_only_the_demo_describes_itself_unasked(
    arguments: list[str],
    given: str | None,
    reflection: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[dict[str, str]] = []

    def up(options: object, env: dict[str, str]) -> int:
        started.append(env)
        return 0

    monkeypatch.setattr("tdb.cli._up", up)
    if given is not None:
        monkeypatch.setenv("TDB_REFLECTION", given)
    assert main(arguments) == 0
    assert started[0].get("TDB_REFLECTION") == reflection


@pytest.mark.parametrize(
    ("module", "host"),
    [
        ("gateway", "::"),
        ("gateway", "0.0.0.0"),
        ("gateway", "gpu-box"),
        ("services.dataset", "::"),
        ("services.explainer", "::"),
        ("services.inference", "::"),  # as the others, but slow to import
    ],
)
def test_no_process_listens_for_others_without_knowing_who_they_are(
    module: str, host: str, tmp_path: Path
) -> None:
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TDB_HOST": host}
    done = subprocess.run(
        [sys.executable, "-m", module],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"TDB_HOST is {host}, which others can reach")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
