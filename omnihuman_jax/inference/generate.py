"""Generates a clip of any length from a reference image and whatever drives it.

All segments' latents are joined and decoded as one causal stream, chunk by chunk, so there are no seams and memory does
not grow with the clip.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omnihuman_jax import conditions
from omnihuman_jax.errors import UserError
from omnihuman_jax.inference import images
from omnihuman_jax.inference.sampling import Inputs, Progress, Settings, sample_latents
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.models.functional import Network
from omnihuman_jax.models.vae.streaming import Tiling, decode_clip, encode_clip
from omnihuman_jax.models.vae.vae import VAE


@dataclasses.dataclass(frozen=True)
class Request:
    """What to generate. Only the reference must be given.

    Attributes:
      reference: uint8 (h, w, 3), any size; it is scaled to cover the output and centre-cropped.
      height: pixels, divisible by the VAE's stride times the patch size.
      width: pixels.
      frames: pixel frames at 25 a second.
      text: token states (L, Dt) of the prompt; without them the text condition is absent.
      audio: speech features (Fa, Da) at 25 a second, a row a frame.
      keypoints: (F, K, 3) x, y in [0, 1] of the output frame, confidence; a row a frame.
      seed: of the noise.
    """

    reference: np.ndarray
    height: int
    width: int
    frames: int
    text: np.ndarray | None = None
    audio: np.ndarray | None = None
    keypoints: np.ndarray | None = None
    seed: int = 0

    @property
    def active(self) -> np.ndarray:
        """The conditions in force, bool (4,), by the paper's inference rules.

        Where the rules turn text on but there are no token states, text stays absent (a learned null token).
        """
        row = conditions.for_inference(
            text=self.text is not None, reference=True, audio=self.audio is not None, pose=self.keypoints is not None
        )
        return row if self.text is not None else conditions.without(row, "text")


def check_request(model: ModelConfig, request: Request, multiple: int) -> None:
    """Refuses what the model cannot take.

    Args:
      model: the model's configuration.
      request: what is asked for.
      multiple: pixels of a token along a side, `pixel_multiple`.

    Raises:
      UserError: a size that does not divide, no frames, or features of another width than the model's.
    """
    images.check_size(request.height, request.width, multiple)
    if request.frames < 1:
        raise UserError(f"frames={request.frames}; a clip has at least one frame")
    tracks = (
        ("text", request.text, (model.text_dim,), "text encoder"),
        ("audio", request.audio, (model.audio_dim,), "speech encoder"),
        ("keypoints", request.keypoints, (model.num_keypoints, 3), "keypoint detector"),
    )
    for name, value, row, source in tracks:
        if value is None:
            continue
        if value.shape[1:] != row:
            raise UserError(
                f"{name} has rows of shape {value.shape[1:]}, but the checkpoint's model reads {row}; "
                f"use the {source} it was trained with"
            )
        if not len(value):
            raise UserError(f"{name} has no rows; give at least one, or leave it out")


def pixel_multiple(model: ModelConfig, vae: VAE) -> int:
    """Pixels that one token covers along a side; output sizes are multiples of it."""
    return vae.config.spatial_stride * model.patch_size[1]


def encode_reference(vae: VAE, image: np.ndarray, height: int, width: int, tiling: Tiling | None = None) -> jax.Array:
    """Normalised latent (H, W, C) of a uint8 picture (h, w, 3), fitted to height x width pixels."""
    pixels = images.to_model(images.cover(image, height, width))
    return jnp.asarray(encode_clip(vae, pixels[None, None], tiling=tiling)[0, 0])


def decode_latents(vae: VAE, latents: jax.Array, tiling: Tiling | None = None) -> np.ndarray:
    """Frames (B, F, height, width, 3) in [-1, 1] of normalised latents (B, T, H, W, C), as one causal stream."""
    return decode_clip(vae, latents, tiling=tiling)


def pad_text(states: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token states (L, Dt) as (length, Dt), cut or padded with zeros, and their mask (length,)."""
    used = min(len(states), length)
    padded = np.zeros((length, states.shape[1]), np.float32)
    padded[:used] = states[:used]
    return padded, np.arange(length) < used


def generate(
    network: Network,
    params: Any,
    vae: VAE,
    request: Request,
    settings: Settings,
    on_step: Progress | None = None,
    tiling: Tiling | None = None,
) -> np.ndarray:
    """Generates one clip.

    Args:
      network: the model.
      params: its parameters (usually the EMA).
      vae: the VAE its latents were made with.
      request: what to generate.
      settings: how to sample.
      on_step: called after every sampling step with (segment, segments, step, steps).
      tiling: how the VAE cuts large frames; None takes them whole.

    Returns:
      float32 frames (F, height, width, 3) in [-1, 1], F = `request.frames`.

    Raises:
      UserError: see `check_request`.
    """
    model = network.config
    check_request(model, request, pixel_multiple(model, vae))
    text = text_mask = None
    if request.text is not None:
        text, text_mask = (value[None] for value in pad_text(request.text, model.text_len))
    inputs = Inputs(
        active=request.active,
        reference=encode_reference(vae, request.reference, request.height, request.width, tiling)[None],
        text=text,
        text_mask=text_mask,
        audio=None if request.audio is None else np.asarray(request.audio, np.float32)[None],
        keypoints=None if request.keypoints is None else np.asarray(request.keypoints, np.float32)[None],
    )
    latents = sample_latents(
        network, params, inputs, settings, frames=request.frames, seeds=[request.seed], on_step=on_step
    )
    return decode_latents(vae, latents, tiling)[0, : request.frames]
