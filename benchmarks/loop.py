"""What the loop costs beside the bare compiled step, what a save blocks, and how soon a restart trains again.

python -m benchmarks.loop --data=DIR [--config=experiments/configs/demo.py] [--steps=30] [--output=FILE.json]

All in one run, side by side: the compiled step fed with one batch that is already on the devices, then the same step
in the training loop (reading, placing, logging every step), then with checkpoints on the way, then the command again.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from data_pipelines.feed import Feed
from data_pipelines.schema import Dataset
from experiments import cli
from omnihuman_jax.errors import UserError
from omnihuman_jax.sharding import mesh as mesh_lib
from omnihuman_jax.sharding import rules
from omnihuman_jax.training.curriculum import curriculum
from omnihuman_jax.training.state import batch_shapes, init_state, make_network
from omnihuman_jax.training.step import jit_train_step


def define_flags() -> None:
    """Defined when run as a program only, so that importing this module takes no flag names."""
    cli.define_config_flag()
    flags.DEFINE_string("data", None, "Data set made by data_pipelines.prepare.")
    flags.DEFINE_integer("steps", 30, "Steps to time of each kind.", lower_bound=5)
    flags.DEFINE_string("output", None, "JSON file for the numbers.")


def bare_step_seconds(config: ConfigDict, dataset: Dataset, steps: int) -> dict[tuple[int, ...], float]:
    """Median seconds of the compiled step alone, by bucket (T, H, W)."""
    feed = Feed.from_config(config, curriculum(config), dataset)
    mesh, network = mesh_lib.make_mesh(config.mesh), make_network(config)
    seconds = {}
    with jax.set_mesh(mesh):
        step = jit_train_step(config, network, mesh)
        state = init_state(config, mesh, network)
        found: dict[tuple[int, ...], Any] = {}
        for batch in feed.iterate(1, slice(None)):
            found.setdefault(batch["latents"].shape[1:4], batch)
            if len(found) == len(feed.buckets()):
                break
        for bucket, batch in found.items():
            placed = {
                name: jax.device_put(batch[name], rules.batch_sharding(mesh)) for name in batch_shapes(config, *bucket)
            }
            times = []
            for _ in range(steps + 2):
                begin = time.perf_counter()
                state, metrics = step(state, placed, jnp.float32(1e-4))
                jax.block_until_ready(metrics)
                times.append(time.perf_counter() - begin)
            seconds[bucket] = statistics.median(times[2:])
    return seconds


def loop_run(preset: str, data: str, workdir: Path, steps: int, save_every: int) -> tuple[list[dict], float]:
    """Runs `experiments.train` in a process of its own; its metric lines and the wall seconds to its first new line."""
    command = [sys.executable, "-m", "experiments.train", f"--config={preset}", f"--workdir={workdir}"]
    command += [f"--config.data.dir={data}", f"--config.stages.stage1.steps={steps}", "--config.log_every=1"]
    command += ["--config.stages.stage2.steps=0", "--config.stages.stage3.steps=0"]
    command += [f"--config.checkpoint.every={save_every}", "--config.sample.at_stage_end=false"]
    log = workdir / "metrics.jsonl"
    had = len(log.read_text().splitlines()) if log.exists() else 0
    begin, first = time.perf_counter(), None
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        if first is None and log.exists() and len(log.read_text().splitlines()) > had:
            first = time.perf_counter() - begin
        time.sleep(0.02)
    if process.returncode:
        raise UserError(f"experiments.train ended with status {process.returncode}; its message is above")
    return [json.loads(line) for line in log.read_text().splitlines()][had:], first or 0.0


def main(_: list[str]) -> None:
    """Entry point."""
    config, data, steps = flags.FLAGS.config, flags.FLAGS.data, flags.FLAGS.steps
    if config is None or not data:
        raise UserError("give --config=PRESET.py and --data=DIR")
    preset = next(a.split("=", 1)[1] for a in sys.argv[1:] if a.startswith("--config="))
    cli.setup_platform(config)
    config.data.dir = data
    bare = bare_step_seconds(config, Dataset.open(data), steps)
    feed = Feed.from_config(config, curriculum(config), Dataset.open(data))
    with tempfile.TemporaryDirectory() as root:
        workdir = Path(root) / "run"
        lines, first = loop_run(preset, data, workdir, steps + 5, 10**6)
        used = [bare[next(feed.iterate(line["step"], slice(0, 1)))["latents"].shape[1:4]] for line in lines]
        pairs = [(line["step_seconds"], alone) for line, alone in zip(lines, used, strict=True)][5:]
        again, restart = loop_run(preset, data, workdir, 2 * steps + 5, max(2, steps // 3))
    wall = sum(line["step_seconds"] for line in again)
    shares = again[-1]["goodput"]
    report = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "bare_step_seconds": {"x".join(map(str, bucket)): seconds for bucket, seconds in bare.items()},
        "loop_over_bare": statistics.median(a / b for a, b in pairs),
        "first_step_seconds": first,
        "restart_to_first_step_seconds": restart,
        "save_share_of_wall": shares["save"],
        "useful_share_of_wall": shares["useful"],
        "steps_with_saves_seconds": wall,
    }
    print(
        f"step in the loop / bare compiled step: {report['loop_over_bare']:.3f} (median of {len(pairs)} steps)\n"
        f"first step {first:.1f} s after the start, {restart:.1f} s after a restart\n"
        f"saving took {shares['save']:.1%} of the restarted run's wall time, useful steps {shares['useful']:.1%}"
    )
    if flags.FLAGS.output:
        Path(flags.FLAGS.output).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    define_flags()
    cli.run_main(main)
