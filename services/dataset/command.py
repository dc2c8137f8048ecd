"""`tdb dataset ...`, as a process of its own: `python -m services.dataset.command`.

`import` works on the folder of datasets itself, so it needs no running service; one that runs
serves what was imported at once. The others ask the running service (`service_commands`).
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from services.common.addresses import Kind
from services.common.errors import TdbError
from services.common.settings import Settings, SettingsError
from services.dataset import library, service_commands
from services.dataset.groups import Group
from services.dataset.importers import importing
from services.dataset.manifest import Manifest

KINDS = (Kind.NEURON, Kind.HEAD, Kind.LATENT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code: 2 for wrong usage, 1 for what failed, 0 otherwise."""
    parser = _parser()
    options = parser.parse_args(arguments)
    env = dict(os.environ)
    if options.data_dir is not None:
        env["TDB_DATA_DIR"] = options.data_dir
    token = env.pop("TDB_TOKEN", "")
    try:
        if options.command != "import":
            service_commands.run(options, Settings.from_env(env), token)
            return 0
        settings = Settings.from_env(env)
        folder = settings.folder("datasets") / library.check_name(options.name)
        manifest = _import(parser, options, folder, settings.datasets_bytes)
    except (TdbError, SettingsError, service_commands.Refused) as error:
        print(f"tdb: {error}", file=sys.stderr)
        return 1
    print(
        f"{options.name}: {manifest.records} records, {manifest.size / 2**20:.1f} MiB in {folder}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tdb dataset", description="Activation records on this machine.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    service_commands.add(commands)
    imports = commands.add_parser(
        "import",
        help="make a dataset from OpenAI's or Neuronpedia's records",
        description="Makes a dataset from others' records. One that was cut off goes on where it "
        "was when it is called again.",
        allow_abbrev=False,
    )
    imports.add_argument("name", metavar="NAME", help="what the dataset is to be called")
    imports.add_argument(
        "source", metavar="FOLDER", type=Path, help="LAYER/INDEX.json (openai), or batch-N.json"
    )
    imports.add_argument("--format", required=True, choices=("openai", "neuronpedia"))
    imports.add_argument(
        "--components",
        choices=[kind.value for kind in KINDS],
        help="openai: what an INDEX is",
    )
    imports.add_argument("--model", metavar="ID", help="openai: the model that was run")
    imports.add_argument(
        "--dictionary",
        default="",
        metavar="NAME",
        help="the id of the latents' dictionary here; for openai with {layer} in it where there "
        "are several; for neuronpedia instead of LAYER-SET",
    )
    imports.add_argument("--data-dir", metavar="DIR", help="where datasets are (TDB_DATA_DIR)")
    return parser


def _import(
    parser: argparse.ArgumentParser, options: argparse.Namespace, folder: Path, most_bytes: int
) -> Manifest:
    source: Path = options.source
    if options.format == "neuronpedia":
        if options.components or options.model:
            parser.error("neuronpedia's files name the components and the model themselves")
        return importing.import_neuronpedia(
            source, folder, options.dictionary, _show, most_bytes=most_bytes
        )
    if not (options.components and options.model):
        parser.error("openai's files need --components and --model")
    kind = Kind(options.components)
    if (kind is Kind.LATENT) != bool(options.dictionary):
        parser.error("--dictionary goes with --components latent")
    return importing.import_openai(
        source,
        folder,
        kind,
        options.model,
        options.dictionary,
        _show,
        most_bytes=most_bytes,
    )


def _show(group: Group, done: int, total: int) -> None:
    print(f"{group}: {done} of {total}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
