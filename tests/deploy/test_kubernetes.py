"""The Kubernetes manifests in structure, and through `kubectl kustomize` where it is there."""

import copy
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.deploy import dockerfile
from tests.deploy.dockerfile import TARGETS, VERSION
from tests.deploy.kubernetes import BASE, Object, kustomization, of_kind, problems, read

Change = Callable[[list[Object]], object]


def test_nothing_is_wrong() -> None:
    assert problems(read(), dockerfile.read()) == []


def of(kind: str, name: str, path: str, value: Any = None) -> Change:
    """Sets the place at `path` in an object, or drops it where `value` is None."""

    def change(objects: list[Object]) -> None:
        place: Any = of_kind(objects, kind)[name]
        *way, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        for key in way:
            place = place[key]
        if value is None:
            del place[last]
        else:
            place[last] = value

    return change


POD = "spec/template/spec"
CONTAINER = f"{POD}/containers/0"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (of("Deployment", "gateway", f"{CONTAINER}/image", "gateway:latest"), "no tag of its own"),
        (of("Deployment", "gateway", f"{CONTAINER}/image", "gateway:1"), "its image of version"),
        (
            of("StatefulSet", "inference", f"{CONTAINER}/args", ["up"]),
            "not run its image's command",
        ),
        (of("StatefulSet", "dataset", f"{CONTAINER}/resources/limits"), "has no memory limit"),
        (of("Deployment", "redis", f"{CONTAINER}/livenessProbe"), "redis has no livenessProbe"),
        (of("StatefulSet", "dataset", f"{CONTAINER}/startupProbe"), "is killed while it loads"),
        (
            of("StatefulSet", "inference", f"{CONTAINER}/readinessProbe", {"grpc": {"port": 1}}),
            "is not asked for its health at 50051",
        ),
        (
            of("Deployment", "gateway", f"{CONTAINER}/readinessProbe/httpGet/path", "/healthz"),
            "is ready before calls get through",
        ),
        (of("Deployment", "gateway", f"{CONTAINER}/lifecycle"), "still sends requests"),
        (
            of("StatefulSet", "inference", f"{POD}/terminationGracePeriodSeconds", 30),
            "before it has drained for 30 s",
        ),
        (
            of("Deployment", "gateway", f"{POD}/terminationGracePeriodSeconds", 36),
            "before it has drained for 30 s",
        ),
        (of("Deployment", "gateway", f"{POD}/enableServiceLinks"), "from the names of Services"),
        (of("Deployment", "redis", f"{POD}/automountServiceAccountToken"), "holds a token"),
        (of("StatefulSet", "dataset", f"{POD}/securityContext/runAsNonRoot"), "may run as root"),
        (of("StatefulSet", "dataset", f"{POD}/securityContext/runAsUser", 1000), "image's user"),
        (
            of("Deployment", "redis", f"{CONTAINER}/securityContext/readOnlyRootFilesystem", False),
            "redis keeps privileges",
        ),
        (of("StatefulSet", "dataset", "spec/volumeClaimTemplates"), "mounts data, which is not"),
        (
            of("StatefulSet", "inference", "spec/selector/matchLabels", {"app": "infer"}),
            "does not select its own pods",
        ),
        (of("Service", "inference", "spec/clusterIP"), "its Service is not headless"),
        (of("Service", "dataset", "spec/selector", {"app": "data"}), "dataset selects nothing"),
        (of("Service", "gateway", "spec/ports/0/targetPort", "https"), "nothing listens at"),
        (of("ConfigMap", "settings", "data/TDB_MODLE", "gpt2"), "TDB_MODLE is not a setting"),
        (of("ConfigMap", "settings", "data/TDB_DTYPE", "float8"), "would not start: TDB_DTYPE"),
        (of("ConfigMap", "settings", "data/TDB_DRAIN_SECONDS", "41"), "drained for 41 s"),
        (of("ConfigMap", "settings", "data/TDB_DATA_DIR", "/data"), "mode of a volume's own"),
        (of("ConfigMap", "settings", "data/TDB_TOKENS", "ann:t"), "ConfigMap lies in the manif"),
        (
            of("ConfigMap", "settings", "data/TDB_MAX_CONNECTION_AGE_SECONDS"),
            "so that new replicas get none",
        ),
        (
            of("ConfigMap", "settings", "data/TDB_INFERENCE_ADDRESS", "inference:50051"),
            "does not find every inference",
        ),
        (
            of("ConfigMap", "settings", "data/TDB_EXPLAINER_ADDRESS", "explainer:50053"),
            "does not find every explainer",
        ),
        (of("StatefulSet", "explainer", f"{CONTAINER}/envFrom/2"), "reads the secrets tokens"),
        (of("ConfigMap", "settings", "data/TDB_PROVIDER_KEY", "sk"), "ConfigMap lies in the manif"),
        (of("StatefulSet", "inference", f"{CONTAINER}/envFrom/2"), "TDB_HOST is 0.0.0.0"),
        (
            of("ConfigMap", "settings", "data/TDB_MODEL", "demo=/opt/tdb/demo/model"),
            "gateway would not start: TDB_MODEL names a folder",
        ),
        (of("PodDisruptionBudget", "inference", "spec/minAvailable"), "has no disruption budget"),
        (of("Deployment", "redis", "metadata/name", "valkey"), "nothing runs redis"),
    ],
)
def test_what_would_be_wrong_is_found(change: Change, problem: str) -> None:
    broken = copy.deepcopy(read())
    change(broken)
    found = problems(broken, dockerfile.read())
    assert any(problem in each for each in found), found


def test_every_file_is_listed_and_every_image_named() -> None:
    listed = {*kustomization()["resources"], "kustomization.yaml"}
    assert listed == {path.name for path in BASE.glob("*.yaml")}
    assert {each["name"]: each["newTag"] for each in kustomization()["images"]} == {
        f"transformer-debugger-{target}": VERSION for target in TARGETS
    }


@pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl here")
def test_kustomize_builds_both_and_the_gpu_is_the_only_difference() -> None:
    def build(name: str) -> list[Object]:
        command = ["kubectl", "kustomize", str(BASE.parent / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return list(yaml.safe_load_all(done.stdout))

    base, gpu = build("base"), build("gpu")
    assert problems(base, dockerfile.read()) == []
    assert problems(gpu, dockerfile.read()) == []
    assert all(
        each["metadata"].get("namespace") == "tdb" for each in base if each["kind"] != "Namespace"
    )
    container = of_kind(gpu, "StatefulSet")["inference"]["spec"]["template"]["spec"]["containers"][
        0
    ]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["env"] == [{"name": "TDB_DEVICE", "value": "cuda"}]
    others = [
        [each for each in objects if each["metadata"]["name"] != "inference"]
        for objects in (base, gpu)
    ]
    assert others[0] == others[1]
