"""systemd's units as sections of lists, and what is wrong with them."""

import importlib.util
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from services.common.settings import Settings, SettingsError, setting_fields
from tests.deploy.compose import DEFAULTS, FOREIGN, MARGIN_S, variables
from tests.deploy.dockerfile import ROOT, TARGETS

FOLDER = ROOT / "deploy/systemd"
SERVICES = {f"tdb-{target}.service": module for target, (module, _) in TARGETS.items()}
HARDENED = {
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "CapabilityBoundingSet": "",
    "SystemCallFilter": "@system-service",
}

Unit = dict[str, dict[str, list[str]]]


def parse(text: str) -> Unit:
    """Section -> name -> values, in order."""
    unit: Unit = {}
    section: dict[str, list[str]] = {}
    for line in filter(None, (line.strip() for line in text.splitlines())):
        if line.startswith("["):
            section = unit.setdefault(line.strip("[]"), {})
        elif not line.startswith("#"):
            name, _, value = line.partition("=")
            section.setdefault(name, []).append(value)
    return unit


def read() -> dict[str, Unit]:
    return {path.name: parse(path.read_text()) for path in sorted(FOLDER.glob("*.service"))}


def environment() -> dict[str, str]:
    return variables((FOLDER / "tdb.env").read_text())


def problems(units: Mapping[str, Unit], environment: Mapping[str, str]) -> list[str]:
    found = [f"there is no {name}" for name in SERVICES if name not in units]
    for name, unit in units.items():
        found += [f"{name} {problem}" for problem in _of_unit(unit, units)]
        if name in SERVICES:
            found += [f"{name} {each}" for each in _of_ours(name, unit, environment)]
    known = {each.metadata["variable"] for each in setting_fields()}
    found += [f"{name} is not a setting" for name in set(environment) - known - FOREIGN]
    return found


def _last(unit: Unit, section: str, name: str) -> str:
    return unit.get(section, {}).get(name, [""])[-1]


def _of_unit(unit: Unit, units: Mapping[str, Unit]) -> Iterator[str]:
    for name, value in HARDENED.items():
        if unit["Service"].get(name) != [value]:
            yield f"does not have {name}={value}"
    if not (_last(unit, "Service", "User") or _last(unit, "Service", "DynamicUser") == "yes"):
        yield "runs as root"
    if _last(unit, "Service", "User") in ("root", "0"):
        yield "runs as root"
    if _last(unit, "Service", "Restart") != "on-failure":
        yield "is not started again"
    if not (
        _last(unit, "Unit", "StartLimitBurst") and _last(unit, "Unit", "StartLimitIntervalSec")
    ):
        yield "is started again without end"
    if not _last(unit, "Service", "MemoryMax"):
        yield "has no memory limit"
    if not _last(unit, "Service", "TimeoutStopSec"):
        yield "has no stop grace period"
    if not _last(unit, "Install", "WantedBy"):
        yield "cannot be enabled"
    for key in ("After", "Wants"):
        for other in _last(unit, "Unit", key).split():
            if other.startswith("tdb-") and other not in units:
                yield f"waits for {other}, which does not exist"


def _of_ours(name: str, unit: Unit, environment: Mapping[str, str]) -> Iterator[str]:
    command = shlex.split(_last(unit, "Service", "ExecStart"))
    module = SERVICES[name]
    if command != ["/opt/tdb/bin/python", "-P", "-m", module]:
        yield f"does not run {module}"
    elif importlib.util.find_spec(f"{module}.__main__") is None:
        yield f"runs {module}, which cannot be run"
    if _last(unit, "Service", "EnvironmentFile") != "/etc/tdb/tdb.env":
        yield "does not read /etc/tdb/tdb.env"
    # ProtectClock allows clocks, and therefore no other device.
    closed = [key for key in ("PrivateDevices", "ProtectClock") if _last(unit, "Service", key)]
    if name == "tdb-inference.service" and closed:
        yield f"cannot open the GPU: {closed[0]}"
    own = dict(
        pair.partition("=")[::2]
        for line in unit["Service"].get("Environment", [])
        for pair in line.split()
    )
    if ours := {each for each in environment if each.endswith("_KEY")}:
        yield f"reads {', '.join(ours)} with all others"
    try:
        settings = Settings.from_env({**own, **environment})
    except SettingsError as error:
        yield f"would not start: {error}"
        return
    if (
        settings.data_dir != Path("/var/lib/tdb")
        or _last(unit, "Service", "StateDirectory") != "tdb"
    ):
        yield "does not keep its data in its state folder"
    if float(_last(unit, "Service", "TimeoutStopSec") or 0) < settings.drain_s + MARGIN_S:
        yield f"is killed before it has drained for {settings.drain_s:g} s"
    for _, variable in TARGETS.values():
        if environment.get(variable, DEFAULTS[variable]) != DEFAULTS[variable]:
            yield f"does not listen at {DEFAULTS[variable]}"
