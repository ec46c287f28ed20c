"""What a job is, before it is written down for any of the ways to start it."""

import dataclasses
import re

from omnihuman_jax.errors import UserError
from tpu.jobs.tpu_types import TpuType

CONTAINER = "train"  # and the replicated job of a JobSet
SUPERVISOR = "tpu/jobs/supervise.py"  # run by its path: importing the package tpu would switch the TPU off
# Exit statuses of the trainer (docs/running.md) and of the supervisor.
BAD_INPUT, STALLED, STOPPED = 2, 3, 143

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")  # RFC 1123
_LABEL_THAT_STARTS_WITH_A_LETTER = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # RFC 1035: services, Cloud resources
_LONGEST_LABEL = 63


@dataclasses.dataclass(frozen=True, kw_only=True)
class Handle:
    """What finds a job again; the flags of `tpu.launch` describe the fields."""

    name: str
    namespace: str = "default"
    project: str = ""
    zone: str = ""
    cluster: str = ""

    def flags(self, *names: str) -> list[str]:
        """--NAME=VALUE of those of these fields that are not empty."""
        return [f"--{name}={value}" for name in names if (value := getattr(self, name))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(Handle):
    """One run on TPUs; the flags of `tpu.launch` describe the other fields. Empty ones leave the default.

    Attributes:
      image: container image with this repository in its working directory.
      config: preset, as a path in the image.
      overrides: "--config.KEY=VALUE" flags and others for the trainer, with paths as the job sees them.
      bucket: mounted at /gcs.
      workdir: run directory, in a bucket or below /gcs.
      max_restarts: failures after which it is given up; preemptions are not counted where the format can tell.
    """

    tpu: TpuType
    num_slices: int
    image: str
    config: str
    overrides: tuple[str, ...]
    bucket: str
    workdir: str
    service_account: str = ""
    queue: str = ""
    priority: str = ""
    spot: bool = False
    reservation: str = ""
    max_restarts: int = 10
    save_seconds: int = 120
    keep_seconds: int = 7 * 24 * 3600
    preflight: bool = True
    force: bool = False

    @property
    def processes(self) -> int:
        """Processes of the run, one a host."""
        return self.tpu.hosts * self.num_slices

    @property
    def grace_seconds(self) -> int:
        """From SIGTERM to SIGKILL: the step that runs, the save that may be under way, and the last one."""
        return 60 + 2 * self.save_seconds

    @property
    def training_flags(self) -> list[str]:
        """Flags of `experiments.train`."""
        flags = [f"--config={self.config}", *self.overrides]
        if not any(flag.startswith("--config.compilation_cache=") for flag in flags):
            # Beside the runs: those of a sweep compile the same program, and so does every restart.
            flags.append(f"--config.compilation_cache=gs://{self.bucket}/cache/jax")
        return [*flags, f"--workdir={self.workdir}", *(["--multi_host"] if self.processes > 1 else [])]

    def training_command(self, restarts: int = 0) -> list[str]:
        """What every host runs; `restarts`: how often its supervisor starts a failed run again if nothing else does."""
        own = [f"--restarts={restarts}"] if restarts else []
        return ["python", SUPERVISOR, *own, "--", "python", "-m", "experiments.train", *self.training_flags]

    @property
    def preflight_command(self) -> list[str]:
        """What checks data and plan on CPUs."""
        flags = [flag for flag in self.training_flags if flag != "--multi_host"]
        flags += [f"--topology={self.tpu.topology}", f"--num_slices={self.num_slices}"]
        return ["python", "-m", "tpu.jobs.preflight", *flags, *(["--force"] if self.force else [])]


def check_job(job: Job, longest_suffix: str) -> None:
    """Raises UserError for what a cluster would refuse, or worse, accept: a wrong name, no image, a negative number.

    `longest_suffix` is what the format appends to the name of the job for its longest-named pod or machine.
    """
    if not _LABEL_THAT_STARTS_WITH_A_LETTER.fullmatch(job.name):
        raise UserError(
            f"--name={job.name}: Kubernetes takes lower-case letters, digits and '-', a letter first and no '-' last"
        )
    longest = _LONGEST_LABEL - len(longest_suffix)
    if len(job.name) > longest:
        raise UserError(
            f"--name={job.name}: {len(job.name)} characters, but with {longest_suffix!r} behind it only {longest} fit "
            f"into the {_LONGEST_LABEL} of a name; shorten it"
        )
    for flag in ("namespace", "service_account", "queue", "priority", "reservation"):
        value = getattr(job, flag)
        if value and (len(value) > _LONGEST_LABEL or not all(_LABEL.fullmatch(part) for part in value.split("."))):
            raise UserError(f"--{flag}={value}: Kubernetes takes lower-case letters, digits and '-' in a name")
    if not re.fullmatch(r"[\w.:/@-]+", job.image):
        raise UserError(
            f"--image={job.image}: give the image to run, as REGION-docker.pkg.dev/PROJECT/REPO/omnihuman:TAG"
        )
    for flag, least in (("num_slices", 1), ("max_restarts", 0), ("save_seconds", 1), ("keep_seconds", 0)):
        if getattr(job, flag) < least:
            raise UserError(f"--{flag}={getattr(job, flag)}: must be at least {least}")
