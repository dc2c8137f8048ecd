"""`tdb dataset build|list|cancel|delete`: they ask the running dataset service.

A build belongs to the service; the command shows how far it is and may leave.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from tdb import channel
from tdb.dataset.v1 import build_pb2, dataset_pb2, service_pb2_grpc

from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.settings import Settings
from services.common.tls import ClientTls
from services.dataset.building import terminal
from services.dataset.building.builds import CORPORA


class Refused(Exception):
    """What the service answered, in one sentence."""


def add(commands: Any) -> None:
    """Adds the commands to the parser of `tdb dataset`."""
    build = commands.add_parser(
        "build",
        help="build a dataset from a corpus, with the model that is served",
        description="Builds a dataset from a corpus with the model that is served. The build goes "
        "on when this command is ended, and after a restart of the service; the same command "
        "shows it again.",
        allow_abbrev=False,
    )
    build.add_argument("name", metavar="NAME", help="what the dataset is to be called")
    source = build.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--files",
        metavar="PATH",
        help="a file or folder of .txt, .jsonl, .parquet or .arrow (text also .gz)",
    )
    source.add_argument("--hub", metavar="ID", help="a dataset of the Hugging Face Hub")
    source.add_argument("--demo", action="store_true", help="the demo's corpus")
    build.add_argument("--tokens", type=int, required=True, help="how many are read at most")
    build.add_argument("--field", default="", help="the field that holds the text (text)")
    build.add_argument("--revision", default="", help="--hub: of the dataset")
    build.add_argument("--folder", default="", help="--hub: only files below it")
    build.add_argument("--demo-seed", default="", help="--demo: of the generator")
    build.add_argument("--model", default="", metavar="ID", help="which of those that are served")
    build.add_argument("--length", type=int, help="tokens of a sequence (128)")
    build.add_argument(
        "--groups",
        default="",
        metavar="GROUP,...",
        help="neuron, head, latent, or of one layer or dictionary: neuron.3 (neuron,head)",
    )
    build.add_argument("--top", type=int, help="strongest sequences kept (20)")
    build.add_argument("--random", type=int, help="sequences kept at random (10)")
    build.add_argument("--quantiles", type=int, help="intervals sampled (4)")
    build.add_argument("--seed", type=int, help="of what is drawn (0)")
    build.add_argument("--detach", action="store_true", help="begin it and leave")
    for name, help in (
        ("list", "the datasets and builds of the service"),
        ("cancel", "stop a build; what is done of it stays"),
        ("delete", "delete a dataset, or what was built of one"),
    ):
        command = commands.add_parser(name, help=help, allow_abbrev=False)
        if name != "list":
            command.add_argument("name", metavar="NAME")
        _add_where(command)
    _add_where(build)


def _add_where(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--address", metavar="HOST:PORT", help="the dataset service; by default of the settings"
    )
    command.add_argument("--data-dir", metavar="DIR", help="where datasets are (TDB_DATA_DIR)")


def run(options: argparse.Namespace, settings: Settings, token: str) -> None:
    """`token` is sent where it is not empty. Raises Refused, TdbError, SettingsError."""
    with _connected(options, settings, token) as ask:
        match options.command:
            case "build":
                _build(options, settings, ask)
            case "list":
                _list(ask)
            case "cancel":
                build = ask("CancelBuild", build_pb2.CancelBuildRequest(dataset=options.name)).build
                print(f"{options.name}: stopped at {build.done:,} of {build.total:,} {build.unit}")
            case "delete":
                request = dataset_pb2.DeleteDatasetRequest(dataset=options.name)
                freed = ask("DeleteDataset", request).bytes
                print(f"{options.name}: deleted, {freed / 2**20:.1f} MiB are free")


Ask = Callable[[str, Any], Any]


@contextmanager
def _connected(options: argparse.Namespace, settings: Settings, token: str) -> Iterator[Ask]:
    tls = ClientTls.of(settings)
    target = options.address or settings.dataset_target
    chosen = channel.options(channel.GONE)
    connection = (
        grpc.secure_channel(target, tls.credentials(), [*chosen, *tls.options()])
        if tls
        else grpc.insecure_channel(target, chosen)
    )
    metadata = [("authorization", f"Bearer {token}")] if token else []

    def ask(method: str, request: Any) -> Any:
        return getattr(service_pb2_grpc.DatasetServiceStub(connection), method)(
            request, metadata=metadata
        )

    with connection:
        try:
            yield ask
        except grpc.RpcError as error:
            raise _refusal(error, target) from None


def _refusal(error: Any, target: str) -> Refused:
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return Refused(
            f"the dataset service at {target} does not answer ({error.details()}): is `tdb up` "
            "running?"
        )
    if error.code() is grpc.StatusCode.UNAUTHENTICATED:
        return Refused(f"{error.details()}; TDB_TOKEN is what is sent")
    return Refused(str(error.details()))


def _build(options: argparse.Namespace, settings: Settings, ask: Ask) -> None:
    request = _request(options, settings)
    calls = ask("BuildDataset", request)
    live = sys.stderr.isatty()
    shown = ""
    try:
        for response in calls:
            if response.WhichOneof("event") == "dataset":
                if live and shown:
                    print(file=sys.stderr)
                print(terminal.finished(response.dataset))
                return
            line = terminal.sentence(response.progress)
            if options.detach:
                print(f"{line}; `tdb dataset list` shows how far it is")
                return
            if line != shown:
                print(
                    f"\r\x1b[K{line}" if live else line, end="" if live else "\n", file=sys.stderr
                )
                sys.stderr.flush()
            shown = line
    except KeyboardInterrupt:
        print(
            f"\n{options.name}: the build goes on; `tdb dataset cancel` stops it", file=sys.stderr
        )
    finally:
        calls.cancel()


def _list(ask: Ask) -> None:
    found = ask("ListDatasets", dataset_pb2.ListDatasetsRequest())
    for each in found.datasets:
        print(terminal.finished(each))
    for build in found.builds:
        print(terminal.sentence(build))
    for unreadable in found.unreadable:
        print(f"{unreadable.name}: {unreadable.reason}")
    if not (found.datasets or found.builds or found.unreadable):
        print("There is no dataset yet: `tdb dataset build` or `tdb dataset import` makes one.")


def _request(options: argparse.Namespace, settings: Settings) -> build_pb2.BuildDatasetRequest:
    request = build_pb2.BuildDatasetRequest(
        dataset=options.name,
        model=options.model,
        tokens=options.tokens,
        groups=[each.strip() for each in options.groups.split(",") if each.strip()],
    )
    for field, value in (
        ("sequence_length", options.length),
        ("top_k", options.top),
        ("random", options.random),
        ("quantiles", options.quantiles),
        ("seed", options.seed),
    ):
        if value is not None:
            setattr(request, field, value)
    if options.demo:
        request.corpus.demo.seed = options.demo_seed
        request.corpus.demo.SetInParent()
    elif options.hub:
        request.corpus.hub.id = options.hub
        request.corpus.hub.revision = options.revision
        request.corpus.hub.folder = options.folder
        request.corpus.hub.field = options.field
    else:
        request.corpus.files.path = _offered(options, settings)
        request.corpus.files.field = options.field
    return request


def _offered(options: argparse.Namespace, settings: Settings) -> str:
    """The path within `corpora`; a link to it is put there where the file is elsewhere here.

    Raises InvalidArgument, FailedPrecondition.
    """
    corpora = settings.data_dir / CORPORA
    given = Path(options.files).expanduser()
    if options.address or (not given.is_absolute() and (corpora / given).exists()):
        return str(options.files)
    path = given.absolute()
    if not path.exists():
        raise InvalidArgument(f"{path} does not exist")
    if path.is_relative_to(corpora):
        return path.relative_to(corpora).as_posix()
    link = corpora / path.name
    try:
        settings.folder(CORPORA)
        if not (link.is_symlink() and link.readlink() == path):
            link.symlink_to(path)
    except FileExistsError:
        raise FailedPrecondition(
            f"{link} is there already and is another: rename one of the two"
        ) from None
    except OSError as error:
        raise FailedPrecondition(f"{link} cannot be made: {error.strerror}") from None
    return path.name
