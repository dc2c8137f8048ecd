"""`tdb explain` and `tdb jobs`: components explained as a job of the explainer service.

    tdb explain --dataset demo neuron.0.3 neuron.0.4 --method token_pattern --score detection
    tdb explain --dataset demo --range neuron.0.0 neuron.0.511 --method contrastive --max-cost 5
    tdb jobs list|follow|pause|resume|cancel

Before a language model is asked, its host and what that may cost are shown, and nothing is sent
without a yes and a budget. The job belongs to the service: Ctrl-C leaves it running. Components go
to standard output, one a line; everything else to standard error.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc

from tdb import channel, job_text
from tdb.explainer.v1 import explain_pb2, explanation_pb2, job_pb2, service_pb2_grpc
from tdb.job_text import Shown

METHODS = tuple(
    name.removeprefix("METHOD_").lower()
    for name, _ in explanation_pb2.Method.items()
    if name not in ("METHOD_UNSPECIFIED", "METHOD_HUMAN", "METHOD_IMPORTED")
)
SCORERS = tuple(
    name.removeprefix("SCORER_").lower()
    for name, _ in explanation_pb2.Scorer.items()
    if name != "SCORER_UNSPECIFIED"
)
JUDGES = ("offline", "provider")

Ask = Callable[[str, Any], Any]


class Refused(Exception):
    """Why a command cannot be carried out, in one sentence."""


def main(arguments: Sequence[str]) -> int:
    """Runs one command, its name first; the exit code: 2 for wrong usage, 1 for what failed or was
    ended before it was done, 0 otherwise."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "explain":
        _check(parser, options)
    try:
        with _connected(options) as ask:
            return int(options.run(options, ask))
    except Refused as error:
        print(f"tdb: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before there was a job
        print("\ntdb: nothing was begun", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tdb", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    explain = commands.add_parser(
        "explain",
        help="explain components in words, and score that",
        description="Explains components with the examples of a dataset, as a job of the explainer "
        "service. TDB_TOKEN is sent where it asks for a token.",
        allow_abbrev=False,
    )
    _add_explain(explain)
    jobs = commands.add_parser(
        "jobs", help="jobs of explanations", description="Jobs of the explainer service."
    ).add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, help, run in (
        ("list", "all of them", _list),
        ("follow", "components as they are dealt with", _follow),
        ("pause", "after the components that are on their way", _pause),
        ("resume", "go on with one that was paused, failed or is out of budget", _resume),
        ("cancel", "end it; what is done of it stays", _cancel),
    ):
        action = jobs.add_parser(name, help=help, allow_abbrev=False)
        action.set_defaults(run=run)
        if name != "list":
            action.add_argument("id", metavar="JOB")
        if name == "resume":
            _add_budget(action, "in all, in place of the earlier budget")
        _add_where(action)
    return parser


def _add_explain(explain: argparse.ArgumentParser) -> None:
    explain.set_defaults(run=_explain)
    explain.add_argument("--dataset", required=True, metavar="NAME", help="whose examples are used")
    explain.add_argument("components", nargs="*", metavar="COMPONENT", help="neuron.0.3, ...")
    explain.add_argument(
        "--range",
        nargs=2,
        metavar=("FIRST", "LAST"),
        help="all that the dataset holds from one to another",
    )
    explain.add_argument("--method", required=True, choices=METHODS)
    explain.add_argument("--score", action="append", choices=SCORERS, default=[], help="repeatable")
    explain.add_argument("--judge", choices=JUDGES, help="who answers a scorer's questions")
    explain.add_argument("--items", type=int, metavar="N", help="of each class of a scorer (20)")
    explain.add_argument("--seed", type=int, metavar="N", help="what examples are dealt by (0)")
    explain.add_argument(
        "--max-fraction-active",
        type=float,
        metavar="SHARE",
        help="components that are active on more of the corpus are skipped (0.5)",
    )
    explain.add_argument(
        "--min-pattern-auc",
        type=float,
        metavar="AUC",
        help="components are skipped whose token pattern does not reach this",
    )
    explain.add_argument(
        "--again", action="store_true", help="also those that have such an explanation"
    )
    _add_budget(explain, "; by default what the estimate says it can be")
    explain.add_argument(
        "--yes", action="store_true", help="spend without asking; needs one of the two"
    )
    _add_where(explain)


def _add_budget(command: argparse.ArgumentParser, more: str) -> None:
    command.add_argument("--max-tokens", type=int, metavar="N", help=f"tokens at most{more}")
    command.add_argument("--max-cost", type=float, metavar="X", help=f"US dollars at most{more}")


def _add_where(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--address", metavar="HOST:PORT", help="the explainer service; by default of the settings"
    )


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if bool(options.components) == bool(options.range):
        parser.error("say which: components, or --range FIRST LAST")
    if (options.judge or options.items is not None) and not options.score:
        parser.error("--judge and --items are of scores: add --score")


@contextmanager
def _connected(options: argparse.Namespace) -> Iterator[Ask]:
    from services.common.settings import Settings, SettingsError
    from services.common.tls import ClientTls

    env = dict(os.environ)
    token = env.pop("TDB_TOKEN", "")
    try:
        settings = Settings.from_env(env)
        tls = ClientTls.of(settings)
        target = options.address or settings.explainer_target
    except SettingsError as error:
        raise Refused(str(error)) from None
    chosen = [*channel.options(channel.GONE), ("grpc.enable_http_proxy", 0)]
    connection = (
        grpc.secure_channel(target, tls.credentials(), [*chosen, *tls.options()])
        if tls
        else grpc.insecure_channel(target, chosen)
    )
    metadata = [("authorization", f"Bearer {token}")] if token else []
    stub: Any = service_pb2_grpc.ExplainerServiceStub(connection)

    def ask(method: str, request: Any) -> Any:
        return getattr(stub, method)(request, metadata=metadata)

    with connection:
        try:
            yield ask
        except grpc.RpcError as error:
            raise _refusal(error, target) from None


def _code(error: Any) -> grpc.StatusCode:
    code: grpc.StatusCode = error.code()
    return code


def _refusal(error: Any, target: str) -> Refused:
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return Refused(
            f"the explainer service at {target} does not answer ({error.details()}): is `tdb up` "
            "running?"
        )
    if error.code() is grpc.StatusCode.UNAUTHENTICATED:
        return Refused(f"{error.details()}; TDB_TOKEN is what is sent")
    return Refused(str(error.details()))


def _explain(options: argparse.Namespace, ask: Ask) -> int:
    request = _request(options)
    estimate = ask("EstimateCost", explain_pb2.EstimateCostRequest(explain_many=request))
    if estimate.calls:
        _agree(options, estimate)
        if not request.HasField("budget"):
            request.budget.max_tokens = estimate.most_tokens
    return _show(ask("ExplainMany", request))


def _request(options: argparse.Namespace) -> explain_pb2.ExplainManyRequest:
    request = explain_pb2.ExplainManyRequest(
        dataset=options.dataset,
        method=explanation_pb2.Method.Value(f"METHOD_{options.method.upper()}"),
        again=options.again,
    )
    if options.range:
        request.range.first, request.range.last = options.range
    else:
        request.list.components.extend(options.components)
    if options.score:
        request.scoring.scorers.extend(
            explanation_pb2.Scorer.Value(f"SCORER_{name.upper()}") for name in options.score
        )
    if options.judge:
        request.scoring.judge = explain_pb2.Judge.Value(f"JUDGE_{options.judge.upper()}")
    if options.items is not None:
        request.scoring.items = options.items
    if options.seed is not None:
        request.seed = options.seed
    for field in ("max_fraction_active", "min_pattern_auc"):
        if (value := getattr(options, field)) is not None:
            setattr(request.gate, field, value)
    _set_budget(options, request)
    return request


def _set_budget(options: argparse.Namespace, request: Any) -> None:
    for field in ("max_tokens", "max_cost"):
        if (value := getattr(options, field)) is not None:
            setattr(request.budget, field, value)


def _agree(options: argparse.Namespace, estimate: explain_pb2.EstimateCostResponse) -> None:
    """Shows what is about to be spent. Raises Refused without a yes."""
    print(job_text.estimate(estimate), file=sys.stderr)
    has_budget = options.max_tokens is not None or options.max_cost is not None
    if options.yes:
        if not has_budget:
            raise Refused("--yes needs --max-tokens or --max-cost: nothing was sent")
        return
    if not sys.stdin.isatty():
        raise Refused("--yes is needed where nobody can be asked: nothing was sent")
    print("Go on? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Refused("nothing was sent")


def _show(events: Any) -> int:
    """Shows a job until it ends or the user leaves; the exit code."""
    shown = Shown()
    job_id = ""
    try:
        for event in events:
            match event.WhichOneof("event"):
                case "progress":
                    job_id = event.progress.id
                    shown.progress(event.progress)
                case "item":
                    shown.item(event.item)
                case "summary":
                    shown.end(event.summary)
                    return 0 if event.summary.state == job_pb2.JOB_STATE_DONE else 1
    except (KeyboardInterrupt, BrokenPipeError) as left:
        if isinstance(left, BrokenPipeError):  # `tdb explain ... | head` has read what it wanted
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        shown.leave(job_id)
        return 0
    except grpc.RpcError as error:
        if job_id and _code(error) is grpc.StatusCode.UNAVAILABLE:
            raise Refused(
                "the explainer service went away; the job goes on when it is back: "
                f"`tdb jobs follow {job_id}` shows it"
            ) from None
        raise
    finally:
        shown.close()
        events.cancel()
    raise Refused("the service ended the stream too early; `tdb jobs list` says how the job is")


def _list(options: argparse.Namespace, ask: Ask) -> int:
    jobs = ask("ListJobs", job_pb2.ListJobsRequest()).jobs
    print(job_text.table_of(jobs) if jobs else "There is no job yet: `tdb explain` begins one.")
    return 0


def _follow(options: argparse.Namespace, ask: Ask) -> int:
    return _show(ask("FollowJob", job_pb2.FollowJobRequest(id=options.id)))


def _pause(options: argparse.Namespace, ask: Ask) -> int:
    print(job_text.sentence(ask("PauseJob", job_pb2.PauseJobRequest(id=options.id)).job))
    return 0


def _resume(options: argparse.Namespace, ask: Ask) -> int:
    request = job_pb2.ResumeJobRequest(id=options.id)
    _set_budget(options, request)
    print(job_text.sentence(ask("ResumeJob", request).job))
    return 0


def _cancel(options: argparse.Namespace, ask: Ask) -> int:
    print(job_text.sentence(ask("CancelJob", job_pb2.CancelJobRequest(id=options.id)).job))
    return 0
