"""The JobSets that are submitted: valid by the official models and Kubernetes' own schemas, and what they say."""

import re
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from omnihuman_jax.errors import UserError
from tests.tpu.launching import make_job
from tpu.jobs import jobset
from tpu.jobs.job import check_job
from tpu.jobs.tpu_types import TPU_TYPES
from tpu.topologies import GENERATIONS

KUBERNETES = "1.33"
JOBS = {
    "one slice": make_job(),
    "several slices": make_job("v5litepod-256", 4),
    "two devices a chip": make_job("tpu7x-128", 2),
    "one host": make_job("v6e-4"),
    "no preflight": make_job(preflight=False),
    "everything": make_job(
        **{"namespace": "people", "service_account": "trainer", "queue": "pods", "priority": "high", "spot": True},
        **{"reservation": "mine", "force": True, "max_restarts": 0, "keep_seconds": 0},
    ),
}


def training(job) -> dict[str, Any]:
    return jobset.manifest(job)["spec"]["replicatedJobs"][-1]


def pod(job) -> dict[str, Any]:
    return training(job)["template"]["spec"]["template"]["spec"]


@pytest.fixture(params=JOBS)
def manifest(request) -> dict[str, Any]:
    """What kubectl reads."""
    (document,) = yaml.safe_load_all(jobset.render([JOBS[request.param]]))
    return document


def test_a_manifest_is_a_jobset_of_the_official_models_without_a_field_they_do_not_know(manifest):
    assert JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest


def test_its_jobs_are_jobs_of_kubernetes(manifest):
    for replicated in manifest["spec"]["replicatedJobs"]:
        template = replicated["template"]
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"} | template.get("metadata", {})}
        kubernetes_validate.validate(job | {"spec": template["spec"]}, KUBERNETES, strict=True)


def test_a_wrong_field_would_be_seen():
    manifest = jobset.manifest(JOBS["one slice"])
    manifest["spec"]["failurePolicy"]["maxRestart"] = 3
    assert JobsetV1alpha2JobSet.from_dict(manifest).to_dict() != manifest
    spec = training(JOBS["one slice"])["template"]["spec"] | {"backofLimit": 0}
    with pytest.raises(kubernetes_validate.ValidationError):
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}
        kubernetes_validate.validate(job, KUBERNETES, strict=True)


