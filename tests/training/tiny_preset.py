"""`tiny.tiny_config` as a preset file for the commands: --config=tests/training/tiny_preset.py:DATA_DIRECTORY."""

from pathlib import Path

from ml_collections import ConfigDict

from tests.training.tiny import tiny_config


def get_config(data: str) -> ConfigDict:
    """20 steps in each of three stages, a checkpoint every 5."""
    config = tiny_config(Path(data), steps=(20, 20, 20))
    config.checkpoint.update({"every": 5, "keep": 2})
    config.vae.checkpoint = ""  # the fake latents come from none
    config.compilation_cache = ""  # tests keep compiled programs by the environment
    return config
