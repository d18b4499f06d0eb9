"""Manifests, compose file and image: valid by their schemas, and everything that they name exists."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysyn.cluster.compare import stages_at_once
from raysyn.cluster.fit import fit_fingerprint
from raysyn.cluster.job import JOBS
from raysyn.cluster.synthesize import _as
from raysyn.compose import environment_overrides, load_job
from raysyn.config import FitJob
from raysyn.tracking.places import tracking_uri

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
SCHEMAS = ROOT.parent / "shared" / "schemas"
JOB_FOLDERS = ("prepare", "fit", "synthesize", "tune", "compare")


def documents(path: Path) -> list[dict[str, Any]]:
    return [d for d in yaml.safe_load_all(path.read_text()) if d]


def rendered_job(name: str) -> dict[str, Any]:
    """The base RayJob with the overlay's JSON patch, as kustomize renders it."""
    job = copy.deepcopy(documents(INFRA / "kuberay/jobs/base/rayjob.yaml")[0])
    overlay = documents(INFRA / f"kuberay/jobs/{name}/kustomization.yaml")[0]
    for patch in overlay["patches"]:
        for operation in yaml.safe_load(patch["patch"]):
            *parents, last = operation["path"].strip("/").split("/")
            target = job
            for key in parents:
                target = target[key]
            assert operation["op"] == "replace"
            assert last in target
            target[last] = operation["value"]
    return job


def all_kustomized(folder: Path) -> list[dict[str, Any]]:
    listed = documents(folder / "kustomization.yaml")[0]["resources"]
    return [d for name in listed for d in documents(folder / name)]


def every_kustomized(*folders: str) -> list[dict[str, Any]]:
    return [d for folder in folders for d in all_kustomized(INFRA / folder)]


def with_images(resource: dict[str, Any]) -> dict[str, Any]:
    """The resource with the image that jobs/base names, as kustomize puts it there."""
    (image,) = documents(INFRA / "kuberay/jobs/base/kustomization.yaml")[0]["images"]
    text = json.dumps(resource).replace('"image": "raysyn"', f'"image": "{image["newName"]}:{image["newTag"]}"')
    changed: dict[str, Any] = json.loads(text)
    return changed


def closed(schema: Any) -> Any:
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        for value in schema.values():
            closed(value)
    elif isinstance(schema, list):
        for value in schema:
            closed(value)
    return schema


@pytest.mark.parametrize("kind", ["RayCluster", *JOB_FOLDERS])
def test_ray_resources_fit_the_crds(kind: str) -> None:
    from jsonschema import Draft202012Validator

    crd = "RayCluster" if kind == "RayCluster" else "RayJob"
    file = SCHEMAS / f"ray.io_v1_{crd}.json"
    if not file.is_file():
        pytest.skip("the CRDs' schemas are not beside this checkout")
    resource = documents(INFRA / "kuberay/raycluster.yaml")[0] if crd == "RayCluster" else rendered_job(kind)
    schema = closed(json.loads(file.read_text()))
    schema["properties"] |= {k: {} for k in ("apiVersion", "kind", "metadata")}
    problems = [f"{e.json_path}: {e.message[:120]}" for e in Draft202012Validator(schema).iter_errors(resource)]
    assert problems == []
    assert resource["kind"] == crd


