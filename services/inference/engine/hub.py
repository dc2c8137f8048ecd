"""The Hugging Face Hub: a snapshot's folder from the local cache or the network, or why not."""

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from services.common.errors import FailedPrecondition

_OFFLINE_PROBE_S = 3.0


def folder(
    source: str,
    patterns: list[str],
    complete: Callable[[Path], bool],
    revision: str | None = None,
) -> tuple[Path, str]:
    """The local folder of a folder or Hub id, and its Hub commit ("" for a folder).

    The cache may hold a part of a snapshot, a tokenizer without its weights for instance:
    `complete` says whether a cached folder is enough. Raises FailedPrecondition in one sentence,
    within five seconds where there is no network.
    """
    if revision is None and Path(source).is_dir():
        return Path(source), ""
    with suppress(LocalEntryNotFoundError, OSError, ValueError):
        cached = Path(
            snapshot_download(
                source, revision=revision, allow_patterns=patterns, local_files_only=True
            )
        )
        if complete(cached):
            return cached, cached.name
    _require_hub(source)
    try:
        fetched = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise FailedPrecondition(
            f"{source!r} could not be fetched from the Hub: {sentence(error)}"
        ) from error
    return fetched, fetched.name


def sentence(error: Exception) -> str:
    """The first line of another library's message, without its trailing full stop."""
    return str(error).strip().partition("\n")[0].rstrip(".")


def unreachable() -> str:
    """Why the Hub cannot be asked; empty if it can. Takes three seconds at most."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return ""
    address = urlsplit(constants.ENDPOINT)
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), _OFFLINE_PROBE_S).close()
    except OSError:
        return f"{address.hostname} does not answer"
    return ""


def _require_hub(source: str) -> None:
    if reason := unreachable():
        raise FailedPrecondition(
            f"{source!r} is neither a folder nor whole in the local Hub cache, and {reason}",
            reason="MODEL_NOT_AVAILABLE",
        )
