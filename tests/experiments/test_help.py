"""--help of every command lists the flags that it takes, shared ones too."""

import subprocess
import sys

import pytest

COMMANDS = {
    "experiments.train": ("config", "workdir", "replace_parameters_at", "num_processes", "plugins"),
    "experiments.generate": ("checkpoint", "reference", "audio", "pose", "text", "tracks", "seconds", "output"),
    "experiments.export": ("checkpoint", "output", "format", "ema", "naming"),
    "data_pipelines.prepare": ("input", "output", "vae", "plugins"),
    "tpu.plan": ("config", "topology", "num_slices", "output"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_flags(command):
    done = subprocess.run([sys.executable, "-m", command, "--help"], capture_output=True, text=True, timeout=120)
    missing = [flag for flag in COMMANDS[command] if f"--{flag}:" not in done.stdout and f"]{flag}:" not in done.stdout]
    assert missing == []
