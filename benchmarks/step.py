"""Measures step time, tokens per second and peak memory of the train step on random data.

python -m benchmarks.step --config=experiments/configs/demo.py [--steps=10] [--output=FILE.json]
"""

import math
import resource
import statistics
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from benchmarks import side_by_side
from experiments.common import cli
from omnihuman_jax import batch as batch_lib
from omnihuman_jax.errors import UserError
from omnihuman_jax.models.functional import make_network
from omnihuman_jax.sharding import mesh as mesh_lib
from omnihuman_jax.sharding import rules
from omnihuman_jax.training.state import init_state
from omnihuman_jax.training.step import jit_train_step
from omnihuman_jax.training.step_settings import StepSettings


def define_flags() -> None:
    """The command's flags."""
    cli.define_config_flag()
    flags.DEFINE_integer("steps", 10, "Timed steps, after compilation and one step to warm up.", lower_bound=1)
    flags.DEFINE_string("output", None, "JSON file for the results.")


def random_batch(config: ConfigDict, bucket: tuple[int, int, int], seed: int = 0) -> dict[str, np.ndarray]:
    """A global training batch for a bucket (T, H, W) with every condition active."""
    rng = np.random.default_rng(seed)
    batch = {}
    for name, (row, dtype) in batch_lib.fields(config.model, bucket).items():
        shape = (config.global_batch_size, *row)
        values = np.ones(shape) if dtype == np.bool_ else rng.uniform(-1, 1, shape)
        batch[name] = values.astype(dtype)
    return batch


def time_steps(config: ConfigDict, bucket: tuple[int, int, int], steps: int) -> dict[str, Any]:
    """Runs the train step `steps` times; times in seconds, memory in bytes.

    Returns:
      `compile_seconds`, `step_seconds` (median), `step_seconds_range`, `tokens_per_second` (noisy visual tokens),
      `peak_memory_bytes` and `peak_memory_of` ("process" on CPU, "device" elsewhere).
    """
    mesh = mesh_lib.training_mesh(config)
    network = make_network(config)
    tokens = config.global_batch_size * math.prod(bucket) // math.prod(config.model.patch_size)
    with jax.set_mesh(mesh):
        batch = jax.device_put(random_batch(config, bucket), rules.batch_sharding(mesh))
        state, rate = init_state(config, mesh, network), StepSettings.usual(1e-4)
        start = time.perf_counter()
        step = jit_train_step(config, network, mesh).lower(state, batch, rate).compile()
        compile_seconds = time.perf_counter() - start
        seconds = []
        for _ in range(steps + 1):
            start = time.perf_counter()
            state, metrics = step(state, batch, rate)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - start)
    seconds = sorted(seconds[1:])
    median = statistics.median(seconds)
    peak, of = peak_memory()
    return {
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "bucket": bucket,
        "global_batch_size": config.global_batch_size,
        "compile_seconds": compile_seconds,
        "step_seconds": median,
        "step_seconds_range": [seconds[0], seconds[-1]],
        "tokens_per_second": tokens / median,
        "peak_memory_bytes": peak,
        "peak_memory_of": of,
    }


def peak_memory() -> tuple[int, str]:
    """Peak memory in bytes: of the fullest device if devices report it, otherwise of this process."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return max(entry["peak_bytes_in_use"] for entry in stats), "device"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "process"


def main(_: list[str]) -> None:
    """Entry point."""
    config = flags.FLAGS.config
    if config is None:
        raise UserError("--config is missing; give a preset, as --config=experiments/configs/demo.py")
    cli.setup_platform(config)
    results = []
    for size in config.plan.buckets:
        bucket = (size[0] or config.data.latent_frames, *size[1:])
        result = time_steps(config, bucket, flags.FLAGS.steps)
        low, high = result["step_seconds_range"]
        print(
            f"{'x'.join(map(str, bucket))}: step {result['step_seconds']:.3f} s (of {flags.FLAGS.steps}: {low:.3f} to "
            f"{high:.3f}), {result['tokens_per_second']:.0f} video tokens/s, peak memory "
            f"{result['peak_memory_bytes'] / 2**30:.2f} GiB of the {result['peak_memory_of']}, compiled in "
            f"{result['compile_seconds']:.1f} s, {result['devices']}",
            flush=True,
        )
        results.append(result)
    side_by_side.write_results(results)


if __name__ == "__main__":
    define_flags()
    cli.run_main(main)
