"""Losses of the causal VAE (L1 and edges at several scales, KL, LPIPS) and PSNR.

The edge term weights thin structures (lips, eyes, fingers) by contrast instead of area, without a face model.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from omnihuman_jax.models.vae.perceptual import LPIPS


def halve(video: jax.Array) -> jax.Array:
    """(B, F, H, W, C) -> (B, F, H/2, W/2, C), means of 2x2 pixels (an odd last row or column is dropped)."""
    b, f, h, w, c = video.shape
    video = video[:, :, : h // 2 * 2, : w // 2 * 2]
    return video.reshape(b, f, h // 2, 2, w // 2, 2, c).mean((3, 5))


def reconstruction_losses(video: jax.Array, output: jax.Array, scales: int) -> dict[str, jax.Array]:
    """Mean absolute errors of pixels and of neighbour differences, averaged over `scales` octaves.

    Args:
      video: target (B, F, Hp, Wp, 3) in [-1, 1].
      output: reconstruction of the same shape.
      scales: number of sizes: the first at full resolution, each further one at half the size of the one before.

    Returns:
      "l1": at full size only. "pyramid": mean over scales. "edge": the same for differences along rows and columns.
    """
    error = output - video
    l1, pyramid, edge = jnp.mean(jnp.abs(error)), 0.0, 0.0
    for scale in range(scales):
        error = error if scale == 0 else halve(error)  # all terms are linear inside |.|, so the error can be pooled
        pyramid += jnp.mean(jnp.abs(error)) / scales
        rows, columns = jnp.diff(error, axis=2), jnp.diff(error, axis=3)
        edge += 0.5 * (jnp.mean(jnp.abs(rows)) + jnp.mean(jnp.abs(columns))) / scales
    return {"l1": l1, "pyramid": pyramid, "edge": edge}


def perceptual_distance(state: Any, video: jax.Array, output: jax.Array) -> jax.Array:
    """Mean LPIPS of the frames of two clips (B, F, Hp, Wp, 3); `state` is the state of an `LPIPS` module."""
    widths = tuple(weight.shape[0] for weight in jax.tree.leaves(state["weights"]))
    graph = nnx.graphdef(nnx.eval_shape(lambda: LPIPS(widths, rngs=nnx.Rngs(0))))
    frames = (x.reshape(-1, *x.shape[2:]) for x in (video, output))
    return jnp.mean(nnx.merge(graph, lax.stop_gradient(state))(*frames))


def kl_divergence(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """KL of N(mean, exp(logvar)) from N(0, 1) in nats, averaged over the latent elements."""
    return 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)


def psnr(video: jax.Array, output: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio of each clip, (B,), in dB, for values in [-1, 1] (peak to peak 2)."""
    mse = jnp.mean(jnp.square(jnp.clip(output, -1.0, 1.0) - video), axis=(1, 2, 3, 4))
    return 10.0 * jnp.log10(4.0 / jnp.maximum(mse, 1e-10))