def test_what_the_admission_webhook_of_jobset_asks_for_holds(manifest):
    names = [replicated["name"] for replicated in manifest["spec"]["replicatedJobs"]]
    assert "dependsOn" not in manifest["spec"]["replicatedJobs"][0]
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
        assert set(rule["targetReplicatedJobs"]) <= set(names)
    for replicated in manifest["spec"]["replicatedJobs"]:
        assert {before["name"] for before in replicated.get("dependsOn", [])} <= set(names)
        assert replicated["template"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # for podFailurePolicy


@pytest.mark.parametrize(
    ("tpu_type", "slices", "hosts", "accelerator", "layout"),
    [
        ("v5p-128", 1, 16, "tpu-v5p-slice", "4x4x4"),
        ("v5litepod-256", 4, 64, "tpu-v5-lite-podslice", "16x16"),
        ("v6e-256", 2, 64, "tpu-v6e-slice", "16x16"),
        ("tpu7x-128", 1, 16, "tpu7x", "4x4x4"),
        ("v4-8", 1, 1, "tpu-v4-podslice", "2x2x1"),
    ],
)
def test_a_slice_is_a_job_and_a_host_a_pod_with_four_chips(tpu_type, slices, hosts, accelerator, layout):
    job = make_job(tpu_type, slices)
    assert training(job)["replicas"] == slices
    spec = training(job)["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["completionMode"]) == (hosts, hosts, "Indexed")
    assert pod(job)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": layout,
    }
    (container,) = pod(job)["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert ("--multi_host" in container["command"]) == (hosts * slices > 1)
    assert pod(job).get("hostNetwork", False) == (slices > 1)
    # A node pool is a slice, and no two jobs share one.
    annotations = training(job)["template"]["metadata"]["annotations"]
    assert annotations == {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}


def test_devices_are_counted_per_chip():
    assert TPU_TYPES["tpu7x-128"].chips == 64 and TPU_TYPES["tpu7x-128"].devices == 128
    assert TPU_TYPES["v5p-128"].chips == TPU_TYPES["v5p-128"].devices == 64
    assert TPU_TYPES["v6e-64"].chips == 64
    assert len(TPU_TYPES) == sum(len(generation.sizes) for generation in GENERATIONS.values())


def test_bad_input_ends_the_job_a_preemption_is_free_and_the_rest_counts():
    spec = jobset.manifest(make_job(max_restarts=7))["spec"]
    bad_input, preempted, preflight = spec["failurePolicy"]["rules"]
    rules = training(make_job())["template"]["spec"]["podFailurePolicy"]["rules"]
    assert spec["failurePolicy"]["maxRestarts"] == 7 and training(make_job())["template"]["spec"]["backoffLimit"] == 0
    # The words of the Job controller, whose last part names the rule that matched.
    message = (
        "Container train for pod default/omni-train-0-3-x failed with exit code {} matching FailJob rule at index {}"
    )
    (pattern,) = bad_input["onJobFailureMessagePatterns"]
    assert rules[0]["onExitCodes"]["values"] == [2] and re.search(pattern, message.format(2, 0))
    assert bad_input["action"] == "FailJobSet"
    assert rules[1]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert rules[2]["onExitCodes"]["values"] == [143] and not re.search(pattern, message.format(143, 2))
    assert not re.search(pattern, message.format(143, 10))
    assert preempted["action"] == "RestartJobSetAndIgnoreMaxRestarts" and "onJobFailureMessagePatterns" not in preempted
    # The watchdog's 3 is in no rule: the child job fails by its backoff limit, and JobSet's default restarts all.
    assert not any(3 in rule.get("onExitCodes", {}).get("values", []) for rule in rules)
    assert (preflight["action"], preflight["targetReplicatedJobs"]) == ("FailJobSet", ["preflight"])
    assert spec["failurePolicy"]["restartStrategy"] == "BlockingRecreate"


def test_the_slices_wait_for_a_preflight_that_has_no_tpu():
    before, after = jobset.manifest(make_job(num_slices=2))["spec"]["replicatedJobs"]
    assert after["dependsOn"] == [{"name": before["name"], "status": "Complete"}]
    spec = before["template"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert "nodeSelector" not in spec and "limits" not in container["resources"]
    assert container["command"][:3] == ["python", "-m", "tpu.jobs.preflight"]
    assert {"--topology=v5p:4x4x4", "--num_slices=2", "--workdir=gs://bucket/runs/omni"} <= set(container["command"])
    # What is planned is compiled as it will run.
    environment = {one["name"]: one["value"] for one in container["env"]}
    running = {one["name"]: one["value"] for one in pod(make_job(num_slices=2))["containers"][0]["env"]}
    assert environment["LIBTPU_INIT_ARGS"] == running["LIBTPU_INIT_ARGS"] != ""
    assert (environment["JAX_PLATFORMS"], running["JAX_PLATFORMS"]) == ("cpu", "tpu,cpu")
    assert container["securityContext"]["runAsNonRoot"] and "--force" not in container["command"]


def test_the_grace_is_long_enough_for_two_saves():
    assert pod(make_job(save_seconds=300))["terminationGracePeriodSeconds"] == 660


def test_the_bucket_is_mounted_and_seen_alike_by_all_hosts():
    (volume,) = pod(make_job(num_slices=2))["volumes"]
    attributes = volume["csi"]["volumeAttributes"]
    assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io" and attributes["bucketName"] == "bucket"
    assert {"metadata-cache:ttl-secs:0", "uid=0"} <= set(attributes["mountOptions"].split(","))
    assert attributes["hostNetworkPodKSA"] == "true"  # hostNetwork: else it would have the node's permissions
    annotations = training(make_job())["template"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["gke-gcsfuse/volumes"] == "true" and annotations["gke-gcsfuse/ephemeral-storage-limit"] == "0"


@pytest.mark.parametrize(("slices", "tpu_type"), [(1, "v6e-4"), (2, "v5p-128"), (12, "v5p-8192")])
def test_the_longest_name_that_passes_has_pods_of_63_characters(slices, tpu_type):
    job = make_job(tpu_type, slices)
    suffix = jobset.longest_suffix(job)
    longest = "o" * (63 - len(suffix))
    check_job(make_job(tpu_type, slices, name=longest), suffix)
    for replicated in jobset.manifest(job)["spec"]["replicatedJobs"]:
        last = replicated["template"]["spec"]["completions"] - 1
        assert len(f"{longest}-{replicated['name']}-{replicated['replicas'] - 1}-{last}-abcde") <= 63
    with pytest.raises(UserError, match="shorten it"):
        check_job(make_job(tpu_type, slices, name=longest + "o"), suffix)
