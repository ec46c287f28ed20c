"""Checks a job where it will run, on CPUs, before slices are asked for: the bucket, the data, and whether it fits.

python -m tpu.jobs.preflight --config=… --workdir=gs://BUCKET/RUN --topology=v5p:4x4x4 [--num_slices=N] [--force]

Exit status: 0 all is well, 1 it does not fit, 2 bad input. The plan is kept as WORKDIR/plan.json: when the job is
started again, only bucket and data are checked.
"""

import json
import sys

from absl import flags
from ml_collections import ConfigDict

from data_pipelines.input_pipeline.pipeline import InputPipeline
from data_pipelines.schema import Dataset, check_sizes
from experiments import train
from experiments.common import cli
from omnihuman_jax import stores
from omnihuman_jax.errors import UserError
from omnihuman_jax.stores import AnyPath
from omnihuman_jax.training import config_ranges
from omnihuman_jax.training.stages import curriculum
from tpu.jobs import plans
from tpu.jobs.tpu_types import TpuType, get_tpu_type


def check_workdir(workdir: AnyPath) -> None:
    """Raises UserError unless objects can be written there, or files made, renamed and removed, as checkpoints are."""
    if stores.is_remote(workdir):
        stores.check_writable("--workdir", workdir)
        return
    half, whole = workdir / ".preflight.tmp", workdir / ".preflight"
    try:
        half.mkdir(parents=True, exist_ok=True)
        (half / "file").write_text("written by tpu.jobs.preflight\n")
        half.rename(whole)
        (whole / "file").unlink()
        whole.rmdir()
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: {error.strerror}; the job's service account must be able to write to the bucket, "
            f"and the mounted bucket must have a hierarchical namespace, for folders to be renamed; give it as gs://"
        ) from error


def check_data(config: ConfigDict, workdir: AnyPath) -> int:
    """What `experiments.train` checks before it starts, raising UserError; returns the number of records."""
    if not config.data.dir:
        raise UserError("data.dir is empty; give --config.data.dir=gs://BUCKET/DATA")
    stages = curriculum(config)
    train.check_start(config, stages, workdir, flags.FLAGS.replace_parameters_at)
    dataset = Dataset.open(config.data.dir)
    check_sizes(dataset, config.model)
    cli.check_vae(config.vae.checkpoint, dataset.meta.vae_sha256)
    InputPipeline.from_config(config, stages, dataset)
    return len(dataset)


def get_plan(config: ConfigDict, tpu: TpuType, num_slices: int, path: AnyPath) -> plans.Plan:
    """The plan of the job at `path`, made now unless it is there."""
    if path.is_file():
        report = plans.read(path)
        if not plans.difference(report, config, tpu, num_slices):
            print(f"preflight: planned before, in {path}", flush=True)
            return report
    report = plans.make(config, tpu, num_slices, log=lambda line: print(line, flush=True))
    stores.write_whole(path, (json.dumps(report, indent=2) + "\n").encode())
    return report


def main(_: list[str]) -> int:
    """Runs the command; returns its exit status."""
    f = flags.FLAGS
    if f.config is None or not f.workdir or not f.topology:
        raise UserError("--config, --workdir and --topology are needed; tpu.launch gives them")
    config_ranges.check(f.config)
    workdir = stores.get_path(f.workdir)
    check_workdir(workdir)
    print(f"preflight: {check_data(f.config, workdir)} records in {f.config.data.dir}", flush=True)
    wrong = plans.what_does_not_fit(get_plan(f.config, get_tpu_type(f.topology), f.num_slices, workdir / "plan.json"))
    if wrong and not f.force:
        print(f"error: {wrong}; see tpu.plan, or launch with --force", file=sys.stderr)
        return 1
    print(f"preflight: {wrong or 'every step fits'}", flush=True)
    return 0


if __name__ == "__main__":
    train.define_flags()
    flags.DEFINE_string("topology", None, "TPU topology, as v5p:4x4x4.")
    flags.DEFINE_integer("num_slices", 1, "Slices of that topology.")
    flags.DEFINE_bool("force", False, "Exit status 0 also where a step does not fit.")
    cli.run_main(main, train.IN_STORES)
