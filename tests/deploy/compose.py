"""docker-compose.yml as one profile would run it, and what is wrong with it."""

import ipaddress
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from services.common.settings import Settings, SettingsError, setting_fields
from tests.deploy.dockerfile import ROOT, TARGETS, VERSION, Dockerfile, module_problem, tag_problem

PROFILES = ("cpu", "gpu")
TOKENS = "me:t0ken"
# Read by others than our settings, and by compose itself.
FOREIGN = {"HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "OTEL_EXPORTER_OTLP_ENDPOINT"}
OF_COMPOSE = {"COMPOSE_PROFILES", "MODELS_FOLDER", "TORCH_INDEX"}
# A process that has drained still closes and exits.
MARGIN_S = 5.0

DEFAULTS = {each.metadata["variable"]: each.metadata["default"]({}) for each in setting_fields()}

# Target -> whom it asks.
ASKED = {
    "gateway": ("inference", "dataset", "explainer"),
    "inference": (),
    "dataset": ("inference",),
    "explainer": ("inference", "dataset"),
}
# For the explainer service and nobody else.
KEYS = ("TDB_PROVIDER_KEY", "TDB_EMBEDDING_KEY")

Compose = dict[str, Any]
Service = dict[str, Any]


def variables(text: str) -> dict[str, str]:
    """A file of NAME=VALUE lines."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return dict(line.partition("=")[::2] for line in lines)


def template() -> dict[str, str]:
    return variables((ROOT / "deploy/compose.env").read_text())


def read() -> Compose:
    loaded: Compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


class Missing(Exception):
    """A variable that the file demands and nobody has set."""


def interpolated(value: Any, env: Mapping[str, str]) -> Any:
    """What compose makes of ${NAME}, ${NAME:-default} and ${NAME:?sentence}."""
    if isinstance(value, dict):
        return {key: interpolated(each, env) for key, each in value.items()}
    if isinstance(value, list):
        return [interpolated(each, env) for each in value]
    if not isinstance(value, str):
        return value

    def replaced(match: re.Match[str]) -> str:
        name, operator, rest = match[1], match[2] or "", match[3] or ""
        if given := env.get(name, ""):
            return given
        if operator == ":?":
            raise Missing(f"{name} {rest}")
        return rest

    return re.sub(r"\$\{(\w+)(?:(:[-?])([^}]*))?\}", replaced, value)


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(ms|s|m)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"ms": 1e-3, "s": 1.0, "m": 60.0}[unit]


def active(compose: Compose, profile: str) -> dict[str, Service]:
    """The services that a profile starts."""
    return {
        name: service
        for name, service in compose["services"].items()
        if profile in service.get("profiles", [profile])
    }


def names_of(name: str, service: Service) -> set[str]:
    """The names under which others find a service."""
    networks = service.get("networks", [])
    aliases = networks.values() if isinstance(networks, dict) else []
    return {name, *(alias for each in aliases for alias in (each or {}).get("aliases", []))}


def environment(service: Service, dockerfile: Dockerfile) -> dict[str, str]:
    """The variables of a service's container, after `make compose-env`."""
    of_file = {**template(), "TDB_TOKENS": TOKENS} if service.get("env_file") == [".env"] else {}
    own = {key: str(value) for key, value in service["environment"].items()}
    return {**dockerfile.environment(service["build"]["target"]), **of_file, **own}


def settings_of(service: Service, dockerfile: Dockerfile) -> Settings:
    """The settings that a service would read in its container. Raises SettingsError."""
    env = environment(service, dockerfile)
    return Settings.from_env(dockerfile.found(service["build"]["target"], env))


def problems(compose: Compose, dockerfile: Dockerfile) -> list[str]:
    found: list[str] = []
    try:
        interpolated(compose, template())
        found.append("it starts without TDB_TOKENS")
    except Missing as missing:
        if "make compose-env" not in str(missing):
            found.append(f"{missing}: it does not say what to do")
    filled = interpolated(compose, {**template(), "TDB_TOKENS": TOKENS})
    for profile in PROFILES:
        found += [f"{profile}: {each}" for each in _of_profile(filled, profile, dockerfile)]
    known = {*DEFAULTS, *FOREIGN, *OF_COMPOSE}
    found += [f"{name} is not a setting" for name in sorted(set(template()) - known)]
    used = {volume for volume, _, _ in _volumes(filled["services"])}
    declared = set(filled.get("volumes", {}))
    found += [f"volume {name} is not used" for name in declared - used]
    return found


def _of_profile(compose: Compose, profile: str, dockerfile: Dockerfile) -> Iterator[str]:
    services = active(compose, profile)
    named = [name for key, service in services.items() for name in names_of(key, service)]
    for needed in (*TARGETS, "redis"):
        if named.count(needed) != 1:
            yield f"{named.count(needed)} services answer to {needed}"
    for name, service in services.items():
        yield from (f"{name} {problem}" for problem in _of_service(name, service, compose))
        if "build" in service:
            yield from (f"{name} {each}" for each in _of_ours(name, service, named, dockerfile))
    for volume, options, name in _volumes(services):
        if volume.startswith((".", "/")):
            if "ro" not in options.split(","):
                yield f"{name} may write to {volume} of the host"
        elif volume not in compose.get("volumes", {}):
            yield f"{name} uses the volume {volume}, which is not declared"


def _of_service(name: str, service: Service, compose: Compose) -> Iterator[str]:
    """What every service must have."""
    if problem := tag_problem(service.get("image", "")):
        yield problem
    limits = service.get("deploy", {}).get("resources", {}).get("limits", {})
    if not limits.get("memory"):
        yield "has no memory limit"
    if not service.get("healthcheck", {}).get("test"):
        yield "has no health check"
    if not service.get("stop_grace_period"):
        yield "has no stop grace period"
    if service.get("restart") != "unless-stopped":
        yield "is not started again"
    if not (service.get("init") and service.get("read_only")):
        yield "lacks init or a read-only root"
    if service.get("cap_drop") != ["ALL"] or "no-new-privileges:true" not in service.get(
        "security_opt", []
    ):
        yield "keeps privileges"
    networks = service.get("networks") or []
    if not networks or not set(networks) <= set(compose.get("networks", {})):
        yield "is on no network, or on one that is not declared"
    for port in service.get("ports", []):
        host = str(port).rpartition(":")[0].rpartition(":")[0]
        if not host or not ipaddress.ip_address(host).is_loopback:
            yield f"publishes {port} beyond this machine"
    for other, how in service.get("depends_on", {}).items():
        if other not in compose["services"]:
            yield f"waits for {other}, which does not exist"
        elif "profiles" in compose["services"][other] and how.get("required", True):
            yield f"waits for {other}, which not every profile starts"
    if "build" not in service and not re.fullmatch(r"[1-9]\d*:\d+", str(service.get("user", ""))):
        yield "runs as root, or as a user without a number"


def _of_ours(
    name: str, service: Service, named: list[str], dockerfile: Dockerfile
) -> Iterator[str]:
    """What a service of this repository must have."""
    target = service["build"].get("target", "")
    if target not in TARGETS or target not in dockerfile.stages:
        yield f"is built from {target}, which is no target"
        return
    if not service["image"].endswith(f":{VERSION}"):
        yield f"is not of version {VERSION}"
    if "command" in service:
        yield "does not run its image's command"
    if service.get("user"):
        yield "does not run as its image's user"
    fixed = {"TDB_HOST", "TDB_DATA_DIR", "TDB_DRAIN_SECONDS", TARGETS[target][1]}
    for variable in sorted(fixed - {*service["environment"]}):
        yield f"lets .env change {variable}"
    port_variable = TARGETS[target][1]
    if service.get("env_file") != [".env"]:
        yield "does not read .env, so that what is set there would be ignored"
    for variable in sorted({*service["environment"]} - {*DEFAULTS} - FOREIGN):
        yield f"sets {variable}, which is not a setting"
    try:
        settings = settings_of(service, dockerfile)
    except SettingsError as error:
        yield f"would not start: {error}"
        return
    port = DEFAULTS[port_variable]
    check = service.get("healthcheck", {}).get("test") or [""]
    if check[0] != "CMD" or module_problem(check[1:]) or f"127.0.0.1:{port}" not in check[-1]:
        yield f"is not asked for its health at {port}"
    if seconds(service.get("stop_grace_period", "0s")) < settings.drain_s + MARGIN_S:
        yield f"is killed before it has drained for {settings.drain_s:g} s"
    for backend in ASKED[target]:
        address = getattr(settings, f"{backend}_address")
        if address != f"{backend}:{DEFAULTS[TARGETS[backend][1]]}" or backend not in named:
            yield f"does not find {backend} at {address or 'no address'}"
    for key in KEYS:
        if target != "explainer" and service["environment"].get(key) != "":
            yield f"gets {key} from .env"
    if target == "gateway":
        if service.get("ports") != [f"127.0.0.1:{port}:{port}"]:
            yield f"does not publish {port}"
    elif service.get("ports"):
        yield "is published"


def _volumes(services: Mapping[str, Service]) -> Iterator[tuple[str, str, str]]:
    """(volume or folder of the host, options, service) of every mount."""
    for name, service in services.items():
        for mount in service.get("volumes", []):
            source, _, rest = mount.partition(":")
            yield source, rest.partition(":")[2], name
