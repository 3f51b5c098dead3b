"""The JobSet of a team, as the API server would read it, against the schemas that JobSet and Kubernetes publish."""

import copy
from typing import Any

import pytest
import yaml

from tests.end_to_end.service import ROOT

models = pytest.importorskip("kubeflow_trainer_api.models", reason="the kubernetes extra is not installed")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="the kubernetes extra is not installed")


def read_set() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "team.yaml").read_text(encoding="utf-8"))
    return found


def check(manifest: dict[str, Any]) -> None:
    """Raise where the JobSet has a field that there is not, or one of another type, anywhere."""
    read = models.JobsetV1alpha2JobSet.from_dict(manifest)
    assert read.to_dict() == manifest, "a field is unknown to JobSet"
    for job in manifest["spec"]["replicatedJobs"]:
        alone = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
        kubernetes_validate.validate(alone, kubernetes_validate.latest_version(), strict=True)


def get_pods() -> dict[str, Any]:
    return {job["name"]: job["template"]["spec"] for job in read_set()["spec"]["replicatedJobs"]}


def test_the_set_is_valid() -> None:
    check(read_set())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "succesPolicy"), {}),
        (("spec", "replicatedJobs", 0, "replica"), 1),
        (("spec", "replicatedJobs", 1, "template", "spec", "template", "spec", "toleration"), []),
        (("spec", "failurePolicy", "maxRestarts"), "0"),
    ],
)
def test_a_slip_in_it_is_found(path: tuple[Any, ...], value: Any) -> None:
    manifest = copy.deepcopy(read_set())
    place = manifest
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises((AssertionError, ValueError, kubernetes_validate.ValidationError)):
        check(manifest)


def test_guests_join_the_head_by_its_name_and_all_get_two_minutes() -> None:
    jobs = get_pods()
    for name, command in (("head", ["sft", "run", "/etc/sft/run.yaml"]), ("guests", ["sft", "join"])):
        pod = jobs[name]["template"]["spec"]
        (container,) = pod["containers"]
        environment = {each["name"]: each["value"] for each in container["env"]}
        assert container["args"] == command
        assert environment["SFT_RENDEZVOUS"] == "team-head-0-0.team:29400"  # SET-JOB-REPLICA-POD.SET
        assert float(environment["SFT_STOP_SECONDS"]) < pod["terminationGracePeriodSeconds"] == 120
        assert pod["restartPolicy"] == "Never"  # so that pod failure policies count
        assert jobs[name]["podFailurePolicy"]["rules"][0]["action"] == "Ignore"
    policy = read_set()["spec"]["successPolicy"]
    assert (policy["operator"], policy["targetReplicatedJobs"]) == ("All", ["head"])
