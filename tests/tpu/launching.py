"""`tpu.launch` with flags as on a command line, within the process of a test."""

import dataclasses
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from experiments.common import cli
from tpu import launch
from tpu.jobs.job import Job
from tpu.jobs.tpu_types import get_tpu_type

PRESET = str(Path(__file__).parents[2] / "experiments/configs/omni_2b.py")
# Enough for a job on one slice of v5p.
USUAL = {
    "config": PRESET,
    "tpu_type": "v5p-128",
    "image": "us-docker.pkg.dev/project/images/omnihuman:1",
    "workdir": "gs://bucket/runs/omni",
    "config.data.dir": "gs://bucket/data",
}


def run(**changed: object) -> int:
    """The exit status of tpu.launch with the usual flags changed; None leaves one out, `_` in config keys is two."""
    given = USUAL | {name.replace("__", "."): value for name, value in changed.items()}
    arguments = ["launch", *(f"--{name}={value}" for name, value in given.items() if value is not None)]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=arguments)
    launch.define_job_flags(values)
    values(arguments)
    return launch.launch(values)


def make_job(tpu_type: str = "v5p-128", num_slices: int = 1, **changes: object) -> Job:
    """A job of the 2B preset."""
    job = Job(
        name="omni",
        tpu=get_tpu_type(tpu_type),
        num_slices=num_slices,
        image="images/omnihuman:1",
        config="experiments/configs/omni_2b.py",
        overrides=("--config.data.dir=gs://bucket/data",),
        bucket="bucket",
        workdir="gs://bucket/runs/omni",
    )
    return dataclasses.replace(job, **changes)


def make_plan(preset: str = PRESET, **changes: object) -> dict:
    """What `tpu.plan` writes of the usual job, as far as launching reads it."""
    step = {"stage": "stage1", "same_as": "stage1", "bucket": [21, 60, 104], "fits": True}
    step |= {"hbm_needed": 60 * 2**30, "hbm_available": 95 * 2**30}
    steps = [{**step, "stage": stage} for stage in ("stage1", "stage2", "stage3")]
    config = cli.to_plain(cli.load_preset(preset))
    return {"topology": "v5p:4x4x4", "num_slices": 1, "config": config, "steps": steps, "fits": True} | changes
