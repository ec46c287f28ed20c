"""A job as a script for TPU VMs without Kubernetes: asks for a queued resource, waits for it, runs the image there."""

import shlex

from tpu.jobs import storage
from tpu.jobs.environment import environment
from tpu.jobs.job import Handle, Job

_SCRIPT = """\
#!/usr/bin/env bash
# {name}: {description}
set -euo pipefail

{create}

echo "{name}: waiting for TPUs"
while true; do
  state=$({describe} --format='value(state.state)')
  case "$state" in
    ACTIVE) break ;;
    FAILED | SUSPENDING | SUSPENDED) echo "error: {name} is $state; delete it and start again" >&2; exit 1 ;;
  esac
  sleep 30
done

# On every host: mount the bucket, start the container, and leave.
remote=$(cat <<'REMOTE'
{remote}
REMOTE
)
{ssh_all} --command="$remote"
echo "{name}: started; it goes on without this terminal"
"""


def longest_suffix(job: Job) -> str:
    """What is appended to the job's name for its longest-named TPU VM."""
    return f"-{job.num_slices - 1}" if job.num_slices > 1 else ""


def gcloud(job: Handle, verb: str, *flags: str) -> list[str]:
    """A command of gcloud about the job's queued resource."""
    return ["gcloud", "compute", "tpus", "queued-resources", verb, job.name, *job.flags("project", "zone"), *flags]


def script(job: Job) -> str:
    """A bash script that starts the job."""
    nodes = [f"--node-id={job.name}"]
    if job.num_slices > 1:
        nodes = [f"--node-count={job.num_slices}", f"--node-prefix={job.name}"]
    create = gcloud(
        job,
        "create",
        f"--accelerator-type={job.tpu.cloud_name}",
        f"--runtime-version={job.tpu.series.runtime_version}",
        *nodes,
        *(["--spot"] if job.spot else []),
        *(["--reserved"] if job.reservation else []),
    )
    return _SCRIPT.format(
        name=job.name,
        description=f"{job.num_slices} x {job.tpu.describe()}",
        create=shlex.join(create),
        describe=shlex.join(gcloud(job, "describe")),
        remote="\n".join(_on_every_host(job)),
        ssh_all=shlex.join(gcloud(job, "ssh", "--node=all", "--worker=all")),
    )


def _on_every_host(job: Job) -> list[str]:
    """Lines of a shell script."""
    mount, registry = storage.MOUNT, job.image.split("/")[0]
    caches = "--metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0"
    run = [
        *("docker", "run", "--detach", f"--name={job.name}", "--privileged", "--user=0", "--network=host"),
        *(f"--stop-timeout={job.grace_seconds}", f"--volume={mount}:{mount}"),
        *(f"--env={name}={value}" for name, value in environment(job.tpu, job.num_slices).items()),
        *(job.image, *job.training_command(restarts=job.max_restarts)),
    ]
    return [
        "set -e",
        "command -v gcsfuse >/dev/null || { echo 'error: gcsfuse is not installed on this host' >&2; exit 2; }",
        f"sudo mkdir -p {mount}",
        f"mountpoint -q {mount} || sudo gcsfuse -o allow_other --implicit-dirs {caches} {job.bucket} {mount}",
        *([f"sudo gcloud auth configure-docker --quiet {registry}"] if registry.endswith("-docker.pkg.dev") else []),
        f"sudo docker rm --force {job.name} >/dev/null 2>&1 || true",
        f"sudo {shlex.join(run)}",
    ]
