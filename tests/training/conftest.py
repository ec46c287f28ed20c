"""Tests of whole runs share what takes most of their time: the traced and compiled train step."""

import json

import pytest
from ml_collections import ConfigDict

from omnihuman_jax.training.tasks import omnihuman

READ = ("seed", "model", "optimizer", "diffusion", "ema_decay")  # all that a step reads of the config


@pytest.fixture(scope="session", autouse=True)
def steps_are_made_once():
    """The runs of one process whose steps are alike have one; a test that changes what a step does makes its own."""
    made, right = {}, omnihuman.jit_train_step

    def jit_train_step(config, network, mesh):
        read = json.dumps(ConfigDict({key: config[key] for key in READ}).to_dict(), sort_keys=True)
        if (read, mesh) not in made:
            made[read, mesh] = right(config, network, mesh)
        return made[read, mesh]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(omnihuman, "jit_train_step", jit_train_step)
        yield
