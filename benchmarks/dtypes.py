"""Effect of lower precision of parameters and optimizer states on loss, state memory and step time.

python -m benchmarks.dtypes --data=DIR [--config=experiments/configs/demo.py] [--steps=60] [--output=FILE.json]

Trains all variants in one run, a step of each in turn, with the same initial parameters, batches, noise and learning
rate. All batches are of the first stage and one size, to compile once. The loss is the mean of the last quarter of the
steps.
"""

import itertools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from benchmarks import side_by_side
from data_pipelines.input_pipeline.pipeline import InputPipeline
from data_pipelines.schema import Dataset
from experiments.common import cli
from omnihuman_jax import batch as batch_lib
from omnihuman_jax.errors import UserError
from omnihuman_jax.models.functional import make_network
from omnihuman_jax.sharding import mesh as mesh_lib
from omnihuman_jax.training.stages import curriculum
from omnihuman_jax.training.state import init_state
from omnihuman_jax.training.step import jit_train_step
from omnihuman_jax.training.step_settings import StepSettings

BF16 = "bfloat16"
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "first moments": {"mu_dtype": BF16},
    "both moments": {"mu_dtype": BF16, "nu_dtype": BF16},
    "both moments, stochastic": {"mu_dtype": BF16, "nu_dtype": BF16, "stochastic_rounding": True},
    "parameters": {"param_dtype": BF16},
    "parameters, stochastic": {"param_dtype": BF16, "stochastic_rounding": True},
    "all, stochastic": {"param_dtype": BF16, "mu_dtype": BF16, "nu_dtype": BF16, "stochastic_rounding": True},
}


def define_flags() -> None:
    """The command's flags."""
    cli.define_config_flag()
    flags.DEFINE_string("data", None, "Data set made by data_pipelines.prepare.")
    flags.DEFINE_integer("steps", 60, "Steps per variant.", lower_bound=4)
    flags.DEFINE_string("output", None, "JSON file for the results.")


def compare(config: ConfigDict, dataset: Dataset, steps: int) -> list[dict[str, Any]]:
    """Trains all variants in turn; see the module docstring."""
    stages = curriculum(config)
    input_pipeline, mesh = InputPipeline.from_config(config, stages, dataset), mesh_lib.training_mesh(config)
    rate = StepSettings.of(stages[0], stages[0].learning_rate)
    runs: dict[str, dict[str, Any]] = {}
    with jax.set_mesh(mesh):
        start = init_state(config, mesh, make_network(config))
        for name, changes in VARIANTS.items():
            changed = ConfigDict(config.to_dict())
            for key, value in changes.items():
                (changed.model if key == "param_dtype" else changed.optimizer)[key] = value
            network = make_network(changed)
            state = init_state(changed, mesh, network)
            params = jax.tree.map(lambda p, like: jnp.array(p, like.dtype), start.params, state.params)
            state = state._replace(params=params, ema=jax.tree.map(jnp.array, start.ema))
            step = jit_train_step(changed, network, mesh)
            # Over all devices, without the EMA, which is always float32.
            size = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
            runs[name] = {"state": state, "step": step, "bytes": size, "losses": [], "seconds": []}
        batches = input_pipeline.iterate(1, slice(0, config.global_batch_size))
        first = next(batches)
        same = (batch for batch in batches if batch["latents"].shape == first["latents"].shape)
        for batch in itertools.chain([first], itertools.islice(same, steps - 1)):
            placed = batch_lib.place(config, mesh, batch)
            for run in runs.values():
                begin = time.perf_counter()
                run["state"], metrics = run["step"](run["state"], placed, rate)
                run["losses"].append(float(metrics["loss"]))
                run["seconds"].append(time.perf_counter() - begin)
    base = runs["float32"]
    return [
        {
            "variant": name,
            "loss": statistics.mean(run["losses"][-steps // 4 :]),
            "state_bytes": run["bytes"],
            "bytes_ratio": run["bytes"] / base["bytes"],
            "step_ratio": statistics.median(run["seconds"]) / statistics.median(base["seconds"]),
        }
        for name, run in runs.items()
    ]


def main(_: list[str]) -> None:
    """Entry point."""
    config, data = flags.FLAGS.config, flags.FLAGS.data
    if config is None or not data:
        raise UserError("give --config=PRESET.py and --data=DIR")
    cli.setup_platform(config)
    results = compare(config, Dataset.open(data), flags.FLAGS.steps)
    for r in results:
        print(
            f"{r['variant']:26} loss {r['loss']:.4f}, parameters and moments {r['state_bytes'] / 2**20:.1f} MiB "
            f"({r['bytes_ratio']:.2f}), step {r['step_ratio']:.2f}"
        )
    side_by_side.write_results(results)


if __name__ == "__main__":
    define_flags()
    cli.run_main(main)
