"""Compiles every stage's train step for a TPU topology without a TPU; reports whether it fits, HBM, FLOPs, step time.

python -m tpu.plan --config=experiments/configs/omni_2b.py --topology=v5p:4x4x4 [--num_slices=2] [--output=plan.json]

It compiles the step of training (`omnihuman_jax.training.step.jit_train_step`) with the preset's mesh over the
topology's devices, for every (T, H, W) of `config.plan.buckets`. Exit status: 0 all fit, 1 one does not, 2 bad input.
"""

import dataclasses
import importlib.metadata
import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments.common import cli, files
from omnihuman_jax import batch as batch_lib
from omnihuman_jax.checkpoints.manager import COPY_SIZE
from omnihuman_jax.errors import UserError
from omnihuman_jax.models.dit import flops as flops_lib
from omnihuman_jax.models.functional import Network, make_network
from omnihuman_jax.sharding import mesh as mesh_lib
from omnihuman_jax.training import config_ranges
from omnihuman_jax.training.stages import curriculum
from omnihuman_jax.training.state import abstract_state
from omnihuman_jax.training.step import jit_train_step
from omnihuman_jax.training.step_settings import StepSettings
from tpu import hlo
from tpu.topologies import GIB, Topology, get_topology

MFU_ASSUMPTIONS = (0.3, 0.4, 0.5)

Bucket = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The compiler's result for one train step on one bucket. Memory in bytes per chip, times in seconds.

    Attributes:
      bucket: latent (T, H, W) of the noisy window.
      hbm_needed: arguments + temporaries + outputs - donated; None if the compiler does not report it.
      memory: the parts of hbm_needed; the program; and the copy of the state, the maximum that
        checkpoint.copy_on_device needs in addition during a save (without room for it, training waits instead).
      model_flops: forward and backward pass of the global batch, counted analytically, without recomputation.
      seconds_at_mfu: step time at an assumed share of the chip's peak.
      error: the compiler's message if it does not fit.
      compiler_seconds: estimated by the TPU compiler, without Pallas kernels and collectives; never measured.
      pallas_calls, collectives: per step.
      unknown_loops: loops of unknown length, which compiler_seconds counts once.
    """

    bucket: Bucket
    fits: bool
    hbm_needed: int | None
    hbm_available: int
    memory: dict[str, int]
    model_flops: float
    flops_per_chip: float
    seconds_at_mfu: dict[str, float]
    compile_seconds: float
    error: str = ""
    compiler_seconds: float | None = None
    pallas_calls: float = 0
    collectives: float = 0
    unknown_loops: int = 0


def stage_buckets(config: ConfigDict) -> dict[str, list[Bucket]]:
    """Stage name -> latent (T, H, W) of its steps: `plan.buckets`, with the stage's own T if it has one.

    Raises UserError if there are no buckets, or one is not divisible by the patch size.
    """
    buckets = [tuple(int(size) for size in bucket) for bucket in config.plan.buckets]
    if not buckets:
        raise UserError("plan.buckets is empty; give latent sizes as ((T, H, W),)")
    patch = tuple(config.model.patch_size)
    table = {}
    for stage in curriculum(config):
        own = config.stages[stage.name].latent_frames
        sizes = [(own or t or config.data.latent_frames, h, w) for t, h, w in buckets]
        for size in sizes:
            if any(n < 1 or n % p for n, p in zip(size, patch, strict=True)):
                raise UserError(f"plan.buckets: {size} is not divisible by model.patch_size {patch}; change the bucket")
        table[stage.name] = list(dict.fromkeys(sizes))
    return table


def plan(config: ConfigDict, topology: Topology, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Compiles each distinct step of a resolved config for `topology`; returns the report as plain JSON types.

    Raises UserError if mesh or batch do not divide over the devices, or stages or buckets are wrong.
    """
    table = stage_buckets(config)
    mesh = mesh_lib.training_mesh(config, topology.devices, num_slices=topology.num_slices)
    network = make_network(config)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(network.abstract_params))
    header = _header(config, topology, mesh, parameters)
    log(_describe_header(header))
    plans: dict[Bucket, StepPlan] = {}
    first_stage: dict[Bucket, str] = {}
    rows = []
    for stage, buckets in table.items():
        for bucket in buckets:
            if bucket in plans:
                log(f"{stage} {_size(bucket)}: same step as {first_stage[bucket]}")
            else:
                first_stage[bucket] = stage
                plans[bucket] = compile_step(config, network, mesh, bucket, topology)
                log(f"{stage} {_describe(config, plans[bucket], topology)}")
            rows.append({"stage": stage, "same_as": first_stage[bucket], **dataclasses.asdict(plans[bucket])})
    fits = all(step.fits for step in plans.values())
    log("plan: every step fits" if fits else "plan: does NOT fit")
    return {**header, "fits": fits, "steps": rows}


