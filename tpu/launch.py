"""Starts a training run on TPU slices, watches it and stops it; --dry_run prints what would be submitted.

python -m tpu.launch --config=experiments/configs/omni_2b.py --tpu_type=v5p-128 --image=IMAGE \\
    --workdir=gs://BUCKET/runs/omni --config.data.dir=gs://BUCKET/data [--config.KEY=VALUE …] [--num_slices=N] \\
    [--format=jobset|xpk|queued-resource] [--plan=FILE.json] [--sweep=GRID.json] [--dry_run]
python -m tpu.launch --name=NAME --action=status|logs|stop [--sweep=GRID.json]
python -m tpu.launch --name=NAME --action=collect --sweep=GRID.json --workdir=DIR [--output=FILE.csv|FILE.md]

Exit status: 0 done, 1 it does not fit, 2 bad input, else that of kubectl, xpk or gcloud. The guide is tpu/README.md.
"""

import dataclasses
import functools
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from experiments.common import cli
from omnihuman_jax import command
from omnihuman_jax.errors import UserError
from omnihuman_jax.sharding.mesh import resolve_shape
from tpu.jobs import clients, configs, plans, storage, sweep
from tpu.jobs.job import Handle, Job, check_job
from tpu.jobs.tpu_types import get_tpu_type

_EXAMPLES = {"config": "experiments/configs/omni_2b.py", "tpu_type": "v5p-128", "workdir": "gs://BUCKET/RUN"}


def define_flags() -> None:
    """Defined when run as a program only, so that importing this module takes no flag names."""
    cli.define_config_flag()
    define_job_flags(flags.FLAGS)


def define_job_flags(values: flags.FlagValues) -> None:
    """Defines all flags but --config."""
    text, number, switch = (
        functools.partial(define, flag_values=values)
        for define in (flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_bool)
    )
    default = {field.name: field.default for field in dataclasses.fields(Job)}
    actions = ["start", *clients.ACTIONS, "collect"]
    flags.DEFINE_enum("action", "start", actions, "What to do with the job, or with all of a sweep.", values)
    flags.DEFINE_enum("format", "jobset", clients.FORMATS, "How it is started: by kubectl, xpk or gcloud.", values)
    switch("dry_run", False, "Print the manifest, command or script instead of running it.")
    text("name", "", "Name of the job; default: the preset's.")
    text("tpu_type", None, "Slice, as v5p-128, v5litepod-256, v6e-256, tpu7x-128, or v5p:4x4x4.")
    number("num_slices", 1, "Slices of that type.")
    text("image", "", "Container image, built from the Dockerfile of this repository.")
    text("workdir", "", "Run directory, gs://BUCKET/RUN; with a sweep, the folder of the runs.")
    text("bucket", "", "Bucket that is mounted at /gcs, for files; default: that of --workdir.")
    flags.DEFINE_list("replace_parameters_at", [], "As of experiments.train.", values)
    text("plan", "", "Report of `tpu.plan --output` for this job; default: plan now, for minutes.")
    switch("noplan", False, "Start without planning here; the preflight still plans.")
    switch("force", False, "Start although it does not fit.")
    switch("preflight", True, "Check data and plan in the cluster before slices are asked for (jobset).")
    text("sweep", "", 'JSON file: {"config.KEY": [values]} or a list of {"config.KEY": value}.')
    text("output", "", "File for --action=collect, .csv or .md; default: Markdown on stdout.")
    text("namespace", default["namespace"], "Namespace of Kubernetes.")
    text("service_account", "", "Service account of Kubernetes that may write to the bucket.")
    text("queue", "", "Local queue of Kueue.")
    text("priority", "", "Priority class.")
    switch("spot", False, "Use spot capacity.")
    text("reservation", "", "Use this reservation.")
    number("max_restarts", default["max_restarts"], "Failures after which the job is given up.")
    number("save_seconds", default["save_seconds"], "How long saving a checkpoint takes, at the most.")
    number("keep_seconds", default["keep_seconds"], "How long a finished job stays in the cluster.")
    text("project", "", "Project of Google Cloud; default: that of gcloud.")
    text("zone", "", "Zone of Google Cloud; default: that of gcloud.")
    text("cluster", "", "Cluster of GKE, for --format=xpk.")


def main(_: list[str]) -> int:
    """Runs the command; returns its exit status."""
    return launch(flags.FLAGS)


def launch(f: flags.FlagValues) -> int:
    """Does what parsed flags say; returns the exit status. Raises UserError if one of them is wrong."""
    rows = sweep.read_grid(Path(f.sweep)) if f.sweep else []
    name = f.name or (Path(f["config"].config_filename).stem.replace("_", "-") if f.config else "")
    if not name:
        raise UserError("--name is missing; give the job's, or its --config")
    names = [sweep.row_name(name, i) for i in range(len(rows))] or [name]
    if f.action == "collect":
        return _collect(f, name, rows)
    if f.action == "start":
        wanted = _start(f, names, rows)
        if wanted is None:
            return 1
    else:
        place = {key: getattr(f, key) for key in ("namespace", "project", "zone", "cluster")}
        wanted = [one for name in names for one in clients.commands(Handle(name=name, **place), f.format, f.action)]
    if f.dry_run:
        print("".join(one.describe() for one in wanted), end="")
        return 0
    return clients.run(wanted)


