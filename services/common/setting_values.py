"""What settings may say: a parser for each kind of value.

A parser takes the text of a variable, "" where it is absent and the default is "", and raises
ValueError with the rest of the sentence that begins with the variable's name.
"""

import ipaddress
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from services.common.cache.redis_url import RedisUrl
from services.common.tokens import TOKEN

DATA_TYPES = ("float32", "bfloat16", "float16")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class ModelSource:
    """A model to serve: the id it is served under, and the folder or Hub id it comes from."""

    name: str
    source: str


@dataclass(frozen=True)
class DictionarySource:
    """A dictionary, or a set of them, for the default model."""

    name: str
    uri: str
    """A path, `hf://org/repo/path[@revision]` or `org/repo/path`; `#site=` may end it."""
    unchecked: bool
    """Serve it even if its self-test says that it does not fit the model."""


@dataclass(frozen=True)
class Secret:
    """What is never shown; "" where there is none."""

    value: str = field(repr=False)

    def __bool__(self) -> bool:
        return bool(self.value)


@dataclass(frozen=True)
class RemoteDataset:
    """A dataset that lies behind a URL, whose query may hold a signature and is not shown."""

    name: str
    url: str = field(repr=False)

    @property
    def shown(self) -> str:
        return self.url.partition("?")[0]


@dataclass(frozen=True)
class ImportSource:
    """A place from which callers may have records imported."""

    name: str
    location: Path | str
    """A folder, or a URL."""


OBJECT_STORES = ("az", "s3")
_BUCKET = re.compile(r"[a-z0-9$][a-z0-9.-]{0,62}")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?\Z")
_HUB_PATH = re.compile(
    r"(hf://)?[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[\w.+-]+)*(@[\w./-]+)?\Z", re.A
)
_DICTIONARY_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\Z")
_DATASET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\Z")


def port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise ValueError(f"must be a port from 0 to 65535, not {text!r}")
    return int(text)


def port_or_none(text: str) -> int | None:
    return port(text) if text else None


def mebibytes(text: str) -> int:
    """Bytes."""
    if not re.fullmatch(r"[1-9]\d{0,7}", text):
        raise ValueError(f"must be a number of MiB from 1 to 99999999, not {text!r}")
    return int(text) * 2**20


def mebibytes_or_auto(text: str) -> int | None:
    """Bytes; None where they are measured."""
    return None if text == "auto" else mebibytes(text)


def mebibytes_or_none(text: str) -> int:
    """Bytes; 0 is a number too."""
    return 0 if text == "0" else mebibytes(text)


def redis(text: str) -> RedisUrl | None:
    return RedisUrl.parse(text) if text else None


def count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise ValueError(f"must be a number from 1 to 999999, not {text!r}")
    return int(text)


def device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,2})?", text):
        raise ValueError(f"must be auto, cpu, cuda, cuda:N or mps, not {text!r}")
    return text


def seconds(text: str) -> float:
    if not re.fullmatch(r"\d{1,4}(\.\d+)?", text):
        raise ValueError(f"must be a number of seconds from 0 to 9999, not {text!r}")
    return float(text)


def timeout(text: str) -> float:
    found = seconds(text)
    if not found:
        raise ValueError("must be more than 0 seconds")
    return found


def switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(f"must be 0 or 1, not {text!r}")
    return text == "1"


def log_level(text: str) -> str:
    if text.lower() not in LOG_LEVELS:
        raise ValueError(f"must be one of {', '.join(LOG_LEVELS)}, not {text!r}")
    return text.lower()


def data_type(text: str) -> str:
    if text not in DATA_TYPES:
        raise ValueError(f"must be one of {', '.join(DATA_TYPES)}, not {text!r}")
    return text


def host(text: str) -> str:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        if not _HOST_NAME.match(text):
            raise ValueError(f"must be a host name or address, not {text!r}") from None
    return text


def hosts(text: str) -> tuple[str, ...]:
    return tuple(host(entry.strip().lower()) for entry in text.split(",") if entry.strip())


def secret(text: str) -> Secret:
    if text and not TOKEN.match(text):
        raise ValueError("must be a token: visible ASCII without a comma")
    return Secret(text)


def header(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,63}", text.lower()):
        raise ValueError(f"must be the name of a header, not {text!r}")
    return text.lower()


def address(text: str) -> str:
    name, colon, number = text.rpartition(":")
    if text and not (colon and name and port(number)):
        raise ValueError(f"must be host:port, not {text!r}")
    return text


def folder(text: str) -> Path:
    path = Path(text).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"must be a folder, but {path} is a file")
    return path


def file(text: str) -> Path | None:
    if not text:
        return None
    path = Path(text).expanduser().absolute()
    try:
        path.open("rb").close()
    except OSError as error:
        raise ValueError(f"names {path}, which cannot be read: {error.strerror}") from None
    return path


def tls_name(text: str) -> str:
    return host(text) if text else ""


def model_source(text: str) -> str:
    """A folder as its absolute path, or a Hub id as it is."""
    path = Path(text).expanduser()
    if path.is_dir():
        return str(path.absolute())
    if text.startswith(("/", ".", "~")):
        raise ValueError(f"names a folder that does not exist: {text}")
    if not _HUB_ID.match(text):
        raise ValueError(f"must be a Hub id or an existing folder, not {text!r}")
    return text


