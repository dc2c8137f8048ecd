"""The Kubernetes manifests as one list of objects, and what is wrong with them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from services.common.settings import Settings, SettingsError, setting_fields
from tests.deploy.compose import ASKED, DEFAULTS, FOREIGN, MARGIN_S, TOKENS
from tests.deploy.dockerfile import ROOT, TARGETS, VERSION, Dockerfile, tag_problem

BASE = ROOT / "deploy/kubernetes/base"
SECRET = "tokens"
PROVIDER = "provider"
"""Keys of language models."""
NAMESPACE = "tdb"

Object = dict[str, Any]


def kustomization() -> Object:
    loaded: Object = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    return loaded


def read() -> list[Object]:
    """Every object that the base lists."""
    files = [BASE / name for name in kustomization()["resources"]]
    return [each for file in files for each in yaml.safe_load_all(file.read_text())]


def of_kind(objects: list[Object], *kinds: str) -> dict[str, Object]:
    return {each["metadata"]["name"]: each for each in objects if each["kind"] in kinds}


def problems(objects: list[Object], dockerfile: Dockerfile) -> list[str]:
    found: list[str] = []
    workloads = of_kind(objects, "Deployment", "StatefulSet")
    services = of_kind(objects, "Service")
    for name in (*TARGETS, "redis"):
        if name not in workloads:
            found.append(f"nothing runs {name}")
    for name, workload in workloads.items():
        pod = workload["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        found += [f"{name} {each}" for each in _of_pod(workload, pod, container)]
        if name in TARGETS:
            settings = _settings(name, container, objects, dockerfile)
            if isinstance(settings, str):
                found.append(f"{name} {settings}")
            else:
                found += [
                    f"{name} {each}" for each in _of_ours(name, settings, pod, container, services)
                ]
        if workload["spec"]["replicas"] > 1 and not _disruption_budget(objects, name):
            found.append(f"{name} has no disruption budget")
    for name, service in services.items():
        found += [f"service {name} {each}" for each in _of_service(service, workloads)]
    known = {each.metadata["variable"] for each in setting_fields()}
    for each in of_kind(objects, "ConfigMap").values():
        found += [f"{name} is not a setting" for name in set(each["data"]) - known - FOREIGN]
    found += [f"a {each['kind']} lies in the manifests" for each in objects if _secret(each)]
    return found


def _of_pod(workload: Object, pod: Object, container: Object) -> Iterator[str]:
    """What every workload must have."""
    labels = workload["spec"]["template"]["metadata"]["labels"]
    if workload["spec"]["selector"]["matchLabels"].items() - labels.items():
        yield "does not select its own pods"
    if problem := tag_problem(container["image"]):
        yield problem
    if not container.get("resources", {}).get("limits", {}).get("memory"):
        yield "has no memory limit"
    for probe in ("readinessProbe", "livenessProbe"):
        if probe not in container:
            yield f"has no {probe}"
    if not pod.get("terminationGracePeriodSeconds"):
        yield "has no grace period of its own"
    # A Service `x` gives pods a variable X_PORT=tcp://..., and ours read TDB_..._PORT.
    if pod.get("enableServiceLinks") is not False:
        yield "gets variables from the names of Services"
    if pod.get("automountServiceAccountToken") is not False:
        yield "holds a token of the cluster"
    security = pod.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
        yield "may run as root"
    own = container.get("securityContext", {})
    if (
        own.get("allowPrivilegeEscalation") is not False
        or own.get("capabilities", {}).get("drop") != ["ALL"]
        or own.get("readOnlyRootFilesystem") is not True
        or security.get("seccompProfile") != {"type": "RuntimeDefault"}
    ):
        yield "keeps privileges"
    claims = workload["spec"].get("volumeClaimTemplates", [])
    volumes = {each["name"] for each in pod.get("volumes", [])}
    volumes |= {each["metadata"]["name"] for each in claims}
    mounted = {each["name"] for each in container.get("volumeMounts", [])}
    for volume in mounted - volumes:
        yield f"mounts {volume}, which is not declared"
    for volume in volumes - mounted:
        yield f"does not mount {volume}"


def _of_ours(
    name: str, settings: Settings, pod: Object, container: Object, services: Mapping[str, Object]
) -> Iterator[str]:
    """What a workload of this repository must have."""
    port = int(DEFAULTS[TARGETS[name][1]])
    if "command" in container or "args" in container:
        yield "does not run its image's command"
    if container["image"] != f"transformer-debugger-{name}:{VERSION}":
        yield f"does not run its image of version {VERSION}"
    if pod["securityContext"].get("runAsUser") != 10001:
        yield "does not run as its image's user"
    if port not in [each["containerPort"] for each in container["ports"]]:
        yield f"does not listen at {port}"
    sleep = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
    slept = float(sleep[1]) if sleep[:1] == ["sleep"] else 0.0
    if pod.get("terminationGracePeriodSeconds", 0) < slept + settings.drain_s + MARGIN_S:
        yield f"is killed before it has drained for {settings.drain_s:g} s"
    ready = container.get("readinessProbe", {})
    if name == "gateway":
        if ready.get("httpGet", {}).get("path") != "/readyz":
            yield "is ready before calls get through"
        if not slept:
            yield "stops while its Service still sends requests"
    else:
        if ready.get("grpc", {}).get("port") != port:
            yield f"is not asked for its health at {port}"
        if "startupProbe" not in container:
            yield "is killed while it loads"
        if not settings.max_connection_age_s:
            yield "keeps its connections for ever, so that new replicas get none"
    for backend in ASKED[name]:
        expected = f"{backend}.{NAMESPACE}.svc.cluster.local:{DEFAULTS[TARGETS[backend][1]]}"
        address = getattr(settings, f"{backend}_address")
        if address != f"dns:///{expected}":
            yield f"does not find every {backend} at {address or 'no address'}"
        elif services[backend]["spec"].get("clusterIP") != "None":
            yield f"finds one {backend} for all, since its Service is not headless"
    secrets = {each["secretRef"]["name"] for each in container["envFrom"] if "secretRef" in each}
    if secrets != ({SECRET, PROVIDER} if name == "explainer" else {SECRET}):
        yield f"reads the secrets {', '.join(sorted(secrets))}"
    mounts = [each["mountPath"] for each in container.get("volumeMounts", [])]
    if str(settings.data_dir) in mounts:
        yield "cannot change the mode of a volume's own folder"


def _of_service(service: Object, workloads: Mapping[str, Object]) -> Iterator[str]:
    selector = service["spec"]["selector"]
    for workload in workloads.values():
        template = workload["spec"]["template"]
        if selector.items() <= template["metadata"]["labels"].items():
            names = [port["name"] for port in template["spec"]["containers"][0]["ports"]]
            for port in service["spec"]["ports"]:
                if port["targetPort"] not in names:
                    yield f"leads to {port['targetPort']}, which nothing listens at"
            return
    yield "selects nothing"


def _settings(
    name: str, container: Object, objects: list[Object], dockerfile: Dockerfile
) -> Settings | str:
    """The settings that a container would read, or why it would not start."""
    env = dockerfile.environment(name)
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            env |= of_kind(objects, "ConfigMap")[source["configMapRef"]["name"]]["data"]
        elif source["secretRef"]["name"] == SECRET:
            env["TDB_TOKENS"] = TOKENS
    env |= {each["name"]: each["value"] for each in container.get("env", [])}
    try:
        return Settings.from_env(dockerfile.found(name, env))
    except SettingsError as error:
        return f"would not start: {error}"


def _disruption_budget(objects: list[Object], name: str) -> bool:
    budget = of_kind(objects, "PodDisruptionBudget").get(name, {})
    selector = budget.get("spec", {}).get("selector", {}).get("matchLabels")
    return bool(selector == {"app": name} and budget["spec"].get("minAvailable"))


def _secret(each: Object) -> bool:
    return each["kind"] == "Secret" or bool(re.search(r"TDB_TOKENS|_KEY\b", str(each)))
