"""Runs a command as the first process of a container, and tells a run that was stopped from one that is done.

python tpu/jobs/supervise.py [--restarts=N] -- COMMAND [ARGUMENT …]

The trainer saves and exits with status 0 on SIGTERM. To Kubernetes that is a job that is done: it would not be started
again after a preemption. So SIGTERM is passed on, and status 0 after it becomes 143.

Run by its path. As a module it would import the package `tpu`, which switches the TPU of the machine off.
"""

import argparse
import signal
import subprocess
import sys

BAD_INPUT = 2  # starting again would not help
STOPPED = 128 + signal.SIGTERM


class Supervisor:
    """A child process that gets this one's SIGTERM."""

    def __init__(self) -> None:
        self._child: subprocess.Popen | None = None
        self.stopped = False
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *_) -> None:
        self.stopped = True
        if self._child:
            self._child.send_signal(signal.SIGTERM)

    def run(self, command: list[str]) -> int:
        """Runs a command to its end; returns its exit status, 128 + N where signal N ended it."""
        self._child = subprocess.Popen(command)
        if self.stopped:  # it came before there was a child
            self._child.send_signal(signal.SIGTERM)
        status = self._child.wait()
        return status if status >= 0 else 128 - status


def main() -> int:
    """Returns the exit status of the last run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--restarts", type=int, default=0, help="how often a failed run is started again")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    supervisor, left = Supervisor(), arguments.restarts
    while True:
        status = supervisor.run(arguments.command)
        if supervisor.stopped:
            return status or STOPPED
        if status in (0, BAD_INPUT) or not left:
            return status
        print(f"supervise: exit status {status}; starting again, at most {left} more", file=sys.stderr, flush=True)
        left -= 1


if __name__ == "__main__":
    sys.exit(main())