def compile_step(config: ConfigDict, network: Network, mesh: Mesh, bucket: Bucket, topology: Topology) -> StepPlan:
    """Lowers and compiles the train step for one bucket; exceeding the HBM is a result, not an exception."""
    devices_per_chip = topology.generation.devices_per_chip
    flops = flops_lib.train_step_flops(network.config, config.global_batch_size, bucket)
    per_chip = flops / topology.chips
    fixed = {
        "bucket": bucket,
        "hbm_available": int(topology.generation.hbm_gib * GIB) * devices_per_chip,
        "model_flops": flops,
        "flops_per_chip": per_chip,
        "seconds_at_mfu": {f"{mfu:.0%}": per_chip / topology.generation.peak_flops / mfu for mfu in MFU_ASSUMPTIONS},
    }
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        state, batch = abstract_state(config, mesh, network), batch_lib.abstract(config, mesh, bucket)
        lowered = jit_train_step(config, network, mesh).lower(state, batch, StepSettings.abstract(mesh))
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return _too_large(fixed, str(error), devices_per_chip, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    stats, cost = compiled.memory_analysis(), hlo.estimate(compiled.as_text())
    memory = {
        "arguments": stats.argument_size_in_bytes * devices_per_chip,
        "temporaries": stats.temp_size_in_bytes * devices_per_chip,
        "outputs": stats.output_size_in_bytes * devices_per_chip,
        "donated": stats.alias_size_in_bytes * devices_per_chip,
        "copy": int(COPY_SIZE * stats.alias_size_in_bytes) * devices_per_chip,  # the state is what is donated
        "program": stats.generated_code_size_in_bytes * devices_per_chip,
    }
    needed = memory["arguments"] + memory["temporaries"] + memory["outputs"] - memory["donated"]
    return StepPlan(
        **fixed,
        fits=needed <= fixed["hbm_available"],
        hbm_needed=needed,
        memory=memory,
        compiler_seconds=cost.cycles / topology.generation.clock_hz,
        pallas_calls=cost.kernels,
        collectives=cost.collectives,
        unknown_loops=cost.unknown_loops,
        compile_seconds=seconds,
    )


def _too_large(fixed: dict[str, Any], message: str, devices_per_chip: int, seconds: float) -> StepPlan:
    """The result if the compiler runs out of memory: its message, and the needed memory if that names it."""
    words = " ".join(message.split())
    named = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm|\(([\d.]+)([KMGT])\) exceeds available HBM", words)
    needed = None
    if named:
        number, unit = (part for part in named.groups() if part)
        needed = int(float(number) * 1024 ** (1 + "KMGT".index(unit))) * devices_per_chip
    return StepPlan(**fixed, fits=False, hbm_needed=needed, memory={}, error=words[:400], compile_seconds=seconds)


def _header(config: ConfigDict, topology: Topology, mesh: Mesh, parameters: int) -> dict[str, Any]:
    generation = topology.generation
    return {
        "topology": topology.name,
        "num_slices": topology.num_slices,
        "chips": topology.chips,
        "devices": len(topology.devices),
        "hbm_per_chip_gib": generation.hbm_gib * generation.devices_per_chip,
        "peak_bf16_flops_per_chip": generation.peak_flops,
        "clock_hz": generation.clock_hz,
        "mesh": dict(mesh.shape),
        "global_batch_size": config.global_batch_size,
        "parameters": parameters,
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
        "config": cli.to_plain(config),
    }


def _describe_header(header: dict[str, Any]) -> str:
    slices = f" x {header['num_slices']} slices" if header["num_slices"] > 1 else ""
    mesh = " x ".join(f"{name} {size}" for name, size in header["mesh"].items())
    return (
        f"plan: {header['topology']}{slices}: {header['chips']} chips, {header['hbm_per_chip_gib']:.1f} GiB HBM each "
        f"for the program, {header['peak_bf16_flops_per_chip'] / 1e12:.0f} TFLOP/s bfloat16\n"
        f"      mesh {mesh}; global batch {header['global_batch_size']}; {header['parameters'] / 1e9:.3f}B parameters; "
        f"JAX {header['jax']}, libtpu {header['libtpu']}"
    )


def _size(bucket: Bucket) -> str:
    return "x".join(str(size) for size in bucket)


def _describe(config: ConfigDict, step: StepPlan, topology: Topology) -> str:
    """Lines for the terminal, which call every time an assumption or an estimate."""
    tokens = math.prod(step.bucket) // math.prod(config.model.patch_size)
    need = "?" if step.hbm_needed is None else f"{step.hbm_needed / GIB:.2f}"
    lines = [
        f"{_size(step.bucket)} ({tokens} video tokens a sample): {'fits' if step.fits else 'does NOT fit'}, "
        f"{need} of {step.hbm_available / GIB:.1f} GiB HBM per chip"
    ]
    if step.memory:
        parts = (f"{name} {size / GIB:.2f}" for name, size in step.memory.items() if name != "copy")
        lines.append("GiB per chip: " + ", ".join(parts) + " (needed = arguments + temporaries + outputs - donated)")
        if config.checkpoint.copy_on_device:
            room = step.hbm_needed + step.memory["copy"] <= step.hbm_available
            lines.append(
                f"a save's copy of the state, at most {step.memory['copy'] / GIB:.2f} GiB: "
                + ("fits too" if room else "does not fit too, so training waits while a save reads the state")
            )
    else:
        lines.append(f"compiler: {step.error}")
    lines.append(f"model FLOPs {step.model_flops:.3e} a step, {step.flops_per_chip:.3e} per chip")
    assumed = ", ".join(f"{seconds:.3g} s at {mfu}" for mfu, seconds in step.seconds_at_mfu.items())
    lines.append(f"step time assumed: {assumed} of the chip's peak")
    if step.compiler_seconds is not None:
        unknown = f", {step.unknown_loops} loops of unknown length counted once" if step.unknown_loops else ""
        lines.append(
            f"step time estimated by the TPU compiler: {step.compiler_seconds:.3g} s, without {step.pallas_calls:.0f} "
            f"Pallas calls and {step.collectives:.0f} collectives{unknown}, at "
            f"{topology.generation.clock_hz / 1e9:.2f} GHz"
        )
    lines.append(f"compiled in {step.compile_seconds:.0f} s on this machine")
    return "\n      ".join(lines)


def define_flags() -> None:
    """The command's flags."""
    cli.define_config_flag()
    flags.DEFINE_string("topology", None, "TPU topology, as v5p:4x4x4 or v5e:16x16.")
    flags.DEFINE_integer("num_slices", 1, "Number of slices; data parallelism spans the network between them.")
    flags.DEFINE_string("output", None, "JSON file for the report.")


def main(_: list[str]) -> int:
    """Runs the command; returns its exit status."""
    if flags.FLAGS.config is None:
        raise UserError("--config is missing; give a preset, as --config=experiments/configs/demo.py")
    config_ranges.check(flags.FLAGS.config)
    if not flags.FLAGS.topology:
        raise UserError("--topology is missing; give one, as --topology=v5p:2x2x2")
    output = Path(flags.FLAGS.output) if flags.FLAGS.output else None
    if output and not output.absolute().parent.is_dir():
        raise UserError(f"--output={output}: {output.absolute().parent} is not a directory; create it first")
    # Programs for another machine cannot be read back from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    report = plan(flags.FLAGS.config, get_topology(flags.FLAGS.topology, flags.FLAGS.num_slices))
    if output:
        files.write_whole(output, json.dumps(report, indent=2) + "\n")
    return 0 if report["fits"] else 1


if __name__ == "__main__":
    define_flags()
    cli.run_main(main, in_stores=None)  # nothing that the config names is read
