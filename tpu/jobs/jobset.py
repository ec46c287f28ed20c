"""A job as a JobSet of GKE: one child job a slice, one pod a host, and a preflight on CPUs before them."""

from typing import Any

import yaml

from tpu.jobs import storage
from tpu.jobs.environment import environment
from tpu.jobs.job import BAD_INPUT, CONTAINER, STOPPED, Job
from tpu.jobs.tpu_types import CHIPS_PER_HOST

PREFLIGHT = "preflight"
USER = 1000  # of the image
_VOLUME = "bucket"
# A node pool is a slice: each child job has one for itself.
_EXCLUSIVE = "alpha.jobset.sigs.k8s.io/exclusive-topology"
# Index of the rule in `_training_policy` that a message of the Job controller ends with.
_BAD_INPUT_RULE = r"rule at index 0$"

Manifest = dict[str, Any]


def longest_suffix(job: Job) -> str:
    """What JobSet appends to the job's name for its longest-named pod: replicated job, job, pod, five characters."""
    of_training = f"-{CONTAINER}-{job.num_slices - 1}-{job.tpu.hosts - 1}-abcde"
    return max(of_training, f"-{PREFLIGHT}-0-0-abcde" if job.preflight else "", key=len)


def render(jobs: list[Job]) -> str:
    """The manifests as YAML documents."""
    return yaml.safe_dump_all([manifest(job) for job in jobs], sort_keys=False, width=10_000)


def manifest(job: Job) -> Manifest:
    """The JobSet (jobset.x-k8s.io/v1alpha2, 0.10 or later) of a job."""
    replicated = [_preflight(job)] if job.preflight else []
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            "namespace": job.namespace,
            **({"labels": {"kueue.x-k8s.io/queue-name": job.queue}} if job.queue else {}),
        },
        "spec": {
            "ttlSecondsAfterFinished": job.keep_seconds,
            "failurePolicy": _failure_policy(job),
            "replicatedJobs": [*replicated, _training(job)],
        },
    }


def _failure_policy(job: Job) -> Manifest:
    """What ends the whole job and what starts it again; a failure that no rule names counts as a restart."""
    rules = [
        {
            "name": "badInput",
            "action": "FailJobSet",
            "targetReplicatedJobs": [CONTAINER],
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": [_BAD_INPUT_RULE],
        },
        {
            "name": "preempted",
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "targetReplicatedJobs": [CONTAINER],
            "onJobFailureReasons": ["PodFailurePolicy"],
        },
    ]
    if job.preflight:
        rules.append({"name": "preflight", "action": "FailJobSet", "targetReplicatedJobs": [PREFLIGHT]})
    return {
        "maxRestarts": job.max_restarts,
        # A new run must not read the run directory while pods of the one before are still saving into it.
        "restartStrategy": "BlockingRecreate",
        "rules": rules,
    }


def _training(job: Job) -> Manifest:
    """The slices: a job each, whose pods live and die together."""
    tpu = job.tpu
    container = {
        "name": CONTAINER,
        "image": job.image,
        "command": job.training_command(),
        "env": _variables(environment(tpu, job.num_slices)),
        "resources": {"limits": {"google.com/tpu": CHIPS_PER_HOST}},
        # The TPU's devices, and the locked memory that its driver maps.
        "securityContext": {"privileged": True, "runAsUser": 0},
        "volumeMounts": [_mount()],
    }
    pod = {
        **_pod(job, [container], user=0, host_network=job.num_slices > 1),
        "terminationGracePeriodSeconds": job.grace_seconds,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": tpu.series.accelerator,
            "cloud.google.com/gke-tpu-topology": tpu.layout,
            **({"cloud.google.com/gke-spot": "true"} if job.spot else {}),
            **({"cloud.google.com/reservation-name": job.reservation} if job.reservation else {}),
        },
        "tolerations": [
            {"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"},
            *([{"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"}] if job.spot else []),
        ],
    }
    return {
        "name": CONTAINER,
        "replicas": job.num_slices,
        **({"dependsOn": [{"name": PREFLIGHT, "status": "Complete"}]} if job.preflight else {}),
        "template": {
            "metadata": {"annotations": {_EXCLUSIVE: "cloud.google.com/gke-nodepool"}},
            "spec": {
                "parallelism": tpu.hosts,
                "completions": tpu.hosts,
                "completionMode": "Indexed",
                "backoffLimit": 0,
                "podReplacementPolicy": "Failed",
                "podFailurePolicy": {"rules": _training_policy()},
                "template": {"metadata": {"annotations": _annotations()}, "spec": pod},
            },
        },
    }


def _training_policy() -> list[Manifest]:
    """Failures of a pod that mean more than "start again": see `_failure_policy`, which reads them from the job."""
    return [
        {"action": "FailJob", "onExitCodes": _exit_codes(BAD_INPUT)},
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": _exit_codes(STOPPED)},
    ]


def _exit_codes(*codes: int, container: str = CONTAINER) -> Manifest:
    return {"containerName": container, "operator": "In", "values": list(codes)}


def _preflight(job: Job) -> Manifest:
    """One pod without a TPU. The slices depend on it: they are not asked for before it is complete."""
    container = {
        "name": PREFLIGHT,
        "image": job.image,
        "command": job.preflight_command,
        "env": _variables(environment(job.tpu, job.num_slices, platforms="cpu")),
        "resources": {"requests": {"cpu": "4", "memory": "32Gi"}},
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [_mount()],
    }
    return {
        "name": PREFLIGHT,
        "replicas": 1,
        "template": {
            "spec": {
                "parallelism": 1,
                "completions": 1,
                "completionMode": "Indexed",
                "backoffLimit": 2,
                "podReplacementPolicy": "Failed",
                "podFailurePolicy": {
                    "rules": [
                        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                        # 1: it does not fit, 2: bad input.
                        {"action": "FailJob", "onExitCodes": _exit_codes(1, BAD_INPUT, container=PREFLIGHT)},
                    ]
                },
                "template": {"metadata": {"annotations": _annotations()}, "spec": _pod(job, [container], user=USER)},
            },
        },
    }


def _pod(job: Job, containers: list[Manifest], *, user: int, host_network: bool = False) -> Manifest:
    """What all pods of a job share."""
    attributes = {
        "bucketName": job.bucket,
        "mountOptions": f"{storage.MOUNT_OPTIONS},uid={user},gid={user}",
        **({"hostNetworkPodKSA": "true"} if host_network else {}),
    }
    return {
        "restartPolicy": "Never",
        # Several slices talk over the network of the hosts, without a pod network between.
        **({"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"} if host_network else {}),
        **({"serviceAccountName": job.service_account} if job.service_account else {}),
        **({"priorityClassName": job.priority} if job.priority else {}),
        "containers": containers,
        "volumes": [{"name": _VOLUME, "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}],
    }


def _mount() -> Manifest:
    return {"name": _VOLUME, "mountPath": storage.MOUNT}


def _annotations() -> dict[str, str]:
    """For the sidecar that mounts the bucket; whole files pass through its disk, so it has no limits."""
    limits = {f"gke-gcsfuse/{kind}-limit": "0" for kind in ("cpu", "memory", "ephemeral-storage")}
    return {"gke-gcsfuse/volumes": "true", **limits}


def _variables(values: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in values.items()]
