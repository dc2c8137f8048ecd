"""Now and then a line for the terminal of `tdb up`.

It is JSON on standard output, as the service announces its port; the supervisor shows `message`.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tdb.dataset.v1 import dataset_pb2

from services.dataset.building.progress import CANCELLED, FAILED, Progress

EVERY_S = 15.0


@contextmanager
def showing(progress: Progress) -> Iterator[None]:
    """Says that a build begins, how far it is, and that the dataset is there."""
    over = threading.Event()
    name = progress.message().dataset

    def show() -> None:
        while not over.wait(EVERY_S):
            say(sentence(progress.message()))

    say(f"building the dataset {name}")
    thread = threading.Thread(target=show, name="build-progress", daemon=True)
    thread.start()
    try:
        yield
        say(f"the dataset {name} is built")
    finally:
        over.set()
        thread.join()


def finished(dataset: dataset_pb2.Dataset) -> str:
    """What a dataset is, in one line."""
    of = dataset.header.model.id or "an unknown model"
    where = "remote" if dataset.is_remote else f"{dataset.bytes / 2**20:.1f} MiB"
    return f"{dataset.name}: {dataset.records:,} records of {of}, {where}"


def sentence(build: dataset_pb2.Build) -> str:
    """How far a build is, in one line."""
    if build.state == FAILED:
        return f"{build.dataset}: failed: {build.message}"
    if build.state == CANCELLED:
        return f"{build.dataset}: cancelled"
    if build.message:
        return f"{build.dataset}: waiting: {build.message}"
    if not build.total:
        return f"{build.dataset}: queued"
    text = f"{build.dataset}: {build.phase}, {build.done:,} of {build.total:,} {build.unit}"
    if build.HasField("rate"):
        text += f", {build.rate:,.0f} {build.unit}/s"
    if build.HasField("seconds_left"):
        text += f", about {duration(build.seconds_left)} left"
    return text


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def say(message: str) -> None:
    print(json.dumps({"event": "progress", "service": "dataset", "message": message}), flush=True)
