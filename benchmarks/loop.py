"""Overhead of the training loop over the bare compiled step, time blocked by saves, and restart time.

python -m benchmarks.loop --data=DIR [--config=experiments/configs/demo.py] [--config.KEY=…] [--processes=2]
    [--steps=40] [--output=FILE.json]

`--processes` share the devices of the config. Each part runs in separate processes: the compiled step on batches
already on the devices, before and after the loop; the same step in the training loop (reading, placing, logging every
step, no checkpoints); and the training command restarted, with the config's checkpoint interval.
"""

import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from data_pipelines.input_pipeline.pipeline import InputPipeline
from data_pipelines.schema import Dataset
from experiments.common import cli
from omnihuman_jax import batch as batch_lib
from omnihuman_jax.errors import UserError
from omnihuman_jax.models.functional import make_network
from omnihuman_jax.sharding import mesh as mesh_lib
from omnihuman_jax.sharding import rules
from omnihuman_jax.sharding.processes import compile_together, is_main, process_rows
from omnihuman_jax.training.stages import curriculum
from omnihuman_jax.training.state import init_state
from omnihuman_jax.training.step import jit_train_step
from omnihuman_jax.training.step_settings import StepSettings

WARM = 5  # first steps of a run, not counted because they compile


def define_flags() -> None:
    """Defined when run as a program only, so that importing this module takes no flag names."""
    cli.define_config_flag()
    cli.define_process_flags()
    flags.DEFINE_string("data", None, "Data set made by data_pipelines.prepare.")
    flags.DEFINE_integer("processes", 1, "Processes of each run.", lower_bound=1)
    flags.DEFINE_integer("steps", 40, "Steps to time of each kind.", lower_bound=5)
    flags.DEFINE_string("output", None, "JSON file for the numbers.")
    flags.DEFINE_string("bare", None, "Internal: only time the compiled step, into this file.")


def bare_step_seconds(config: ConfigDict, dataset: Dataset) -> dict[str, float]:
    """Median seconds of the compiled step alone, by bucket "TxHxW", over the config's steps in their order."""
    input_pipeline = InputPipeline.from_config(config, curriculum(config), dataset)
    mesh, network = mesh_lib.training_mesh(config), make_network(config)
    rows = process_rows(rules.batch_sharding(mesh), config.global_batch_size)
    with jax.set_mesh(mesh):
        step = jit_train_step(config, network, mesh)
        state = init_state(config, mesh, network)
        order, placed, compiled, times = [], {}, {}, {}
        for batch in input_pipeline.iterate(1, rows):
            order.append(bucket := bucket_name(batch))
            if bucket not in placed:
                placed[bucket], times[bucket] = batch_lib.place(config, mesh, batch), []
                compiled[bucket] = compile_together(step, state, placed[bucket], StepSettings.usual(1e-4))
        for bucket in order:
            begin = time.perf_counter()
            state, metrics = compiled[bucket](state, placed[bucket], StepSettings.usual(1e-4))
            jax.block_until_ready(metrics)
            times[bucket].append(time.perf_counter() - begin)
    # The first step of a bucket is slower and not counted, as in the loop.
    return {bucket: statistics.median(taken[1:] or taken) for bucket, taken in times.items()}


def bucket_name(batch: Any) -> str:
    """Latent T x H x W of a batch."""
    return "x".join(map(str, batch["latents"].shape[1:4]))


def start(command: list[str], processes: int) -> list[subprocess.Popen]:
    """Starts a command once, or as several processes that find each other."""
    if processes == 1:
        return [subprocess.Popen(command, stdout=subprocess.DEVNULL)]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    command = [*command, f"--coordinator_address={address}", f"--num_processes={processes}"]
    return [subprocess.Popen([*command, f"--process_id={i}"], stdout=subprocess.DEVNULL) for i in range(processes)]


def check(started: list[subprocess.Popen]) -> None:
    """Waits for all processes; raises UserError if one fails."""
    for process in started:
        if process.wait():
            raise UserError(f"a process ended with status {process.returncode}; its message is above")


def training_run(overrides: list[str], workdir: Path, processes: int) -> tuple[list[dict], float]:
    """Runs `experiments.train`; returns its new metric lines and the seconds until the first of them."""
    command = [sys.executable, "-m", "experiments.train", *overrides, f"--workdir={workdir}"]
    log = workdir / "metrics.jsonl"
    had = len(log.read_text().splitlines()) if log.exists() else 0
    begin, first = time.perf_counter(), 0.0
    started = start(command, processes)
    while any(process.poll() is None for process in started):
        if not first and log.exists() and len(log.read_text().splitlines()) > had:
            first = time.perf_counter() - begin
        time.sleep(0.02)
    check(started)
    return [json.loads(line) for line in log.read_text().splitlines()][had:], first


