"""The first process of a container: exit statuses, SIGTERM, restarts."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "tpu" / "jobs" / "supervise.py"
SAVES_AND_ENDS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit({status}))
print("ready", flush=True)
time.sleep(60)
"""


def start(program: str, *flags: str, **options) -> subprocess.Popen:
    command = [sys.executable, SCRIPT, *flags, "--", sys.executable, "-c", program]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("status", [0, 2, 3])
def test_the_exit_status_is_that_of_the_command(status):
    assert start(f"raise SystemExit({status})").wait() == status


def test_a_command_that_a_signal_ended_has_128_and_its_number():
    assert start("import os; os.kill(os.getpid(), 9)").wait() == 137


@pytest.mark.parametrize(("own", "seen"), [(0, 143), (1, 1)])
def test_a_run_that_was_stopped_is_not_one_that_is_done(own, seen):
    process = start(SAVES_AND_ENDS.format(status=own), "--restarts=3")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == seen


def test_a_failed_run_starts_again_as_often_as_told(tmp_path):
    program = f"open({str(tmp_path / 'log')!r}, 'a').write('x'); raise SystemExit(3)"
    assert start(program, "--restarts=2").wait() == 3
    assert (tmp_path / "log").read_text() == "xxx"


def test_bad_input_is_not_tried_again(tmp_path):
    program = f"open({str(tmp_path / 'log')!r}, 'a').write('x'); raise SystemExit(2)"
    assert start(program, "--restarts=2").wait() == 2
    assert (tmp_path / "log").read_text() == "x"


def test_the_environment_of_the_container_reaches_the_command():
    program = "import os; raise SystemExit('JAX_PLATFORMS' in os.environ or 'TPU_SKIP_MDS_QUERY' in os.environ)"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "TPU_"))}
    assert start(program, env=environment).wait() == 0
