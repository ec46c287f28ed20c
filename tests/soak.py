"""Kills a run again and again and compares its end with that of a run left alone.

python -m tests.soak [--minutes=60] [--directory=DIR]

Each round trains the tiny preset to its end under random SIGKILLs, SIGTERMs and changes of the number of processes,
then checks losses, records and (where one process ran throughout) every array. Prints the tally.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.training import launch
from tests.training.test_restart import assert_same_run, lines_so_far
from tests.training.tiny import tiny_data


def round_of_trouble(root: Path, name: str, rng: random.Random, tally: Counter) -> None:
    """One run to its end, with trouble on the way."""
    workdir, exact = root / name, rng.random() < 0.5
    while True:
        processes = 1 if exact else rng.choice((1, 2, 4))
        started = launch.start(root / "data", workdir, processes=processes)
        before = lines_so_far(workdir) if (workdir / "metrics.jsonl").exists() else 0
        if before >= 55:
            break
        launch.wait_for_step(workdir, before + 1, started)
        time.sleep(rng.expovariate(1.0))
        if rng.random() < 0.3:
            rng.choice(started).send_signal(signal.SIGTERM)
            statuses = launch.wait(started)
            assert statuses == [0] * processes, (statuses, launch.log(workdir)[-2000:])
            tally[f"SIGTERM to one of {processes}"] += 1
        else:
            launch.kill(started)
            tally[f"SIGKILL to {processes}"] += 1
    assert launch.wait(started) == [0] * processes, launch.log(workdir)[-2000:]
    assert_same_run(workdir, root / "alone", exact=exact)
    tally["runs equal bit for bit" if exact else "runs equal to float tolerance"] += 1


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    root = arguments.directory or Path(tempfile.mkdtemp(prefix="soak-"))
    # As in the tests (conftest.py): most of a start is compiling.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "jax"))
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    tiny_data(root / "data")
    assert launch.wait(launch.start(root / "data", root / "alone")) == [0], launch.log(root / "alone")[-2000:]
    rng, tally, end, number = random.Random(arguments.seed), Counter(), time.monotonic() + 60 * arguments.minutes, 0
    while time.monotonic() < end:
        round_of_trouble(root, f"run-{number:03d}", rng, tally)
        number += 1
        print(f"{number} runs: " + ", ".join(f"{count} {what}" for what, count in sorted(tally.items())), flush=True)


if __name__ == "__main__":
    main()
