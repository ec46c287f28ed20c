"""Random keys by purpose: no two purposes share a stream, nor do runs with adjacent seeds."""

import jax

# Never reuse a number for another purpose.
INIT, NOISE, HELD_OUT, ROUNDING, MOMENT_ROUNDING, SAMPLING, VAE_INIT, CRITIC_INIT, POSTERIOR = range(9)
LOSS_WEIGHTS, CONDITION_GAIN = range(9, 11)


def purpose_key(seed: int, purpose: int) -> jax.Array:
    """The key for a purpose (one of the constants above) in a run with this seed."""
    return jax.random.fold_in(jax.random.key(seed), purpose)
