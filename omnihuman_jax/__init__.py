"""OmniHuman-1 in JAX: omni-conditioned human video training for TPU pods."""