def _start(f: flags.FlagValues, names: list[str], rows: list[sweep.Row]) -> list[clients.Command] | None:
    """What starts the jobs; None where one does not fit."""
    jobs, resolved = _make_jobs(f, names, rows)
    for job in jobs:
        _say(f"{job.name}: {job.num_slices} x {job.tpu.describe()}")
    wrong = "" if f.noplan else _what_does_not_fit(f, jobs, resolved)
    if wrong and not f.force:
        _say(f"error: {wrong}; see tpu.plan, or give --force")
        return None
    if wrong:
        _say(f"{wrong}; started all the same (--force)")
    return clients.start(jobs, f.format)


def _make_jobs(f: flags.FlagValues, names: list[str], rows: list[sweep.Row]) -> tuple[list[Job], list[ConfigDict]]:
    """The jobs of the flags, checked, and their configs."""
    for flag, example in _EXAMPLES.items():
        if not getattr(f, flag):
            raise UserError(f"--{flag} is missing; give one, as --{flag}={example}")
    preset, tpu = f["config"].config_filename, get_tpu_type(f.tpu_type)
    own = configs.overrides(preset, f.config)
    bucket = storage.find_bucket(f.workdir, f.bucket)
    workdir = storage.workdir_in_job(f.workdir, bucket)
    lists = {name: f[name].value for name in ("replace_parameters_at", command.PLUGINS) if name in f}
    others = [f"--{name}={','.join(values)}" for name, values in lists.items() if values]
    fields = {field.name for field in dataclasses.fields(Job)} & set(f) - {"name", "config", "workdir", "bucket"}
    common = {"tpu": tpu, "bucket": bucket, "config": configs.preset_in_image(preset)}
    common |= {name: getattr(f, name) for name in fields}
    jobs, resolved = [], []
    for name, row in zip(names, rows or [{}], strict=True):
        flags_of = dict(change.split("=", 1) for change in [*own, *sweep.row_flags(row)])
        where = f"--sweep={f.sweep}: {name}: " if row else ""
        try:
            config = configs.resolve(preset, [f"{flag}={value}" for flag, value in flags_of.items()])
            storage.check_data_dir(config.data.dir, bucket)
            mounted = [f"{flag}={storage.in_job(flag, value, bucket)}" for flag, value in flags_of.items()]
            place = f"{workdir}/{name}" if row else workdir
            job = Job(**common, name=name, overrides=(*others, *mounted), workdir=place)
            _check(job, f.format)
            resolve_shape(config.mesh, tpu.devices * job.num_slices)
        except UserError as error:
            raise UserError(f"{where}{error}") from error
        jobs.append(job)
        resolved.append(config)
    return jobs, resolved


def _check(job: Job, form: str) -> None:
    check_job(job, clients.longest_suffix(job, form))
    if form == "queued-resource" and not job.tpu.series.runtime_version:
        raise UserError(f"--tpu_type={job.tpu.cloud_name}: to be had through GKE only; use --format=jobset or xpk")
    if form == "xpk" and not job.cluster:
        raise UserError("--cluster is missing; xpk needs the name of the GKE cluster")


def _what_does_not_fit(f: flags.FlagValues, jobs: list[Job], resolved: list[ConfigDict]) -> str:
    """What does not fit among the jobs, by --plan or by planning each that differs; "" where all do."""
    given = plans.read(Path(f.plan)) if f.plan else None
    made: list[plans.Plan] = [given] if given else []
    for job, config in zip(jobs, resolved, strict=True):
        place = (job.tpu, job.num_slices)
        fitting = next((report for report in made if not plans.difference(report, config, *place)), None)
        if fitting is None and given:
            words = plans.difference(given, config, *place)
            raise UserError(f"--plan={f.plan} is not of {job.name}: {words}; plan it again, or leave --plan out")
        if fitting is None:
            _say(f"{job.name}: planning; --plan=FILE.json takes a plan made before, --noplan leaves it out here")
            fitting = plans.make(config, *place, log=_say)
            made.append(fitting)
        if wrong := plans.what_does_not_fit(fitting):
            return f"{job.name} {wrong}"
    return ""


def _collect(f: flags.FlagValues, name: str, rows: list[sweep.Row]) -> int:
    if not rows or not f.workdir:
        raise UserError("--action=collect needs the --sweep and the --workdir that the jobs were started with")
    write = {"": sweep.to_markdown, ".md": sweep.to_markdown, ".csv": sweep.to_csv}.get(Path(f.output).suffix)
    if write is None:
        raise UserError(f"--output={f.output}: give a file that ends in .csv or .md")
    text = write(sweep.collect(f.workdir, name, rows))
    if not f.output:
        print(text, end="")
        return 0
    try:
        Path(f.output).write_text(text)
    except OSError as error:
        raise UserError(f"--output={f.output}: {error.strerror}; name a file you may write") from error
    return 0


def _say(line: str) -> None:
    """Everything but the manifest goes to stderr, so that --dry_run can be piped."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    define_flags()
    cli.run_main(main, in_stores=None)  # `storage` checks them