def tokenizer(text: str) -> str | None:
    return model_source(text) if text else None


def models(text: str) -> tuple[ModelSource, ...]:
    found: list[ModelSource] = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, equals, given = entry.partition("=")
        if not (equals and _MODEL_NAME.match(name)):
            name, given = "", entry
        source = model_source(given)
        is_folder = source.startswith("/")
        name = name or (Path(source).name if is_folder else source)
        if any(name == other.name for other in found):
            raise ValueError(f"serves two models as {name!r}: name one of them, NAME=ID_OR_FOLDER")
        found.append(ModelSource(name, source))
    return tuple(found)


def dictionaries(text: str) -> tuple[DictionarySource, ...]:
    sources: list[DictionarySource] = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        if entry == "unchecked" and sources and not sources[-1].unchecked:
            sources[-1] = replace(sources[-1], unchecked=True)
            continue
        name, equals, uri = entry.partition("=")
        if not (equals and _DICTIONARY_NAME.match(name)):
            raise ValueError(f"must be NAME=URI or NAME=URI,unchecked entries, not {entry!r}")
        if any(name == other.name for other in sources):
            raise ValueError(f"names two dictionaries {name!r}")
        sources.append(DictionarySource(name, dictionary_uri(uri), unchecked=False))
    return tuple(sources)


def dictionary_uri(text: str) -> str:
    """A path as its absolute path, or a Hub URI as it is; `#site=` stays at the end."""
    location, hash_, site = text.partition("#")
    path = Path(location).expanduser()
    if location and not location.startswith("hf://") and path.exists():
        return f"{path.absolute()}{hash_}{site}"
    if location.startswith(("/", ".", "~")):
        raise ValueError(f"names a path that does not exist: {location}")
    if not _HUB_PATH.match(location):
        raise ValueError(
            f"must name existing paths or hf://org/repo/path[@revision], not {location!r}"
        )
    return text


def limit(text: str) -> int:
    if not re.fullmatch(r"\d{1,7}", text, re.A):
        raise ValueError(f"must be a whole number from 0, which is no limit, not {text!r}")
    return int(text)


def amount(text: str) -> int:
    if not re.fullmatch(r"\d{1,7}", text, re.A):
        raise ValueError(f"must be a whole number from 0 to 9999999, not {text!r}")
    return int(text)


def remote_datasets(text: str) -> tuple[RemoteDataset, ...]:
    found: list[RemoteDataset] = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, url = entry.partition("=")
        if not _DATASET_NAME.match(name):
            raise ValueError(f"must be NAME=URL entries, not {entry.partition('?')[0]!r}")
        if any(name == other.name for other in found):
            raise ValueError(f"names two datasets {name!r}")
        found.append(RemoteDataset(name, _url(f"give {name}", url)))
    return tuple(found)


def import_sources(text: str) -> tuple[ImportSource, ...]:
    found: list[ImportSource] = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, location = entry.partition("=")
        if not _DATASET_NAME.match(name):
            raise ValueError(f"must be NAME=FOLDER or NAME=URL entries, not {entry!r}")
        if any(name == other.name for other in found):
            raise ValueError(f"names two places {name!r}")
        if location.startswith("/"):
            found.append(ImportSource(name, Path(location)))
        elif "?" in location:
            raise ValueError(f"must give {name} a URL without a query")
        else:
            url = _url(f"give {name} a folder from the root or", location)
            found.append(ImportSource(name, url))
    return tuple(found)


def endpoint(text: str) -> str:
    """The URL of an OpenAI-compatible endpoint, without a slash at its end; "" where there is
    none. In plain http too: many stand in one's own network."""
    if not text:
        return ""
    try:
        parts = urlsplit(text)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        known = False
    if not known:
        raise ValueError("must be an http or https URL such as http://localhost:8000/v1")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("must be a plain URL without user, query or fragment; keys stand alone")
    return text.rstrip("/")


def prices(text: str) -> tuple[float, float] | None:
    """Dollars per million tokens, of questions and of replies; None where they are not known."""
    if not text:
        return None
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 2 or not all(re.fullmatch(r"\d{1,6}(\.\d+)?", part, re.A) for part in parts):
        raise ValueError(f"must be PROMPT,COMPLETION in dollars per million tokens, not {text!r}")
    return float(parts[0]), float(parts[1])


def base_url(text: str) -> str:
    """A URL below which files are, without a query; empty where there is none."""
    if "?" in text:
        raise ValueError("must be a URL without a query")
    return _url("be", text) if text else ""


def _url(must: str, url: str) -> str:
    parts = urlsplit(url)
    host = parts.hostname or ""
    if not host or parts.username or parts.password or parts.fragment:
        raise ValueError(f"must {must} a URL of a host and a path, nothing else")
    if parts.scheme in OBJECT_STORES:
        if "?" in url or not _BUCKET.fullmatch(parts.netloc):
            raise ValueError(
                f"must {must} {parts.scheme}://CONTAINER/PATH, nothing else: account and "
                "credentials come from the environment"
            )
        return url
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(host)):
        raise ValueError(
            f"must {must} an https URL (http only on this machine), or an az or s3 one"
        )
    return url


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
