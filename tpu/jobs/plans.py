"""Whether a job fits its slices: by a plan that was made before, or by making one."""

import fnmatch
import json
import os
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments.common import cli
from omnihuman_jax.errors import UserError
from omnihuman_jax.stores import AnyPath
from omnihuman_jax.training.run_config import flatten
from tpu import plan
from tpu.jobs.environment import compiler_flags
from tpu.jobs.tpu_types import TpuType
from tpu.topologies import GIB, get_topology

# Keys that do not change the compiled step or its memory: what is read, logged and kept, and numbers in the program.
# Stages are compared by the steps that they run.
_IRRELEVANT = (
    *("seed", "simulated_devices", "compilation_cache", "log_every", "allow_inverted_ratios", "ema_decay", "plan.*"),
    *("vae.*", "data.*", "stages.*", "stage_order", "checkpoint.*", "faults.*", "evaluation.*", "profile.*"),
    *("sample.*", "guidance.*", "diffusion.*"),
    *(f"optimizer.{key}" for key in ("b1", "b2", "eps", "weight_decay", "reset_at_stage")),
)

Plan = dict[str, Any]


def make(config: ConfigDict, tpu: TpuType, num_slices: int, log: Callable[[str], None]) -> Plan:
    """Compiles the steps of a config with the job's compiler flags, for minutes; UserError if sizes do not divide."""
    # Programs for another machine cannot be read back from the cache, so writing them is waste.
    jax.config.update("jax_enable_compilation_cache", False)
    os.environ.setdefault("LIBTPU_INIT_ARGS", compiler_flags(tpu, num_slices))  # read when libtpu is loaded
    return plan.plan(config, get_topology(tpu.topology, num_slices), log)


def read(path: AnyPath) -> Plan:
    """A plan that `tpu.plan --output` wrote; UserError if it cannot be read, or is none."""
    try:
        report = json.loads(path.read_text())
        whole = {"topology", "num_slices", "config", "steps", "fits"} <= report.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--plan={path}: cannot be read ({error}); make one with tpu.plan --output={path}") from error
    if not whole:
        raise UserError(f"--plan={path}: not written by this tpu.plan; make it again with --output={path}")
    return report


def difference(report: Plan, config: ConfigDict, tpu: TpuType, num_slices: int) -> str:
    """In what a plan is not one of this job; "" where it is."""
    there = f"{report['num_slices']} x {report['topology']}"
    if there != (here := f"{num_slices} x {tpu.topology}"):
        return f"it is of {there}, the job of {here}"
    before, after = flatten(report["config"]), flatten(cli.to_plain(config))
    for key in sorted(before | after):
        relevant = not any(fnmatch.fnmatchcase(key, pattern) for pattern in _IRRELEVANT)
        if relevant and before.get(key) != after.get(key):
            return f"it has {key}={before.get(key)}, the job {after.get(key)}"
    planned: dict[str, list[plan.Bucket]] = {}
    for step in report["steps"]:
        planned.setdefault(step["stage"], []).append(tuple(step["bucket"]))
    if planned != (wanted := plan.stage_buckets(config)):
        return f"it has the steps {planned}, the job {wanted}"
    return ""


def what_does_not_fit(report: Plan) -> str:
    """The steps of a plan that do not fit, in a few words; "" where all do."""
    if report["fits"]:
        return ""
    steps = [step for step in report["steps"] if not step["fits"] and step["same_as"] == step["stage"]]
    told = (
        f"{step['stage']} {'x'.join(map(str, step['bucket']))}: "
        f"{'?' if step['hbm_needed'] is None else format(step['hbm_needed'] / GIB, '.1f')} of "
        f"{step['hbm_available'] / GIB:.1f} GiB a chip"
        for step in steps
    )
    return f"does not fit {report['num_slices']} x {report['topology']} ({'; '.join(told)})"
