"""Everything the network sees is tokens: value, position (t, h, w), segment, clean or noisy.

Letters: B batch, T latent frames, M motion latent frames, H W latent rows/columns, C latent channels, N tokens,
P tokens of one latent frame, D width of a token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from omnihuman_jax.errors import UserError

Patch = tuple[int, int, int]


class Tokens(NamedTuple):
    """A row of tokens per batch element.

    Attributes:
      value: (B, N, D).
      position: (B or 1, N, 3) float32, (t, h, w) in patches; what RoPE reads.
      segment: (B, N) int32. Tokens attend only to their own segment; 0 is absent or padding.
      clean: (B or 1, N) bool. Clean tokens (reference, motion frames) are modulated at t = 0 and have no loss.
    """

    value: jax.Array
    position: jax.Array
    segment: jax.Array
    clean: jax.Array


def check_patch(shape: Sequence[int], patch: Patch) -> None:
    """Raises UserError unless the (T, H, W) of latents divides into patches."""
    for size, step, name in zip(shape, patch, ("frames", "rows", "columns"), strict=True):
        if size < step or size % step:
            raise UserError(f"latents have {size} {name}, not divisible by the patch size {step}; choose another size")


def patchify(x: jax.Array, patch: Patch) -> jax.Array:
    """Latents (B, T, H, W, C) -> tokens (B, N, pt*ph*pw*C) in (t, h, w) order; within a token (pt, ph, pw, C)."""
    b, t, h, w, c = x.shape
    check_patch((t, h, w), patch)
    pt, ph, pw = patch
    x = x.reshape(b, t // pt, pt, h // ph, ph, w // pw, pw, c)
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, -1, pt * ph * pw * c)


def unpatchify(tokens: jax.Array, shape: tuple[int, int, int], patch: Patch) -> jax.Array:
    """Inverse of `patchify`: tokens (B, N, pt*ph*pw*C) -> latents (B, T, H, W, C), where `shape` is (T, H, W)."""
    t, h, w = shape
    check_patch(shape, patch)
    pt, ph, pw = patch
    x = tokens.reshape(tokens.shape[0], t // pt, h // ph, w // pw, pt, ph, pw, -1)
    return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(tokens.shape[0], t, h, w, -1)


def grid_positions(times: Sequence[float] | np.ndarray, rows: int, columns: int) -> np.ndarray:
    """(t, h, w) of a stack of frames in patches, (len(times) * rows * columns, 3) float32, in the order of `patchify`.

    The times of motion frames are negative.
    """
    t, h, w = np.meshgrid(np.asarray(times, np.float32), np.arange(rows), np.arange(columns), indexing="ij")
    return np.stack([t, h, w], -1).reshape(-1, 3).astype(np.float32)


def pack_visual(
    video: jax.Array,
    reference: jax.Array | None,
    motion: jax.Array | None,
    *,
    has_reference: jax.Array,
    has_motion: jax.Array,
    patch: Patch,
    reference_time_slot: float = 0,
) -> Tokens:
    """Packs [reference | motion | video] into one token sequence (paper section 3.2: the reference shares the DiT).

    Args:
      video: noisy latents (B, T, H, W, C), at times 0..T-1.
      reference: clean latent (B, H, W, C); None leaves its tokens out, as if no sample had one.
      motion: clean latents (B, M, H, W, C) of the frames before the window, at times -M..-1; None leaves them out.
      has_reference, has_motion: (B,) bool; absent tokens get segment 0, so nothing attends to them, and value 0.
      patch: (pt, ph, pw).
      reference_time_slot: RoPE time of the reference, in patches; 0 is the paper's zeroed temporal component.

    Returns:
      Tokens with N = (pt-patches of 1 + M + T frames) * P; the video tokens come last.
    """
    b, t, h, w, c = video.shape
    reference = jnp.zeros((b, 0, h, w, c)) if reference is None else reference[:, None]
    motion = jnp.zeros((b, 0, h, w, c)) if motion is None else motion
    chex.assert_shape([reference, motion], [(b, None, h, w, c), (b, None, h, w, c)])
    chex.assert_shape([has_reference, has_motion], (b,))
    pt, ph, pw = patch
    rows, columns = h // ph, w // pw
    frames = [
        (jnp.repeat(reference, pt, axis=1), [reference_time_slot] * reference.shape[1], has_reference, True),
        (motion, np.arange(-(motion.shape[1] // pt), 0), has_motion, True),
        (video, np.arange(t // pt), jnp.ones(b, bool), False),
    ]
    values, positions, segments, clean = [], [], [], []
    for latents, times, present, is_clean in frames:
        if not len(times):
            continue
        latents = jnp.where(present[:, None, None, None, None], latents, 0).astype(video.dtype)
        values.append(patchify(latents, patch))
        positions.append(grid_positions(times, rows, columns))
        segments.append(jnp.broadcast_to(present[:, None].astype(jnp.int32), (b, len(times) * rows * columns)))
        clean.append(np.full(len(times) * rows * columns, is_clean))
    return Tokens(
        jnp.concatenate(values, 1),
        jnp.asarray(np.concatenate(positions))[None],
        jnp.concatenate(segments, 1),
        jnp.asarray(np.concatenate(clean))[None],
    )


def pad(tokens: Tokens, multiple: int) -> Tokens:
    """Appends segment-0 tokens until N is a multiple, so that a mesh axis divides the sequence."""
    extra = -tokens.value.shape[1] % multiple
    if not extra:
        return tokens
    return jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2)), tokens)


def concatenate(*parts: Tokens) -> Tokens:
    """Joins sequences of the same samples along N; segments stay as they are."""
    rows = max(p.position.shape[0] for p in parts), max(p.clean.shape[0] for p in parts)
    return Tokens(
        jnp.concatenate([p.value for p in parts], 1),
        jnp.concatenate([jnp.broadcast_to(p.position, (rows[0], *p.position.shape[1:])) for p in parts], 1),
        jnp.concatenate([p.segment for p in parts], 1),
        jnp.concatenate([jnp.broadcast_to(p.clean, (rows[1], p.clean.shape[1])) for p in parts], 1),
    )
