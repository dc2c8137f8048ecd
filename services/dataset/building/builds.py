"""The builds of this service: each a job that outlives the call that began it.

A job is a folder (`work_folder`); what is under way when the process ends goes on when the next
one starts. One job works at a time, in a thread of its own, the others wait in their order. A job
that was cancelled or has failed stays, with all that is done, until the same request comes again
or the dataset is deleted; one that was refused before anything was done leaves nothing.
"""

import json
import logging
import queue
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from tdb.dataset.v1 import build_pb2, dataset_pb2

from services.common import calls
from services.common.errors import (
    Cancelled,
    FailedPrecondition,
    NotFound,
    TdbError,
    inside,
)
from services.common.settings import Settings, SettingsError
from services.dataset import files, manifest
from services.dataset.building import asked, demo_dataset, terminal
from services.dataset.building.build import CHANGED, Build
from services.dataset.building.inference import Inference, Stop
from services.dataset.building.progress import CANCELLED, FAILED, QUEUED, Progress
from services.dataset.building.work_folder import CHECKPOINT, JOB, STOPPED, WorkFolder, cannot_write
from services.dataset.library import BUILDING, Library

CORPORA = "corpora"
MAX_JOBS = 1_000

_log = logging.getLogger("tdb.dataset")


@dataclass(eq=False)
class Job:
    """A build that is not finished. `error` says why it failed, once `ended` is set."""

    request: build_pb2.BuildDatasetRequest
    user: str
    progress: Progress
    is_demo: bool = False
    """It is kept as the model that is served needs it."""
    stop: Stop = field(default_factory=Stop)
    ended: threading.Event = field(default_factory=threading.Event)
    error: TdbError | None = None

    @property
    def is_under_way(self) -> bool:
        return not self.ended.is_set()


