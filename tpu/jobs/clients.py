"""Starting, watching and stopping jobs: the commands of kubectl, xpk and gcloud, and running them."""

import shlex
import shutil
import subprocess
from collections.abc import Callable
from typing import NamedTuple

from omnihuman_jax.errors import UserError
from tpu.jobs import jobset, queued_resource, xpk
from tpu.jobs.job import CONTAINER, Handle, Job

FORMATS = ("jobset", "xpk", "queued-resource")
ACTIONS = ("status", "logs", "stop")  # on jobs that were started
_INSTALL = {
    "kubectl": "install it with `gcloud components install kubectl`",
    "xpk": "install it with `pip install xpk`",
    "gcloud": "install the Google Cloud CLI",
    "bash": "install it",
}


class Command(NamedTuple):
    """A program with its arguments, and what it reads from its standard input."""

    argv: list[str]
    stdin: str = ""

    def describe(self) -> str:
        """What --dry_run prints: the document that would be submitted, or the command."""
        return self.stdin or shlex.join(self.argv) + "\n"


def longest_suffix(job: Job, form: str) -> str:
    """What a format appends to the job's name."""
    return {"jobset": jobset, "xpk": xpk, "queued-resource": queued_resource}[form].longest_suffix(job)


def start(jobs: list[Job], form: str) -> list[Command]:
    """What starts jobs."""
    if form == "jobset":
        return [Command(["kubectl", "apply", "-f", "-"], jobset.render(jobs))]
    if form == "xpk":
        return [Command(xpk.create_command(job)) for job in jobs]
    return [Command(["bash", "-s"], queued_resource.script(job)) for job in jobs]


def commands(job: Handle, form: str, action: str) -> list[Command]:
    """What shows or stops a job that was started."""
    table: dict[tuple[str, str], Callable[[Handle], list[Command]]] = {
        ("jobset", "status"): lambda job: [
            _kubectl(job, "get", "jobset", job.name, "--output=wide"),
            _kubectl(job, "get", "pods", f"--selector=jobset.sigs.k8s.io/jobset-name={job.name}", "--output=wide"),
        ],
        ("jobset", "logs"): lambda job: [_kubectl_logs(job, CONTAINER)],
        ("jobset", "stop"): lambda job: [_kubectl(job, "delete", "jobset", job.name)],
        ("xpk", "status"): lambda job: [_xpk(job, "list", f"--filter-by-job={job.name}")],
        ("xpk", "logs"): lambda job: [_kubectl_logs(job, "slice-job")],
        ("xpk", "stop"): lambda job: [_xpk(job, "delete", f"--workload={job.name}")],
        ("queued-resource", "status"): lambda job: [Command(queued_resource.gcloud(job, "describe"))],
        ("queued-resource", "logs"): lambda job: [_on_hosts(job, "0", f"sudo docker logs --follow {job.name}")],
        ("queued-resource", "stop"): lambda job: [
            _on_hosts(job, "all", f"sudo docker stop {job.name}"),
            Command(queued_resource.gcloud(job, "delete", "--force", "--quiet")),
        ],
    }
    return table[form, action](job)


def run(wanted: list[Command]) -> int:
    """Runs commands up to the first that fails; returns its exit status, or 0. UserError if one is not installed."""
    for program in {command.argv[0]: None for command in wanted}:
        if shutil.which(program) is None:
            raise UserError(f"{program} is not on PATH; {_INSTALL[program]}, or use --dry_run")
    for command in wanted:
        status = subprocess.run(command.argv, input=command.stdin or None, text=True, check=False).returncode
        if status:
            return status
    return 0


def _kubectl(job: Handle, *arguments: str) -> Command:
    return Command(["kubectl", *arguments, f"--namespace={job.namespace}"])


def _kubectl_logs(job: Handle, replicated_job: str) -> Command:
    """Process 0 writes the log of the run."""
    labels = {
        "jobset.sigs.k8s.io/jobset-name": job.name,
        "jobset.sigs.k8s.io/replicatedjob-name": replicated_job,
        "jobset.sigs.k8s.io/job-index": "0",
        "batch.kubernetes.io/job-completion-index": "0",
    }
    selector = ",".join(f"{name}={value}" for name, value in labels.items())
    return _kubectl(job, "logs", "--follow", "--tail=-1", f"--container={CONTAINER}", f"--selector={selector}")


def _xpk(job: Handle, verb: str, *flags: str) -> Command:
    return Command(["xpk", "workload", verb, *xpk.place(job), *flags])


def _on_hosts(job: Handle, which: str, command: str) -> Command:
    return Command(queued_resource.gcloud(job, "ssh", f"--node={which}", f"--worker={which}", f"--command={command}"))