def compare(config: ConfigDict, config_flags: list[str], data: str, processes: int, steps: int) -> dict[str, Any]:
    """Runs and compares the parts of the benchmark; `config_flags` are the arguments that make the config."""
    stage = [*config_flags, f"--config.data.dir={data}", "--config.log_every=1", "--config.sample.at_stage_end=false"]
    stage += ["--config.stages.stage2.steps=0", "--config.stages.stage3.steps=0"]
    input_pipeline = InputPipeline.from_config(config, curriculum(config), Dataset.open(data))

    def bare_of(line: dict) -> float:
        """Seconds of the bare step for the bucket of a metric line."""
        return bare[bucket_name(next(input_pipeline.iterate(line["step"], slice(0, 1))))]

    with tempfile.TemporaryDirectory() as root:
        workdir, file = Path(root) / "run", Path(root) / "bare.json"
        module = [sys.executable, "-m", "benchmarks.loop", f"--data={data}", f"--bare={file}"]
        never = [f"--config.stages.stage1.steps={WARM + steps}", f"--config.checkpoint.every={10**6}"]
        # Enough further steps for a complete save, or several frequent ones, and steps during it.
        longer = WARM + steps + WARM + max(config.checkpoint.every, 20) + 3

        def bare_run() -> dict[str, float]:
            check(start([*module, *stage, f"--config.stages.stage1.steps={longer}"], processes))
            return json.loads(file.read_text())

        before = bare_run()
        lines, first = training_run([*stage, *never], workdir, processes)
        after = bare_run()  # a machine's speed drifts
        bare = {bucket: (before[bucket] + after[bucket]) / 2 for bucket in before}
        alone = [bare_of(line) for line in lines]
        again, restart = training_run([*stage, f"--config.stages.stage1.steps={longer}"], workdir, processes)
    ratios = [line["step_seconds"] / seconds for line, seconds in zip(lines, alone, strict=True)][WARM:]
    saves = {c["seconds"]: c["blocked_seconds"] for c in (line["checkpoint"] for line in again) if c.get("seconds")}
    # A background save still uses the devices: compare the step that runs while it starts.
    beside = [
        line["step_seconds"] / bare_of(line)
        for line in again[WARM:]
        if (line["step"] - 1) % config.checkpoint.every == 0
    ]
    return {
        "processes": processes,
        "simulated_devices": config.simulated_devices,
        "cores": len(os.sched_getaffinity(0)),
        "bare_step_seconds": bare,
        "bare_after_over_before": statistics.mean(after[bucket] / before[bucket] for bucket in bare),
        "loop_over_bare": statistics.median(ratios),
        "loop_over_bare_mean": sum(line["step_seconds"] for line in lines[WARM:]) / sum(alone[WARM:]),
        "first_step_seconds": first,
        "restart_to_first_step_seconds": restart,
        "checkpoint_every": config.checkpoint.every,
        "restarted_run_shares": again[-1]["goodput"],
        "step_beside_a_save_over_bare": statistics.mean(beside) if beside else None,
        "saves": [{"seconds": whole, "blocked_seconds": blocked} for whole, blocked in saves.items()],
    }


def main(_: list[str]) -> None:
    """Entry point."""
    config, data, values = flags.FLAGS.config, flags.FLAGS.data, flags.FLAGS
    if config is None or not data:
        raise UserError("give --config=PRESET.py and --data=DIR")
    if values.bare:
        cli.setup_platform(config, cli.join_processes())
        seconds = bare_step_seconds(config, Dataset.open(data))
        if is_main():
            Path(values.bare).write_text(json.dumps(seconds))
        return
    config_flags = [argument for argument in sys.argv[1:] if argument.startswith("--config")]
    report = compare(config, config_flags, data, values.processes, values.steps)
    shares = report["restarted_run_shares"]
    print(
        f"{report['processes']} process(es), {report['simulated_devices']} simulated devices\n"
        f"step in the loop / bare compiled step: {report['loop_over_bare']:.3f} (median), "
        f"{report['loop_over_bare_mean']:.3f} (mean); the bare step after the loop / before it: "
        f"{report['bare_after_over_before']:.3f}\n"
        f"first step {report['first_step_seconds']:.1f} s after the start, "
        f"{report['restart_to_first_step_seconds']:.1f} s after a restart\n"
        f"saving every {report['checkpoint_every']} steps took {shares['save']:.1%} of the restarted run's wall time, "
        f"useful steps {shares['useful']:.1%}\n"
        + "".join(
            f"a save took {save['seconds']:.2f} s and blocked the loop for {save['blocked_seconds']:.3f} s "
            f"({save['blocked_seconds'] / save['seconds']:.1%})\n"
            for save in report["saves"]
        )
        + f"the step during a save / bare compiled step: {report['step_beside_a_save_over_bare'] or math.nan:.3f}"
    )
    if values.output:
        Path(values.output).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    define_flags()
    cli.run_main(main)
