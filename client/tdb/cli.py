"""The `tdb` command.

Flags become variables of the environment, so that settings have one source; `tdb up` hands the
same environment to the services it starts. The services' code is imported only by the commands
that need it: a machine with only the client can still say its version.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import tdb

if TYPE_CHECKING:
    from tdb.status import Where

DEMO_NAME = "demo-gpt2"
KEYS = ("TDB_PROVIDER_KEY", "TDB_EMBEDDING_KEY")
"""For the explainer service and no other process."""


class CliError(Exception):
    """Why a command cannot be carried out, in one sentence."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code: 2 for wrong usage, 1 for what failed, 0 otherwise."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["dataset"]:
        return _dataset(given[1:])
    if given[:1] in (["explain"], ["jobs"]):
        from tdb import explaining

        return explaining.main(given)
    parser = _parser()
    options = parser.parse_args(given)
    if options.command is None:
        parser.error("a command is needed: up, status, dataset, explain, jobs or config")
    env = dict(os.environ)
    if options.command == "up":
        _check_up(parser, options, env)
    try:
        if options.command == "config":
            return _config(env)
        if options.command == "status":
            return _status(options, env)
        return _up(options, env)
    except CliError as error:
        print(f"tdb: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tdb", description="Why did the model say A rather than B?", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"tdb {tdb.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    up = commands.add_parser(
        "up", help="start everything on this machine and print the URL", allow_abbrev=False
    )
    up.add_argument("--demo", action="store_true", help="serve the model that comes with tdb")
    up.add_argument(
        "--model",
        action="append",
        metavar="ID_OR_FOLDER",
        help="serve this model; NAME=ID_OR_FOLDER serves it under another name; repeatable, the "
        "first is the default (TDB_MODEL)",
    )
    up.add_argument(
        "--tokenizer", metavar="ID_OR_FOLDER", help="for models without one (TDB_TOKENIZER)"
    )
    up.add_argument(
        "--dictionary",
        action="append",
        metavar="NAME=URI[,unchecked]",
        help="a sparse autoencoder or transcoder, or a set of them, for the default model: a path "
        "or hf://org/repo/path[@revision]; repeatable (TDB_DICTIONARIES)",
    )
    up.add_argument("--host", help="the address to listen on (TDB_HOST)")
    up.add_argument(
        "--data-dir", metavar="DIR", help="where datasets and logs are kept (TDB_DATA_DIR)"
    )
    commands.add_parser("config", help="print every setting and its value")
    _add_status(commands.add_parser("status", help="say who waits for what", allow_abbrev=False))
    commands.add_parser("dataset", help="activation records: build, import, list, delete")
    commands.add_parser("explain", help="explain components in words, and score that")
    commands.add_parser("jobs", help="jobs of explanations: list, follow, pause, resume, cancel")
    return parser


def _add_status(status: argparse.ArgumentParser) -> None:
    status.description = (
        "Shows services, models, memory, cache and who waits for the device. TDB_TOKEN is sent "
        "where the service asks for a token. Exit code 1 where something does not serve."
    )
    status.add_argument(
        "--address",
        type=_host_and_port,
        metavar="HOST:PORT",
        help="the inference service; by default the one that the settings here name",
    )
    status.add_argument(
        "--gateway",
        type=_url,
        metavar="URL",
        help="the gateway; by default that of the settings, and none with --address",
    )
    status.add_argument("--json", action="store_true", help="print JSON, all that is known")
    status.add_argument(
        "--watch",
        type=_pause,
        nargs="?",
        const=2.0,
        metavar="SECONDS",
        help="print anew every 2 seconds, or as many as are said, until Ctrl-C",
    )


