"""Every setting of every process, read once from the environment into one frozen object.

A setting is declared once, as a field of `Settings`: its variable, default, meaning and parser
stand together, and `tdb config` and docs/settings.md are printed from there. Flags of `tdb up`
become variables before this module reads them, so a flag beats its variable, which beats the
default. A value that cannot be right is refused in one sentence that names the variable.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from services.common import setting_values as values
from services.common.cache.redis_url import RedisUrl
from services.common.networks import Networks
from services.common.setting_values import LOG_LEVELS
from services.common.setting_values import DictionarySource as DictionarySource
from services.common.setting_values import ImportSource as ImportSource
from services.common.setting_values import ModelSource as ModelSource
from services.common.setting_values import RemoteDataset as RemoteDataset
from services.common.setting_values import Secret as Secret
from services.common.setting_values import is_loopback as is_loopback
from services.common.tokens import Tokens


class SettingsError(Exception):
    """A setting that cannot be right, in one sentence."""


# What means nothing without the other.
_NEEDS = (
    ("provider_url", "provider_model"),
    ("provider_model", "provider_url"),
    ("provider_key", "provider_url"),
    ("embedding_url", "embedding_model"),
    ("embedding_model", "embedding_url"),
    ("embedding_key", "embedding_url"),
    ("tls_cert", "tls_key"),
    ("tls_key", "tls_cert"),
    ("tls_client_ca", "tls_cert"),
    ("tls_client_cert", "tls_client_key"),
    ("tls_client_key", "tls_client_cert"),
    ("tls_client_cert", "tls_ca"),
    ("tls_name", "tls_ca"),
)


def _tells_users_apart(env: Mapping[str, str]) -> bool:
    """Whether callers have names; otherwise everybody is one user, whom no share is kept from."""
    variables = ("TDB_TOKENS", "TDB_TRUSTED_PROXIES", "TDB_TRUSTED_GATEWAYS", "TDB_TLS_CLIENT_CA")
    return any(env.get(variable, "").strip() for variable in variables)


def _default_data_dir(env: Mapping[str, str]) -> str:
    return f"{env.get('XDG_DATA_HOME') or '~/.local/share'}/tdb"


def _setting(
    variable: str,
    default: str | Callable[[Mapping[str, str]], str],
    help: str,
    parse: Callable[[str], object] = str,
    *,
    shown_default: str | None = None,
) -> Any:
    shown = shown_default if shown_default is not None else default
    return field(
        metadata={
            "variable": variable,
            "default": default if callable(default) else lambda env: default,
            "shown_default": shown,
            "help": help,
            "parse": parse,
        }
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    models: tuple[ModelSource, ...] = _setting(
        "TDB_MODEL",
        "",
        "The models to serve, separated by commas; the first is the default. Each is a Hub id or "
        "a folder, or `NAME=ID_OR_FOLDER` to serve it under another name.",
        values.models,
    )
    tokenizer: str | None = _setting(
        "TDB_TOKENIZER",
        "",
        "The tokenizer's Hub id or folder, for models that come without one.",
        values.tokenizer,
    )
    dictionaries: tuple[DictionarySource, ...] = _setting(
        "TDB_DICTIONARIES",
        "",
        "Sparse autoencoders and transcoders for the default model, separated by commas, each "
        "`NAME=URI`. A URI is a local file or folder or `hf://org/repo/path[@revision]`; it may "
        "end in `#site=mlp_out.3` for files that do not say where they belong. "
        "`NAME=URI,unchecked` serves one that fails its self-test, and marks results with a "
        "warning. "
        "See [dictionaries.md](dictionaries.md).",
        values.dictionaries,
    )
    dictionary_bytes: int = _setting(
        "TDB_DICTIONARY_MIB",
        "8192",
        "Memory on the device for dictionaries, in MiB. Those used last stay there; one request "
        "cannot use more than fit together.",
        values.mebibytes,
    )
    activation_bytes: int | None = _setting(
        "TDB_ACTIVATION_MIB",
        "auto",
        "Memory on the device for the passes of a model, in MiB. Batches and chunks are made to "
        "fit, and a request that never would is refused. auto: of what is free once models and "
        "dictionaries are loaded, nine tenths on a GPU and half on the CPU, where the limit of a "
        "container counts. See [operations.md](operations.md#memory).",
        values.mebibytes_or_auto,
    )
    device: str = _setting(
        "TDB_DEVICE",
        "auto",
        "Where the model runs: cpu, cuda, cuda:N or mps. auto takes the first CUDA device, else "
        "the CPU. mps is there but has not been tested.",
        values.device,
    )
    data_type: str = _setting(
        "TDB_DTYPE",
        "float32",
        "The data type of weights and activations: float32, bfloat16 or float16. In half precision "
        "the effects of nodes are rough, which their results say, and dictionaries are refused.",
        values.data_type,
    )
    queue_per_user: int = _setting(
        "TDB_QUEUE_PER_USER",
        "256",
        "Pieces of work that may wait for the device, per user; more are refused for now.",
        values.count,
    )
    queue_total: int = _setting(
        "TDB_QUEUE_TOTAL", "2048", "The same for all users together.", values.count
    )
    host: str = _setting(
        "TDB_HOST",
        "127.0.0.1",
        "The address to listen on. Anything but loopback needs `TDB_TOKENS` or "
        "`TDB_TRUSTED_PROXIES`; a service that runs alone may have `TDB_TLS_CLIENT_CA` instead.",
        values.host,
    )
    gateway_port: int = _setting(
        "TDB_GATEWAY_PORT",
        "8080",
        "The port of the page and of the JSON API; 0 takes any free port, which is printed.",
        values.port,
    )
    inference_port: int = _setting(
        "TDB_INFERENCE_PORT",
        "50051",
        "The port of the inference service's gRPC API; 0 takes any free port, which is printed.",
        values.port,
    )
    gateway_metrics_port: int | None = _setting(
        "TDB_GATEWAY_METRICS_PORT",
        "",
        "The port of the gateway's Prometheus metrics; 0 takes any free port, which is printed. "
        "Empty: none. Metrics name users: reading them needs one of `TDB_TOKENS`, and without "
        "tokens they are on loopback only, whatever `TDB_HOST` is.",
        values.port_or_none,
    )
    inference_metrics_port: int | None = _setting(
        "TDB_INFERENCE_METRICS_PORT",
        "",
        "The port of the inference service's Prometheus metrics, as `TDB_GATEWAY_METRICS_PORT`.",
        values.port_or_none,
    )
    inference_address: str = _setting(
        "TDB_INFERENCE_ADDRESS",
        "",
        "`host:port` of an inference service on another machine, for a gateway, dataset or "
        "explainer service that is run alone. "
        "A name with several addresses, or `ipv4:HOST:PORT,HOST:PORT`, is several replicas, and "
        "calls go round those that are SERVING. Empty: `TDB_INFERENCE_PORT` on this machine.",
        values.address,
    )
    dataset_port: int = _setting(
        "TDB_DATASET_PORT",
        "50052",
        "The port of the dataset service's gRPC API; 0 takes any free port, which is printed.",
        values.port,
    )
    dataset_metrics_port: int | None = _setting(
        "TDB_DATASET_METRICS_PORT",
        "",
        "The port of the dataset service's Prometheus metrics, as `TDB_GATEWAY_METRICS_PORT`.",
        values.port_or_none,
    )
    dataset_address: str = _setting(
        "TDB_DATASET_ADDRESS",
        "",
        "`host:port` of a dataset service on another machine, for a gateway or explainer service "
        "that is run alone. Empty: `TDB_DATASET_PORT` on this machine.",
        values.address,
    )
    explainer_port: int = _setting(
        "TDB_EXPLAINER_PORT",
        "50053",
        "The port of the explainer service's gRPC API; 0 takes any free port, which is printed.",
        values.port,
    )
    explainer_metrics_port: int | None = _setting(
        "TDB_EXPLAINER_METRICS_PORT",
        "",
        "The port of the explainer service's Prometheus metrics, as `TDB_GATEWAY_METRICS_PORT`.",
        values.port_or_none,
    )
    explainer_address: str = _setting(
        "TDB_EXPLAINER_ADDRESS",
        "",
        "`host:port` of an explainer service on another machine, for a gateway that is run alone. "
        "Empty: `TDB_EXPLAINER_PORT` on this machine.",
        values.address,
    )
    provider_url: str = _setting(
        "TDB_PROVIDER_URL",
        "",
        "The OpenAI-compatible endpoint that explanations and scores are asked of, for example "
        "`http://localhost:8000/v1`. Texts of data sets are sent there, and only for a request "
        "whose method or judge needs a language model. Empty: nothing is sent anywhere, and what "
        "needs no language model still works. See [explanations.md](explanations.md).",
        values.endpoint,
    )
    provider_model: str = _setting(
        "TDB_PROVIDER_MODEL", "", "The model that `TDB_PROVIDER_URL` is asked for."
    )
    provider_key: Secret = _setting(  # noqa: RUF009
        "TDB_PROVIDER_KEY",
        "",
        "The key of `TDB_PROVIDER_URL`, where it wants one.",
        values.secret,
    )
    provider_prices: tuple[float, float] | None = _setting(
        "TDB_PROVIDER_PRICES",
        "",
        "What `TDB_PROVIDER_MODEL` costs: `PROMPT,COMPLETION` in dollars per million tokens. "
        "Empty: costs are known in tokens only.",
        values.prices,
    )
    provider_concurrency: int = _setting(
        "TDB_PROVIDER_CONCURRENCY",
        "8",
        "Questions that `TDB_PROVIDER_URL` is asked at once, of all users together.",
        values.count,
    )
    provider_timeout_s: float = _setting(
        "TDB_PROVIDER_TIMEOUT_SECONDS",
        "120",
        "How long one question may take; it is asked again then.",
        values.timeout,
    )
    provider_thinking_tokens: int = _setting(
        "TDB_PROVIDER_THINKING_TOKENS",
        "0",
        "Tokens that the model may use up before each reply, for models that think first. They are "
        "paid for, and count in estimates and budgets.",
        values.amount,
    )
    embedding_url: str = _setting(
        "TDB_EMBEDDING_URL",
        "",
        "The OpenAI-compatible endpoint that turns explanations into vectors, so that they can be "
        "searched by meaning. Empty: they are searched by words.",
        values.endpoint,
    )
    embedding_model: str = _setting(
        "TDB_EMBEDDING_MODEL", "", "The model that `TDB_EMBEDDING_URL` is asked for."
    )
    embedding_key: Secret = _setting(  # noqa: RUF009
        "TDB_EMBEDDING_KEY",
        "",
        "The key of `TDB_EMBEDDING_URL`, where it wants one.",
        values.secret,
    )
    explanations_bytes: int = _setting(
        "TDB_EXPLANATIONS_MIB",
        "4096",
        "Disk for explanations, scores and jobs, in MiB, in `explanations.sqlite3` in "
        "`TDB_DATA_DIR`. What does not fit is refused; nothing is deleted to make room.",
        values.mebibytes,
    )
    reply_cache_bytes: int = _setting(
        "TDB_REPLY_CACHE_MIB",
        "512",
        "Disk for replies of the language model, in MiB, in the same file: a question that was "
        "paid for is not paid for again. The oldest make room.",
        values.mebibytes,
    )
    datasets_bytes: int = _setting(
        "TDB_DATASETS_MIB",
        "102400",
        "Disk for datasets, in MiB, in `datasets` in `TDB_DATA_DIR`. A build or an import that may "
        "need more is refused before it begins; nothing is deleted to make room.",
        values.mebibytes,
    )
    remote_datasets: tuple[RemoteDataset, ...] = _setting(
        "TDB_REMOTE_DATASETS",
        "",
        "Datasets that lie elsewhere, separated by commas, each `NAME=URL`: the URL of a "
        "dataset's folder, https (its query, where a signature may stand, is sent along and never "
        "shown), `az://CONTAINER/PATH` or `s3://BUCKET/PATH` (extra `object-stores`; account and "
        "credentials come from the environment). See [datasets.md](datasets.md).",
        values.remote_datasets,
    )
    openai_records: str = _setting(
        "TDB_OPENAI_RECORDS",
        "",
        "The URL below which OpenAI's published records of GPT-2 lie, for example "
        "`https://openaipublic.blob.core.windows.net/neuron-explainer`; they are then served, each "
        "record fetched when it is asked for. Empty: not served. See [datasets.md](datasets.md).",
        values.base_url,
    )
    import_sources: tuple[ImportSource, ...] = _setting(
        "TDB_IMPORT_SOURCES",
        "",
        "Places from which ImportDataset may import, separated by commas, each `NAME=FOLDER` or "
        "`NAME=URL`. Callers name a place and a folder in it; nothing else can be reached. "
        "`imports` in `TDB_DATA_DIR` is always allowed. See [datasets.md](datasets.md).",
        values.import_sources,
    )
    dataset_cache_bytes: int = _setting(
        "TDB_DATASET_CACHE_MIB",
        "1024",
        "Disk for what was read of remote datasets, in MiB, in `cache/datasets` in "
        "`TDB_DATA_DIR`. What was used last stays.",
        values.mebibytes,
    )
    demo_dataset: bool = _setting(
        "TDB_DEMO_DATASET",
        "0",
        "1: the dataset service builds the demo's dataset, `demo`, where there is none of the "
        "default model yet, and keeps it. `tdb up --demo` sets 1 unless it is set.",
        values.switch,
    )
    data_dir: Path = _setting(  # noqa: RUF009  # a Field, not a value
        "TDB_DATA_DIR",
        _default_data_dir,
        "Where everything that is kept is written, logs included; created with mode 0700.",
        values.folder,
        shown_default="$XDG_DATA_HOME/tdb, else ~/.local/share/tdb",
    )
    tokens: Tokens = _setting(  # noqa: RUF009
        "TDB_TOKENS",
        "",
        "Who may call: `name:token` entries separated by commas, or the path of a file with one "
        "per line. Empty: no token is asked for.",
        Tokens.parse,
    )
    service_token: Secret = _setting(  # noqa: RUF009
        "TDB_SERVICE_TOKEN",
        "",
        "One of `TDB_TOKENS`, which services show each other when they work for somebody: the "
        "dataset service builds datasets with it, the explainer service reads records. Empty: a "
        "token of whom they work for, else the first of `TDB_TOKENS`.",
        values.secret,
    )
    tls_cert: Path | None = _setting(  # noqa: RUF009
        "TDB_TLS_CERT",
        "",
        "The certificate, in PEM with those between it and its authority, that services show: "
        "their gRPC is TLS then. `TDB_TLS_KEY` holds its key.",
        values.file,
    )
    tls_key: Path | None = _setting(  # noqa: RUF009
        "TDB_TLS_KEY", "", "The key of `TDB_TLS_CERT`, in PEM without a password.", values.file
    )
    tls_client_ca: Path | None = _setting(  # noqa: RUF009
        "TDB_TLS_CLIENT_CA",
        "",
        "The authority whose certificates services ask of everybody who connects (mutual TLS). "
        "Without `TDB_TOKENS` the certificate's common name is the user.",
        values.file,
    )
    tls_ca: Path | None = _setting(  # noqa: RUF009
        "TDB_TLS_CA",
        "",
        "The authority of the services' certificates, for the gateway and other clients: they "
        "connect by TLS then.",
        values.file,
    )
    tls_client_cert: Path | None = _setting(  # noqa: RUF009
        "TDB_TLS_CLIENT_CERT",
        "",
        "The certificate that the gateway shows to services that ask for one.",
        values.file,
    )
    tls_client_key: Path | None = _setting(  # noqa: RUF009
        "TDB_TLS_CLIENT_KEY", "", "The key of `TDB_TLS_CLIENT_CERT`.", values.file
    )
    tls_name: str = _setting(
        "TDB_TLS_NAME",
        "",
        "The name in the services' certificate, where the gateway connects to them by another.",
        values.tls_name,
    )
    trusted_proxies: Networks = _setting(  # noqa: RUF009
        "TDB_TRUSTED_PROXIES",
        "",
        "Addresses and networks (`10.0.0.5,10.1.0.0/16`) of proxies that the gateway believes: "
        "about the user, in `TDB_USER_HEADER`, and about the host, in `x-forwarded-host`. Both are "
        "refused or ignored from anybody else. `x-forwarded-for` never counts.",
        Networks.parse,
    )
    user_header: str = _setting(
        "TDB_USER_HEADER",
        "x-forwarded-user",
        "The header in which a trusted proxy names the user.",
        values.header,
    )
    trusted_gateways: Networks = _setting(  # noqa: RUF009
        "TDB_TRUSTED_GATEWAYS",
        "",
        "Addresses and networks of gateways that services believe about the user (`x-tdb-user`). "
        "Empty: nobody; with `TDB_TRUSTED_PROXIES`, a gateway on the same machine.",
        Networks.parse,
    )
    requests_per_minute: int = _setting(
        "TDB_REQUESTS_PER_MINUTE",
        lambda env: "6000" if _tells_users_apart(env) else "0",
        "Requests that one user may send per minute to each service, a quarter of them at once; 0: "
        "as many as they like.",
        values.limit,
        shown_default="6000 where users are told apart (tokens, proxy, certificates), else 0",
    )
    concurrent_requests: int = _setting(
        "TDB_CONCURRENT_REQUESTS",
        lambda env: "256" if _tells_users_apart(env) else "0",
        "Requests of one user that each service serves at once, those in its queue included; 0: "
        "as many as come.",
        values.limit,
        shown_default="256 where users are told apart (tokens, proxy, certificates), else 0",
    )
    allowed_hosts: tuple[str, ...] = _setting(
        "TDB_ALLOWED_HOSTS",
        "",
        "Further host names that browsers may use for the gateway, separated by commas; loopback "
        "names and `TDB_HOST` always work.",
        values.hosts,
    )
    redis: RedisUrl | None = _setting(  # noqa: RUF009
        "TDB_REDIS_URL",
        "",
        "The Redis (or Valkey) that keeps results for several services: "
        "`redis://[user:password@]host[:port][/database]`, or `rediss://` for TLS. It is never "
        "needed: while it does not answer, results are computed. Empty: `TDB_CACHE_MIB` of this "
        "process. See [operations.md](operations.md).",
        values.redis,
    )
    cache_bytes: int = _setting(
        "TDB_CACHE_MIB",
        "256",
        "Memory for results that were computed before, in MiB, where `TDB_REDIS_URL` is empty; 0 "
        "keeps none.",
        values.mebibytes_or_none,
    )
    reflection: bool = _setting(
        "TDB_REFLECTION",
        "0",
        "1: gRPC services describe themselves (server reflection). `tdb up --demo` sets 1 unless "
        "it is set.",
        values.switch,
    )
    drain_s: float = _setting(
        "TDB_DRAIN_SECONDS",
        "10",
        "How long calls in flight may take to finish at stop.",
        values.seconds,
    )
    max_connection_age_s: float = _setting(
        "TDB_MAX_CONNECTION_AGE_SECONDS",
        "0",
        "After how long a gRPC connection is asked to be made anew, so that clients find replicas "
        "that were added meanwhile; calls in flight go on. 0: never.",
        values.seconds,
    )
    log_level: str = _setting(
        "TDB_LOG_LEVEL",
        "info",
        f"The least that is logged: {', '.join(LOG_LEVELS)}.",
        values.log_level,
    )
    log_prompts: bool = _setting(
        "TDB_LOG_PROMPTS",
        "0",
        "1: requests and the text of unexpected errors are logged too. Otherwise no prompt is.",
        values.switch,
    )

    otel: bool = _setting(
        "TDB_OTEL",
        lambda env: "1" if env.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip() else "0",
        "1: traces by OpenTelemetry, from the gateway to the work on the device, sent by OTLP over "
        "gRPC to `OTEL_EXPORTER_OTLP_ENDPOINT`. Needs the extra `otel`.",
        values.switch,
        shown_default="1 where OTEL_EXPORTER_OTLP_ENDPOINT is set, else 0",
    )

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "Settings":
        """Reads all settings; an empty variable counts as absent. Raises SettingsError."""
        _refuse_strangers(env)
        found: dict[str, object] = {}
        for each in fields(cls):
            variable = each.metadata["variable"]
            text = env.get(variable, "").strip() or each.metadata["default"](env)
            try:
                found[each.name] = each.metadata["parse"](text)
            except (ValueError, OSError) as error:
                raise SettingsError(f"{variable} {error}.") from None
        settings = cls(**found)  # type: ignore[arg-type]  # checked by the parsers
        if not is_loopback(settings.host) and not (
            settings.tokens
            or settings.trusted_proxies
            or settings.trusted_gateways
            or settings.tls_client_ca
        ):
            raise SettingsError(
                f"TDB_HOST is {settings.host}, which others can reach: set TDB_TOKENS as well, or "
                "TDB_TRUSTED_PROXIES, or, for a service alone, TDB_TLS_CLIENT_CA."
            )
        for variable, needed in _NEEDS:
            if getattr(settings, variable) and not getattr(settings, needed):
                raise SettingsError(
                    f"TDB_{variable.upper()} is set and TDB_{needed.upper()} is not: it needs both."
                )
        if settings.dictionaries and settings.data_type != "float32":
            raise SettingsError(
                f"TDB_DTYPE is {settings.data_type}, but dictionaries need float32: leave one of "
                "TDB_DTYPE and TDB_DICTIONARIES out."
            )
        return settings

    @property
    def inference_target(self) -> str:
        """Where others find the inference service."""
        return self._target("INFERENCE", self.inference_address, self.inference_port)

    @property
    def dataset_target(self) -> str:
        """Where others find the dataset service."""
        return self._target("DATASET", self.dataset_address, self.dataset_port)

    @property
    def explainer_target(self) -> str:
        """Where the gateway finds the explainer service."""
        return self._target("EXPLAINER", self.explainer_address, self.explainer_port)

    def _target(self, service: str, address: str, port: int) -> str:
        if address:
            return address
        if not port:
            raise SettingsError(
                f"TDB_{service}_PORT is 0, so that others cannot find the service: "
                f"TDB_{service}_ADDRESS says where it is."
            )
        return listen_address(reachable(self.host), port)

    def check_gateway(self) -> None:
        """Raises SettingsError where a gateway would let in whoever reaches it."""
        if not (is_loopback(self.host) or self.tokens or self.trusted_proxies):
            raise SettingsError(
                f"TDB_HOST is {self.host}, which others can reach: the gateway needs TDB_TOKENS or "
                "TDB_TRUSTED_PROXIES."
            )

    def folder(self, *parts: str) -> Path:
        """A folder below the data folder, created with mode 0700."""
        path = self.data_dir.joinpath(*parts)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.data_dir.chmod(0o700)
        except OSError as error:
            raise SettingsError(f"TDB_DATA_DIR: cannot create {path}: {error.strerror}.") from None
        return path


def setting_fields() -> tuple[Field[Any], ...]:
    """The declarations, in the order in which they are shown."""
    return fields(Settings)


def reachable(host: str) -> str:
    """`host` as something to connect to: a server on all addresses is found on loopback."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def listen_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _refuse_strangers(env: Mapping[str, str]) -> None:
    """A setting that looks like a misspelt one is never ignored."""
    known = [each.metadata["variable"] for each in fields(Settings)]
    for variable in sorted(env):
        if not variable.startswith("TDB_") or variable in known or not env[variable].strip():
            continue
        if meant := difflib.get_close_matches(variable, known, n=1, cutoff=0.88):
            raise SettingsError(f"{variable} is not a setting: did you mean {meant[0]}?")
