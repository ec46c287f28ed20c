"""Runs `experiments.train` as one or several real processes, as a cluster would."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(
    data: Path, workdir: Path, *overrides: str, processes: int = 1, where: os.PathLike | None = None
) -> list[subprocess.Popen]:
    """Starts the tiny preset on 8 simulated devices shared by `processes`; `where` as in `start_command`."""
    command = ["experiments.train", f"--config=tests/training/tiny_preset.py:{data}", *overrides]
    return start_command(command, workdir, processes=processes, where=where)


def start_command(
    arguments: Sequence[str], workdir: Path, *, processes: int = 1, where: os.PathLike | None = None
) -> list[subprocess.Popen]:
    """Starts a module with arguments, as so many processes; logs go to workdir/process-N.log.

    `where`: the run directory, if it is not `workdir`, such as one in an object store.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", *arguments, f"--workdir={where or workdir}"]
    if processes > 1:
        command += [f"--coordinator_address=127.0.0.1:{free_port()}", f"--num_processes={processes}"]
    started = []
    for i in range(processes):
        mine = [*command, f"--process_id={i}"] if processes > 1 else command
        with open(workdir / f"process-{i}.log", "a") as log:
            started.append(
                subprocess.Popen(mine, cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"JAX_PLATFORMS": "cpu"})
            )
    return started


def wait(started: list[subprocess.Popen], seconds: float = 900) -> list[int]:
    """Exit statuses of all; none may outlive the time."""
    end = time.monotonic() + seconds
    try:
        return [process.wait(max(0.1, end - time.monotonic())) for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()


def wait_for_step(workdir: Path, step: int, started: list[subprocess.Popen], seconds: float = 600) -> None:
    """Waits until metrics.jsonl tells of a step."""
    end, path = time.monotonic() + seconds, workdir / "metrics.jsonl"
    while not (path.exists() and f'{{"step": {step},' in path.read_text()):
        assert time.monotonic() < end, f"step {step} was not reached"
        assert all(p.poll() is None for p in started), (workdir / "process-0.log").read_text()[-2000:]
        time.sleep(0.05)


def wait_for_checkpoint(workdir: Path, started: list[subprocess.Popen], seconds: float = 600) -> None:
    """Waits until there is a whole running checkpoint, or the run has ended."""
    end = time.monotonic() + seconds
    while not any(p.name.isdigit() for p in (workdir / "checkpoints").glob("*")) and any(
        p.poll() is None for p in started
    ):
        assert time.monotonic() < end, "no checkpoint was written"
        time.sleep(0.02)


def half_written(workdir: Path, room: str) -> list[Path]:
    """Checkpoints that are being written in `checkpoints` or `stages`."""
    return list((workdir / room).glob("*.orbax-checkpoint-tmp*"))


def wait_for_save(workdir: Path, room: str, started: list[subprocess.Popen], seconds: float = 600) -> None:
    """Waits until a checkpoint is being written in `checkpoints` or `stages`, or the run has ended."""
    end = time.monotonic() + seconds
    while not half_written(workdir, room) and any(p.poll() is None for p in started):
        assert time.monotonic() < end, f"nothing was saved in {room}"
        time.sleep(0.001)


def kill(started: list[subprocess.Popen]) -> None:
    """SIGKILL to all."""
    for process in started:
        process.send_signal(signal.SIGKILL)
    for process in started:
        process.wait()


def log(workdir: Path, process: int = 0) -> str:
    return (workdir / f"process-{process}.log").read_text()