def _host_and_port(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise argparse.ArgumentTypeError(f"must be HOST:PORT, not {text!r}")
    return text


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        known = False
    if not known:
        raise argparse.ArgumentTypeError(f"must be a URL such as http://gpu-box:8080, not {text!r}")
    return text


def _pause(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"must be seconds from 0.1 to 3600, not {text!r}")
    return seconds


def _check_up(
    parser: argparse.ArgumentParser, options: argparse.Namespace, env: dict[str, str]
) -> None:
    """Puts the flags of `tdb up` into `env`; exit code 2 where they do not go together."""
    models: list[str] = options.model or []
    if options.demo and models:
        parser.error("--demo and --model exclude each other")
    if any("," in model or not model.strip() for model in models):
        parser.error("--model takes one model: repeat it for more")
    dictionaries: list[str] = options.dictionary or []
    if any(
        "," in entry.strip().removesuffix(",unchecked") or not entry.strip()
        for entry in dictionaries
    ):
        parser.error("--dictionary takes one NAME=URI[,unchecked]: repeat it for more")
    if dictionaries:
        env["TDB_DICTIONARIES"] = ",".join(dictionaries)
    if options.demo:
        env["TDB_MODEL"] = f"{DEMO_NAME}={_demo_folder()}"
        for variable in ("TDB_REFLECTION", "TDB_DEMO_DATASET"):
            env[variable] = env.get(variable, "").strip() or "1"
        of_demo = _demo_folder().parent / "dictionaries"
        if of_demo.is_dir():
            given = env.get("TDB_DICTIONARIES", "").strip()
            env["TDB_DICTIONARIES"] = ",".join(filter(None, (given, f"demo={of_demo}")))
    elif models:
        env["TDB_MODEL"] = ",".join(models)
    elif not env.get("TDB_MODEL", "").strip():
        parser.error("say what to serve: --demo, or --model ID_OR_FOLDER")
    for variable, value in (
        ("TDB_TOKENIZER", options.tokenizer),
        ("TDB_HOST", options.host),
        ("TDB_DATA_DIR", options.data_dir),
    ):
        if value is not None:
            env[variable] = value


def _demo_folder() -> Path:
    found = importlib.util.find_spec("demo")
    if found is None or not found.submodule_search_locations:
        return Path("/nonexistent/demo")
    return Path(found.submodule_search_locations[0]) / "model"


def _dataset(arguments: Sequence[str]) -> int:
    """The dataset service's own commands, in a process with its code."""
    command = [sys.executable, "-P", "-m", "services.dataset.command", *arguments]
    return subprocess.run(command, check=False).returncode


def _config(env: Mapping[str, str]) -> int:
    from services.common.settings import Settings, SettingsError
    from services.common.settings_text import as_lines

    try:
        print("\n".join(as_lines(Settings.from_env(env), env)))
    except SettingsError as error:
        raise CliError(str(error)) from None
    return 0


def _status(options: argparse.Namespace, env: dict[str, str]) -> int:
    from tdb.status import Found, as_text, collect, is_well

    def show(found: Found) -> None:
        if options.json:
            text = json.dumps(found, indent=None if options.watch else 2)
        else:
            text = as_text(found)
        # Only a terminal can be wiped; whoever reads a pipe wants all of it.
        print(("\x1b[H\x1b[J" if options.watch and sys.stdout.isatty() else "") + text, flush=True)

    where = _where(options, env)
    while True:
        found = collect(where)
        show(found)
        if not options.watch:
            return 0 if is_well(found) else 1
        try:
            time.sleep(options.watch)
        except KeyboardInterrupt:
            return 0


def _where(options: argparse.Namespace, env: dict[str, str]) -> "Where":
    from services.common.settings import Settings, SettingsError, listen_address, reachable
    from services.common.tls import ClientTls
    from tdb.status import Where

    token = env.pop("TDB_TOKEN", "")
    try:
        settings = Settings.from_env(env)
        tls = ClientTls.of(settings)
    except SettingsError as error:
        raise CliError(str(error)) from None
    inference, gateway = options.address or "", options.gateway or ""
    others: dict[str, str] = {}
    if not inference:
        if not (settings.inference_address or settings.inference_port):
            raise CliError("TDB_INFERENCE_PORT is 0: say where the service is with --address.")
        inference = settings.inference_target
        if settings.dataset_address or settings.dataset_port:
            others["dataset"] = settings.dataset_target
        if settings.explainer_address or settings.explainer_port:
            others["explainer"] = settings.explainer_target
        if not gateway and settings.gateway_port:
            gateway = f"http://{listen_address(reachable(settings.host), settings.gateway_port)}"
    credentials, more = (tls.credentials(), tls.options()) if tls else (None, [])
    return Where(inference, gateway, others, token, credentials, more)


def _up(options: argparse.Namespace, env: dict[str, str]) -> int:
    from services.common import tls
    from services.common.settings import Settings, SettingsError, reachable
    from tdb.children import Log, Service
    from tdb.supervisor import Plan, Supervisor, SupervisorError

    if options.demo and not _demo_folder().is_dir():
        raise CliError("the demo's model is not part of this installation: use --model.")
    try:
        settings = Settings.from_env(env)
        settings.check_gateway()
        for variable, address in (
            ("TDB_INFERENCE_ADDRESS", settings.inference_address),
            ("TDB_DATASET_ADDRESS", settings.dataset_address),
            ("TDB_EXPLAINER_ADDRESS", settings.explainer_address),
        ):
            if address:
                raise CliError(
                    f"{variable} is for a process that is run alone: unset it for `tdb up`."
                )
        host = reachable(settings.host)
        tls.check_together(tls.ServerTls.of(settings), tls.ClientTls.of(settings), host)
        log_folder = settings.folder("logs")
    except SettingsError as error:
        raise CliError(str(error)) from None
    # -P: a folder called `services` where the user happens to be must not be taken for ours.
    python = (sys.executable, "-P", "-m")
    plan = Plan(
        services=[
            Service("inference", (*python, "services.inference"), "TDB_INFERENCE_PORT", KEYS),
            Service("dataset", (*python, "services.dataset"), "TDB_DATASET_PORT", KEYS),
            Service("explainer", (*python, "services.explainer"), "TDB_EXPLAINER_PORT"),
            Service("gateway", (*python, "gateway"), "TDB_GATEWAY_PORT", KEYS),
        ],
        env={**env, "HF_HUB_DISABLE_TELEMETRY": "1"},
        host=host,
        log_folder=log_folder,
        stop_grace_s=settings.drain_s + 5,
        loading=f"Loading {', '.join(model.name for model in settings.models)} ...",
    )
    for service in plan.services:
        log = Log.of(service, log_folder)
        try:
            log.open()
        except OSError as error:
            raise CliError(f"{log.path} cannot be written: {error.strerror}.") from None
        log.close()

    async def supervise() -> None:
        await Supervisor(plan).run()

    try:
        asyncio.run(supervise())
    except SupervisorError as error:
        raise CliError(str(error)) from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