@pytest.mark.parametrize("folder", ["kuberay/common", "mlflow"])
def test_core_kinds_are_valid(folder: str) -> None:
    import kubernetes_validate

    for document in all_kustomized(INFRA / folder):
        kubernetes_validate.validate(document, "1.34", strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")
@pytest.mark.parametrize("folder", ["kuberay/common", "kuberay", "mlflow", *(f"kuberay/jobs/{n}" for n in JOB_FOLDERS)])
def test_kustomize_renders_each_folder_into_its_namespace_with_an_image_that_is_named(folder: str) -> None:
    ran = subprocess.run(["kubectl", "kustomize", str(INFRA / folder)], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")
    rendered = list(yaml.safe_load_all(ran.stdout))
    namespace = "mlflow" if folder == "mlflow" else "raysyn"
    assert {d["metadata"].get("namespace", d["metadata"]["name"]) for d in rendered} == {namespace}
    assert all(re.search(r":\d+\.\d+", image) for image in re.findall(r"image: (\S+)", ran.stdout))
    if "jobs" in folder:
        assert [d["spec"] for d in rendered] == [with_images(rendered_job(folder.rpartition("/")[2]))["spec"]]


def test_the_rayjobs_cluster_is_the_standing_one() -> None:
    standing = documents(INFRA / "kuberay/raycluster.yaml")[0]["spec"]
    assert documents(INFRA / "kuberay/jobs/base/rayjob.yaml")[0]["spec"]["rayClusterSpec"] == standing
    assert standing["authOptions"]["mode"] == "token"
    assert f"ray=={standing['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    assert "nvidia.com/gpu" not in json.dumps(standing["headGroupSpec"])


@pytest.mark.parametrize("name", JOB_FOLDERS)
def test_each_jobs_command_line_is_one_that_its_file_accepts(name: str, monkeypatch) -> None:
    """Storage and MLflow come from the settings: KubeRay's submitter expands variables, and has none of the pods'."""
    settings = documents(INFRA / "kuberay/common/settings.yaml")[0]["data"]
    for variable in ("RAYSYN_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(variable, settings[variable])
    job = rendered_job(name)
    assert job["metadata"]["name"] == f"raysyn-{name}"
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert "$" not in job["spec"]["entrypoint"]
    python, file, *overrides = shlex.split(job["spec"]["entrypoint"])
    assert (python, file) == ("python", f"jobs/{name}.py")
    assert (ROOT / file).is_file()
    config = load_job(name, [*environment_overrides(overrides), *overrides])
    assert isinstance(config, JOBS[name])
    assert config.storage == settings["RAYSYN_STORAGE"]
    assert tracking_uri(config.tracking, config.storage) == settings["MLFLOW_TRACKING_URI"]


def test_the_synthesis_names_the_model_that_the_fit_makes() -> None:
    configs = []
    for name in ("fit", "synthesize"):
        overrides = shlex.split(rendered_job(name)["spec"]["entrypoint"])[2:]
        configs.append(load_job(name, ["storage=/x", *overrides]))
    fits, draws = configs
    assert fit_fingerprint(fits, "frames") == fit_fingerprint(_as(FitJob, draws, model=draws.model), "frames")


def containers(node: Any) -> list[dict[str, Any]]:
    """Every container below, KubeRay's autoscaler (which stands in no list of containers) too."""
    if isinstance(node, list):
        return [c for item in node for c in containers(item)]
    if not isinstance(node, dict):
        return []
    own = [c for key in ("containers", "initContainers") for c in node.get(key, [])]
    own += [node["autoscalerOptions"]] if "autoscalerOptions" in node else []
    return own + [c for value in node.values() for c in containers(value)]


def everything() -> list[dict[str, Any]]:
    rayjob = documents(INFRA / "kuberay/jobs/base/rayjob.yaml")[0]
    return [*every_kustomized("kuberay/common", "kuberay", "mlflow"), rayjob]


def test_every_container_passes_the_restricted_standard() -> None:
    found = everything()
    namespaces = [d for d in found if d["kind"] == "Namespace"]
    assert {d["metadata"]["name"] for d in namespaces} == {"raysyn", "mlflow"}
    assert {tuple(d["metadata"]["labels"].values()) for d in namespaces} == {("restricted",)}
    every = containers(found)
    of_ray = {"ray-head", "ray-worker", "autoscaler", "ray-job-submitter"}
    assert {c.get("name", "autoscaler") for c in every} == of_ray | {"mlflow", "migrate", "postgres", "dump"}
    for container in every:
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
    text = json.dumps(found)
    pods = "two clusters' heads and both kinds of workers, the submitter; MLflow, PostgreSQL, its backup"
    for setting in ('"seccompProfile": {"type": "RuntimeDefault"}', '"runAsNonRoot": true'):
        assert text.count(setting) == 10, pods
    claims = set(re.findall(r"claimName\": \"(camus)", text))
    readme = (INFRA / "README.md").read_text()
    assert all(f"PersistentVolumeClaim `{claim}`" in readme for claim in claims)
    assert claims


def test_probes_wait_longer_than_the_second_that_kubernetes_gives_by_itself() -> None:
    probed = {c["name"]: c for c in containers(everything()) if "readinessProbe" in c}
    assert set(probed) == {"ray-head", "ray-worker", "mlflow", "postgres"}
    probes = [c[k] for c in probed.values() for k in ("readinessProbe", "livenessProbe") if k in c]
    assert all(5 <= probe["timeoutSeconds"] <= 20 for probe in probes)
    assert {name for name, c in probed.items() if "livenessProbe" in c} == {"ray-worker", "mlflow"}


def test_a_submitter_may_run_what_the_readme_tells_him_to() -> None:
    """`kubectl logs job/x` reads the Job first, then its pod's log."""
    role = next(d for d in all_kustomized(INFRA / "kuberay/common") if d["kind"] == "Role")
    may = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert "kubectl -n raysyn logs -f job/raysyn-compare" in (INFRA / "README.md").read_text()
    assert {("jobs", "get"), ("pods", "list"), ("pods/log", "get"), ("rayjobs", "create")} <= may
    assert {verb for resource, verb in may if resource != "rayjobs"} == {"get", "list", "watch"}
    assert not any("secrets" in resource for resource, _ in may)


def test_mlflow_answers_to_the_names_by_which_it_is_asked() -> None:
    (option,) = re.findall(r"--allowed-hosts=(\S+)", (INFRA / "mlflow/mlflow.yaml").read_text())
    settings = documents(INFRA / "kuberay/common/settings.yaml")[0]["data"]
    assert settings["MLFLOW_TRACKING_URI"].removeprefix("http://") in option.split(",")
    assert {"localhost:*", "127.0.0.1:*"} <= set(option.split(",")), "through `kubectl port-forward`"


def test_every_secret_and_config_map_that_is_named_exists_or_is_explained() -> None:
    text = "".join(p.read_text() for p in [*INFRA.glob("kuberay/**/*.yaml"), *INFRA.glob("mlflow/*.yaml")])
    made = set(re.findall(r"kind: ConfigMap\nmetadata:\n  name: (\S+)", text))
    assert set(re.findall(r"configMapRef: \{name: ([\w-]+)\}", text)) <= made
    explained = set(re.findall(r"create secret generic ([\w-]+)", (INFRA / "README.md").read_text()))
    named = set(re.findall(r"secretRef: \{name: ([\w-]+)\}", text)) | set(re.findall(r"secretName: ([\w-]+)", text))
    assert named <= explained, named - explained
    generated = documents(INFRA / "mlflow/kustomization.yaml")[0]["configMapGenerator"]
    assert set(re.findall(r"configMap: \{name: ([\w-]+)\}", text)) <= {entry["name"] for entry in generated}
    assert all((INFRA / "mlflow" / name).is_file() for entry in generated for name in entry["files"])


def test_services_point_at_ports_that_exist() -> None:
    for folder in ("kuberay", "mlflow"):
        found = every_kustomized(folder)
        ports = set(re.findall(r'"name": "([\w-]+)", "containerPort"', json.dumps(found)))
        for service in (d for d in found if d["kind"] == "Service"):
            assert {p["targetPort"] for p in service["spec"]["ports"]} <= ports


def test_nothing_runs_as_root_and_no_secret_is_in_a_layer() -> None:
    image = (INFRA / "Dockerfile").read_text()
    assert re.findall(r"^USER (\S+)", image, re.M) == ["1000:1000"]
    assert not re.search(r"(?i)(token|password|secret|key)\s*=", re.sub(r"#.*", "", image).replace("AUTH_MODE", ""))
    assert "--compile-bytecode" in image, (
        "the container's user cannot write it: each process would compile all it imports"
    )
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", image, re.M):
        assert all((ROOT / name).exists() for name in source.split())
    pods = every_kustomized("kuberay", "mlflow")
    assert json.dumps(pods).count('"runAsNonRoot": true') >= 5


def test_compose_is_closed_to_the_world_and_names_its_settings() -> None:
    compose = documents(INFRA / "compose/compose.yaml")[0]
    for service in compose["services"].values():
        assert all(p.startswith("127.0.0.1:") for p in service.get("ports", []))
        assert set(service.get("depends_on", {})) <= set(compose["services"])
        for volume in service.get("volumes", []):
            name = volume.split(":")[0]
            assert name in compose["volumes"] or name.startswith("$") or (INFRA / "compose" / name).is_file()
    asked = set(re.findall(r"\$\{(\w+)", (INFRA / "compose/compose.yaml").read_text()))
    given = set(re.findall(r"^(\w+)=", (INFRA / "compose/env.example").read_text(), re.M))
    assert asked <= given


def test_the_pods_accept_the_operator_that_the_readme_installs() -> None:
    """Its calls to the dashboard start a RayJob and see it end; from another namespace they would be dropped."""
    policy = next(d for d in all_kustomized(INFRA / "kuberay/common") if d["kind"] == "NetworkPolicy")
    opened = {
        (label, port["port"])
        for rule in policy["spec"]["ingress"]
        for peer in rule["from"]
        for label in peer.get("namespaceSelector", {}).get("matchLabels", {}).values()
        for port in rule["ports"]
    }
    installed = re.findall(r"helm install kuberay-operator .*--namespace (\S+)", (INFRA / "README.md").read_text())
    assert installed
    assert opened == {*((name, 8265) for name in installed), ("monitoring", 8080)}
    assert policy["spec"]["ingress"][0] == {"from": [{"podSelector": {}}]}, "all ports to the own namespace"


def test_a_job_of_its_own_needs_nothing_of_the_standing_cluster() -> None:
    """What a RayJob's pods name is in the folder that the README applies before either."""
    common = every_kustomized("kuberay/common")
    there = {(d["kind"], d["metadata"]["name"]) for d in common}
    job = json.dumps(documents(INFRA / "kuberay/jobs/base/rayjob.yaml")[0])
    for kind, key in (("ServiceAccount", "serviceAccountName"), ("ConfigMap", 'configMapRef": {"name')):
        assert {(kind, name) for name in re.findall(rf'{key}": "([\w-]+)"', job)} <= there
    readme = (INFRA / "README.md").read_text()
    assert readme.index("apply -k infra/kuberay/common") < readme.index("apply -k infra/kuberay/jobs")


def test_the_head_holds_the_stages_that_a_study_runs_at_once() -> None:
    """Ray runs what asks for no CPU beside the driver, where torch alone is 0.7 GiB a process; objects have their 30 %."""
    study = load_job("compare", shlex.split(rendered_job("compare")["spec"]["entrypoint"])[2:])
    head = documents(INFRA / "kuberay/raycluster.yaml")[0]["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    memory = float(head["resources"]["limits"]["memory"].removesuffix("Gi"))
    assert 0.7 * memory >= 0.75 * stages_at_once(study) + 2.0


def test_ray_keeps_its_objects_in_memory() -> None:
    """Ray puts its objects on disk where /dev/shm is smaller than what it takes of a pod's memory (30 %)."""
    from ray._private import ray_constants

    spec = documents(INFRA / "kuberay/raycluster.yaml")[0]["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        memory = float(pod["containers"][0]["resources"]["limits"]["memory"].removesuffix("Gi"))
        (shm,) = (v["emptyDir"]["sizeLimit"] for v in pod["volumes"] if v["name"] == "shm")
        assert memory * ray_constants.DEFAULT_OBJECT_STORE_MEMORY_PROPORTION <= 0.95 * float(shm.removesuffix("Gi"))
