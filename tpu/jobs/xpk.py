"""A job as a command of xpk, Google's tool for clusters of TPUs; xpk writes the JobSet."""

import shlex

from tpu.jobs.environment import environment
from tpu.jobs.job import CONTAINER, Handle, Job

# Every exit status but 0 and 2 (bad input); xpk adds 42 and 127-255 itself.
_RESTARTED = "1,3-126"


def longest_suffix(job: Job) -> str:
    """What xpk's JobSet appends to the job's name for its longest-named pod."""
    return f"-slice-job-{job.num_slices - 1}-{job.tpu.hosts - 1}-abcde"


def place(job: Handle) -> list[str]:
    """Flags that say where the job is."""
    return job.flags("cluster", "project", "zone", "namespace")


def create_command(job: Job) -> list[str]:
    """Starts the job. xpk has no preflight: data and plan are checked where this is run."""
    return [
        *("xpk", "workload", "create", f"--workload={job.name}", *place(job)),
        *(f"--tpu-type={job.tpu.series.prefix}-{job.tpu.layout}", f"--num-slices={job.num_slices}"),
        *(f"--docker-image={job.image}", f"--docker-name={CONTAINER}", f"--storage={job.bucket}"),
        *(f"--max-restarts={job.max_restarts}", f"--restart-on-exit-codes={_RESTARTED}"),
        f"--termination-grace-period-seconds={job.grace_seconds}",
        f"--ttl-seconds-after-finished={job.keep_seconds}",
        *job.flags("priority"),
        *(["--spot"] if job.spot else []),
        *job.flags("reservation"),
        *(f"--env={name}={value}" for name, value in environment(job.tpu, job.num_slices).items()),
        # xpk passes SIGTERM to its shell's child; exec makes that the supervisor.
        f"--command=exec {shlex.join(job.training_command())}",
    ]
