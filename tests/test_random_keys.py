"""Streams of random numbers: one a purpose and a seed."""

import jax
import numpy as np

from omnihuman_jax import random_keys
from omnihuman_jax.random_keys import purpose_key

PURPOSES = [value for name, value in vars(random_keys).items() if name.isupper()]


def test_keys_of_different_purposes_and_neighbouring_seeds_are_all_different():
    keys = {tuple(np.asarray(jax.random.key_data(purpose_key(seed, p)))) for seed in range(8) for p in PURPOSES}
    assert len(PURPOSES) == len(set(PURPOSES)) >= 9
    assert len(keys) == 8 * len(PURPOSES)