class Builds:
    """Safe to use from several threads."""

    def __init__(self, settings: Settings, library: Library, folder: Path) -> None:
        """`folder` is where the datasets are."""
        self._settings = settings
        self._library = library
        self._folder = folder
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="builds")
        self._thread.start()

    def close(self) -> None:
        """Stops what is under way, to go on when the service starts again."""
        with self._lock:
            self._closing = True
            jobs = list(self._jobs.values())
        for job in jobs:
            job.stop.set()
        self._queue.put(None)
        self._thread.join()

    def resume(self) -> None:
        """Goes on with what an earlier process left."""
        for path in sorted(self._folder.glob(f"*/{BUILDING}/{JOB}")):
            dataset = path.parents[1]
            if (dataset / manifest.NAME).exists():  # killed while it tidied up
                shutil.rmtree(path.parent, ignore_errors=True)
                continue
            try:
                job = _read(path)
            except (OSError, ValueError, KeyError, TypeError, ParseError):
                _log.warning("a build cannot be read", extra={"fields": {"build": str(path)}})
                continue
            with self._lock:
                self._jobs[dataset.name] = job
                if job.is_under_way:
                    self._queue.put(job)

    def start(self, request: build_pb2.BuildDatasetRequest, user: str) -> Job:
        """Begins a build, or finds the one of the same request. Raises TdbError."""
        canonical = asked.canonical(request)
        asked.corpus(canonical, self._settings.data_dir / CORPORA)
        name = canonical.dataset
        with inside("dataset"), self._lock:
            if self._library.is_remote(name) or not self._is_unfinished(name):
                raise FailedPrecondition(
                    f"there is a dataset {name!r} already: delete it or choose another name"
                )
            known = self._jobs.get(name)
            if known is not None and known.request != canonical:
                raise FailedPrecondition(
                    f"a build of {name!r} was begun with another request and is not finished: "
                    "delete it or choose another name"
                )
            if known is not None and known.is_under_way:
                return known
            if known is None and (self._folder / name).exists():
                raise FailedPrecondition(
                    f"the folder {name!r} is there already and no build that can go on: delete it "
                    "or choose another name"
                )
            if len(self._jobs) >= MAX_JOBS:
                raise FailedPrecondition(f"{MAX_JOBS} builds are not finished: delete some")
            job = Job(canonical, user, Progress(name))
            self._keep(job)  # refused here and now where it cannot be written
            self._jobs[name] = job
            self._queue.put(job)
            return job

    def keep_demo(self) -> None:
        """Sees to it that there is the demo's dataset of the model that is served."""
        request = asked.canonical(demo_dataset.request())
        name = request.dataset
        with self._lock:
            known = self._jobs.get(name)
            if known is not None and known.progress.message().state == CANCELLED:
                return
            if known is not None and known.is_under_way:
                known.is_demo = True
                return
            job = Job(request, calls.LOCAL_USER, Progress(name), is_demo=True)
            self._jobs[name] = job
            self._queue.put(job)

    def cancel(self, name: str) -> Job:
        """Raises NotFound."""
        with self._lock:
            job = self._jobs.get(name)
            if job is None or not job.is_under_way or not self._is_unfinished(name):
                under_way = [
                    key
                    for key, each in self._jobs.items()
                    if each.is_under_way and self._is_unfinished(key)
                ]
                there = ", ".join(sorted(under_way)[:10]) or "none"
                raise NotFound(f"no build of {name!r} is under way; under way: {there}")
            self._stopped(job, CANCELLED)
            if job.progress.message().state == QUEUED:
                self._end(job, CANCELLED, Cancelled("the build was cancelled"))
        job.stop.set()
        return job

    def list(self) -> list[dataset_pb2.Build]:
        """Those that are not finished, by name; a demo that may well be there already is none."""
        with self._lock:
            return [
                self._jobs[name].progress.message()
                for name in sorted(self._jobs)
                if self._is_unfinished(name)
            ]

    def _is_unfinished(self, name: str) -> bool:
        return not (self._folder / name / manifest.NAME).exists()

    def delete(self, name: str) -> int:
        """Deletes a dataset, finished or not. Raises TdbError."""
        with self._lock:
            job = self._jobs.get(name)
            if job is not None and job.is_under_way and self._is_unfinished(name):
                raise FailedPrecondition(f"the dataset {name!r} is being built: cancel that first")
            size = self._library.delete(name)
            self._jobs.pop(name, None)
            return size

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            if job.is_under_way:
                self._run(job)

    def _run(self, job: Job) -> None:
        name = job.request.dataset
        state = FAILED
        error: TdbError | None = None
        try:
            self._build(job)
        except Cancelled as cancelled:
            state, error = CANCELLED, cancelled
        except TdbError as refused:
            error = refused
        except Exception as bug:
            _log.exception("a build failed", extra={"fields": {"build": name}})
            error = TdbError(f"the build failed by a fault of ours: {type(bug).__name__}")
        with self._lock:
            if error is None:
                self._jobs.pop(name, None)
                job.ended.set()
                return
            if state == CANCELLED and self._closing:
                job.ended.set()
                return
            if (self._folder / name / BUILDING / JOB).exists():
                self._stopped(job, state, error.message if state == FAILED else "")
            else:
                self._jobs.pop(name, None)
            self._end(job, state, error)
        if state == FAILED:
            _log.warning(f"the dataset {name!r} was not built: {error.message}")

    def _build(self, job: Job) -> None:
        job.stop.check()
        try:
            inference = Inference(self._settings, job.user, job.stop, job.progress.waiting)
        except SettingsError as error:
            raise FailedPrecondition(str(error)) from None
        dataset = self._folder / job.request.dataset
        try:
            if job.is_demo and not demo_dataset.is_wanted(dataset, inference.model("")):
                return
            try:
                self._run_in(dataset, job, inference)
            except FailedPrecondition as refused:
                if not (job.is_demo and refused.reason == CHANGED):
                    raise
                _log.warning(f"what was built of {job.request.dataset!r} is of another model")
                shutil.rmtree(dataset)
                self._run_in(dataset, job, inference)
        finally:
            inference.close()

    def _run_in(self, dataset: Path, job: Job, inference: Inference) -> None:
        self._keep(job)
        corpora = self._settings.data_dir / CORPORA
        with WorkFolder(dataset) as folder, _nothing_left_of_what_is_refused(folder):
            build = Build(
                job.request,
                folder,
                corpora,
                inference,
                job.progress,
                job.stop,
                self._settings.datasets_bytes,
            )
            with terminal.showing(job.progress):
                build.run()

    def _end(self, job: Job, state: dataset_pb2.BuildState.ValueType, error: TdbError) -> None:
        job.error = error
        job.progress.ended(state, error.message if state == FAILED else "")
        job.ended.set()

    def _keep(self, job: Job) -> None:
        """Writes a job down, so that it outlives this process. Raises FailedPrecondition."""
        folder = self._folder / job.request.dataset / BUILDING
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / STOPPED).unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from None
        request = MessageToDict(job.request, preserving_proto_field_name=True)
        with files.atomic(folder / JOB) as file:
            file.write(json.dumps({"request": request, "user": job.user}, indent=1).encode())

    def _stopped(
        self, job: Job, state: dataset_pb2.BuildState.ValueType, message: str = ""
    ) -> None:
        """Writes down that a job is not to go on by itself; on a full disk it will."""
        path = self._folder / job.request.dataset / BUILDING / STOPPED
        content = {"state": dataset_pb2.BuildState.Name(state), "message": message}
        try:
            with files.atomic(path) as file:
                file.write(json.dumps(content).encode())
        except FailedPrecondition as error:
            _log.warning(error.message)


@contextmanager
def _nothing_left_of_what_is_refused(folder: WorkFolder) -> Iterator[None]:
    """Before the first segment is whole there is nothing to go on with."""
    try:
        yield
    except Cancelled:
        raise
    except TdbError:
        if not (folder.path / CHECKPOINT).exists():
            shutil.rmtree(folder.dataset, ignore_errors=True)
        raise


def _read(path: Path) -> Job:
    found = json.loads(path.read_bytes())
    request = build_pb2.BuildDatasetRequest()
    ParseDict(found["request"], request)
    job = Job(request, str(found["user"]), Progress(path.parents[1].name))
    try:
        stopped = json.loads((path.parent / STOPPED).read_bytes())
    except FileNotFoundError:
        return job
    state = dataset_pb2.BuildState.Value(stopped["state"])
    job.progress.ended(state, stopped["message"])
    job.ended.set()
    return job


def follow(job: Job, every_s: float) -> Iterator[dataset_pb2.Build]:
    """Its progress now and then until it ends. Raises what it failed of."""
    while True:
        yield job.progress.message()
        if job.ended.wait(every_s):
            break
    if job.error is not None:
        raise job.error
