"""OmniHuman: a multi-modal diffusion transformer that predicts the flow velocity of video latents from conditions.

Letters: B batch, T latent frames, M motion frames, H W latent rows/columns, C latent channels, N visual tokens,
L text tokens, K keypoints. Sources: OmniHuman-1 (arXiv 2502.01061, section 3); block form of HunyuanVideo and FLUX.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from omnihuman_jax import conditions
from omnihuman_jax import tokens as tk
from omnihuman_jax.errors import UserError
from omnihuman_jax.models.dit import blocks, rope, text
from omnihuman_jax.models.dit.attention import mesh_axis
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.models.dit.entries import Way, entering
from omnihuman_jax.models.dit.frame_attention import frame_tokens
from omnihuman_jax.models.dit.layers import TIME_FREQUENCIES, ZEROS, Embedder, linear, modulate, sinusoid
from omnihuman_jax.sharding.rules import constrain


class Inputs(NamedTuple):
    """Embedded tokens of a batch, ready for the blocks.

    Attributes:
      visual: [conditions' tokens | reference | motion | video], (B, N, hidden).
      text: (B, L, hidden), followed by those of a second text.
      frames: condition name -> tokens of its frame-wise cross-attention, if any sample of the batch has it.
      vec: (B, 2, hidden) float32 modulation vectors: noisy, and clean (t = 0).
      image: (B, I, hidden) tokens of an image encoder, which join the text, or None.
    """

    visual: tk.Tokens
    text: tk.Tokens
    frames: dict[str, tk.Tokens]
    vec: jax.Array
    image: tk.Tokens | None = None


class FinalLayer(nnx.Module):
    """adaLN and the zero-initialised projection to latent patches."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        outputs = math.prod(config.patch_size) * config.latent_channels
        self.mod = linear(config, config.hidden_size, 2 * config.hidden_size, rngs=rngs, init=ZEROS, dtype=jnp.float32)
        self.proj = linear(config, config.hidden_size, outputs, rngs=rngs, init=ZEROS)

    def __call__(self, x: jax.Array, vec: jax.Array, clean: jax.Array) -> jax.Array:
        shift, scale = jnp.split(self.mod(vec), 2, -1)
        return self.proj(modulate(x, shift, scale, clean, self.config))


class OmniHuman(nnx.Module):
    """The network of all three stages. A sample's `active` row alone decides which conditions it has.

    Absent text becomes a learned null token; absent reference and motion tokens are masked out; absent audio adds
    nothing; absent pose channels are zero.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        dim, patch = config.hidden_size, math.prod(config.patch_size)
        self.x_embed = linear(config, patch * config.latent_channels, dim, rngs=rngs)
        for name, entry in entering(Way.CHANNELS).items():
            # Together with x_embed this is one patch embedding over [noisy latents, the condition's channels].
            width = patch * entry.encoder.width(config)
            setattr(self, f"{name}_embed", linear(config, width, dim, rngs=rngs, bias=False))
        if config.first_frame_channels:
            self.first_frame_embed = linear(config, patch * config.first_frame_channels, dim, rngs=rngs, bias=False)
        self.time_embed = Embedder(config, TIME_FREQUENCIES, rngs=rngs)
        self.text_embed = text.make_text_embed(config, rngs=rngs)
        self.null_text = nnx.Param(0.02 * jax.random.normal(rngs.params(), (dim,), jnp.dtype(config.param_dtype)))
        if config.text_refiner_depth:
            self.refiner = text.TokenRefiner(config, rngs=rngs)
        if config.text2_dim:
            self.text2_embed = text.Text2Embedder(config, rngs=rngs)
        if config.image_embed_dim:
            self.image_embed = text.ImageEmbedder(config, rngs=rngs)
        if config.token_kinds:
            dtypes = {"dtype": config.compute_dtype, "param_dtype": jnp.dtype(config.param_dtype)}
            init = nnx.initializers.normal(0.02)
            self.kind_embed = nnx.Embed(len(text.KINDS), dim, embedding_init=init, rngs=rngs, **dtypes)
        if config.pooled_text_dim:
            self.pooled_embed = Embedder(config, config.pooled_text_dim, rngs=rngs)
        if config.guidance_embed:
            self.guidance_embed = Embedder(config, TIME_FREQUENCIES, rngs=rngs)
        for way in Way:
            for name, entry in entering(way).items():
                setattr(self, name, entry.encoder(config, rngs=rngs))
        self.dual = blocks.stack(blocks.DualBlock, config, config.num_dual_blocks, rngs=rngs)
        self.single = blocks.stack(blocks.SingleBlock, config, config.num_single_blocks, rngs=rngs)
        decoder_block = functools.partial(blocks.SingleBlock, decoder=True)
        self.decoder = blocks.stack(decoder_block, config, config.num_decoder_blocks, rngs=rngs)
        self.final = FinalLayer(config, rngs=rngs)

    def __call__(
        self,
        x_t: jax.Array,
        t: jax.Array,
        batch: Mapping[str, jax.Array],
        *,
        pooled: jax.Array | None = None,
        guidance: jax.Array | None = None,
    ) -> jax.Array:
        """Velocity v = eps - x0 of noisy latents x_t = (1 - t) x0 + t eps.

        Args:
          x_t: (B, T, H, W, C) normalised latents.
          t: (B,) in [0, 1]; 1 is pure noise.
          batch: `motion` (B, M, H, W, C), `has_motion` (B,) bool, the fields of every condition (`conditions.table`),
            and `active` (B, conditions) bool in the order of the table. Fields that no sample has, `motion` or those
            of a condition other than text, can be omitted to save work. Optional, for bases with the setting of the
            last axis: `first_frame` (B, T, H, W, first_frame_channels), `image` (B, I, image_embed_dim), and `text2`
            (B, L2, text2_dim) with `text2_mask` (B, L2) bool, ignored for samples without text.
          pooled: (B, pooled_text_dim) pooled text vector, with `pooled_text_dim`.
          guidance: (B,) guidance scale, with `guidance_embed`.

        Returns:
          (B, T, H, W, C) float32.

        Raises:
          UserError: the patch size does not divide the latents, or the config forbids or requires an input.
        """
        inputs = self.embed(x_t, t, batch, pooled, guidance)
        n = x_t.shape[1] * x_t.shape[2] * x_t.shape[3] // math.prod(self.config.patch_size)
        velocity = self.trunk(inputs, clean_prefix=inputs.visual.value.shape[1] - n)[:, -n:]
        return tk.unpatchify(velocity, x_t.shape[1:4], self.config.patch_size).astype(jnp.float32)

    def embed(self, x_t: jax.Array, t: jax.Array, batch: Mapping[str, jax.Array], pooled=None, guidance=None) -> Inputs:
        """Embeds a batch into tokens; arguments and errors as in `__call__`."""
        config = self.config
        active = dict(zip(conditions.names(), batch["active"].T, strict=True))
        has_text = active["text"] & batch["text_mask"].any(-1)
        visual = tk.pack_visual(
            x_t.astype(config.compute_dtype),
            batch.get("reference"),
            batch.get("motion"),
            has_reference=active["reference"],
            has_motion=batch["has_motion"],
            patch=config.patch_size,
            reference_time_slot=config.reference_time_slot,
        )
        visual = visual._replace(value=self.x_embed(visual.value))

        def encoded(way: Way, *grid: int) -> dict[str, Any]:
            """Condition name -> output of its encoder, for those that enter this way and are in the batch."""
            fields = {name: conditions.get(name).field for name in entering(way)}
            return {n: getattr(self, n)(batch[f], active[n], *grid) for n, f in fields.items() if f in batch}

        for name, channels in encoded(Way.CHANNELS, *x_t.shape[2:4]).items():
            stacked = getattr(self, f"{name}_embed")(tk.patchify(channels, config.patch_size))
            visual = _add_to_video(visual, stacked)
        if self._given("first_frame", batch.get("first_frame"), "first_frame_channels"):
            visual = _add_to_video(visual, self.first_frame_embed(tk.patchify(batch["first_frame"], config.patch_size)))
        cells = x_t.shape[2] * x_t.shape[3] // math.prod(config.patch_size[1:])
        for added in encoded(Way.ADDITION).values():
            visual = _add_to_video(visual, jnp.repeat(added, cells, axis=1))
        return Inputs(
            tk.concatenate(*encoded(Way.TOKENS).values(), visual),
            self._text(batch, has_text, t),
            encoded(Way.CROSS_ATTENTION),
            self._vectors(t, has_text, pooled, guidance),
            self._image(batch.get("image")),
        )

    def _given(self, name: str, value: jax.Array | None, key: str, *, required: bool = False) -> bool:
        """Whether an input is given; UserError if the model does not take it, or if it is required and missing."""
        setting = getattr(self.config, key)
        wrong = "given" if value is not None and not setting else "missing" if value is None and required else ""
        if wrong:
            raise UserError(f"{name} is {wrong}, but the model has model.{key}={setting}")
        return value is not None

    def _text(self, batch: Mapping[str, jax.Array], has_text: jax.Array, t: jax.Array) -> tk.Tokens:
        mask = batch["text_mask"] & has_text[:, None]
        states = jnp.where(mask[..., None], batch["text"], 0).astype(self.config.compute_dtype)
        embedded = self.text_embed(states)
        if self.config.text_refiner_depth:
            embedded = self.refiner(embedded, states, mask, t)
        # The null token is learned as a whole, so it gets no kind embedding.
        words = text.text_tokens(self._of_kind(embedded, "text"), mask, self.null_text[...])
        if not self._given("text2", batch.get("text2"), "text2_dim"):
            return words
        self._given("text2_mask", batch.get("text2_mask"), "text2_dim", required=True)
        mask = batch["text2_mask"] & has_text[:, None]
        embedded = self.text2_embed(jnp.where(mask[..., None], batch["text2"], 0))
        return tk.concatenate(words, text.joining_tokens(self._of_kind(embedded, "text2"), mask))

    def _image(self, states: jax.Array | None) -> tk.Tokens | None:
        if not self._given("image", states, "image_embed_dim"):
            return None
        present = (states != 0).any((1, 2)) if self.config.token_kinds else jnp.ones(len(states), bool)
        mask = jnp.broadcast_to(present[:, None], states.shape[:2])
        return text.joining_tokens(self._of_kind(self.image_embed(states), "image"), mask)

    def _of_kind(self, embedded: jax.Array, kind: str) -> jax.Array:
        """Embedded tokens (B, n, hidden) plus the embedding of their kind, if the model has one."""
        if not self.config.token_kinds:
            return embedded
        return embedded + self.kind_embed(jnp.asarray(text.KINDS.index(kind)))

    def _vectors(self, t: jax.Array, has_text: jax.Array, pooled, guidance) -> jax.Array:
        """Modulation vectors (B, 2, hidden): of noisy tokens at t, and of clean tokens at 0."""
        config = self.config
        has_pooled, distilled = bool(config.pooled_text_dim), config.guidance_embed
        if not self._given("pooled", pooled, "pooled_text_dim", required=config.pooled_required and has_pooled):
            pooled = jnp.zeros((t.shape[0], config.pooled_text_dim)) if has_pooled else None
        if not self._given("guidance", guidance, "guidance_embed", required=distilled and not config.guidance_default):
            guidance = jnp.full(t.shape, config.guidance_default) if distilled else None
        vec = self.time_embed(sinusoid(1000 * jnp.stack([t, jnp.zeros_like(t)], 1)))
        if pooled is not None:
            vec += self.pooled_embed(jnp.where(has_text[:, None], pooled, 0))[:, None]
        if guidance is not None:
            vec += self.guidance_embed(sinusoid(1000 * guidance))[:, None]
        return vec

    def trunk(self, inputs: Inputs, *, clean_prefix: int = 0) -> jax.Array:
        """All blocks and the final layer: velocity patches (B, N, pt*ph*pw*C) of every visual token.

        The frame-wise attention skips the first `clean_prefix` visual tokens, which must be clean in every row.
        """
        config, n = self.config, inputs.visual.value.shape[1]
        shards = mesh_axis("sequence")
        visual, words = tk.pad(inputs.visual, shards), inputs.text
        if inputs.image is not None:
            words = tk.concatenate(inputs.image, words)
        words = tk.pad(words, shards)
        shared = self._shared(visual, words, inputs)
        # With a sharded sequence all tokens take part: slicing off the prefix would reshard the whole sequence.
        span = slice(clean_prefix if shards == 1 else 0, visual.value.shape[1])
        streams = (constrain(visual.value, "batch", "tokens", None), words.value)
        streams = blocks.run(self.dual, streams, config, shared, span)
        x = constrain(jnp.concatenate(streams, 1), "batch", "tokens", None)
        x = blocks.run(self.single, x, config, shared, span)
        if self.decoder is not None:
            # The encoded tokens take the place of text, and like text they have no positions.
            x = jnp.concatenate([visual.value, x[:, : visual.value.shape[1]]], 1)
            tail = shared._replace(
                text_clean=shared.visual_clean,
                text_rope=rope.rotation(jnp.zeros_like(visual.position), config.rope_axes, config.rope_theta),
                text_segment=shared.visual_segment,
            )
            x = blocks.run(self.decoder, constrain(x, "batch", "tokens", None), config, tail, span)
        return self.final(x[:, :n], shared.vec, shared.visual_clean[:, :n])

    def _shared(self, visual: tk.Tokens, words: tk.Tokens, inputs: Inputs) -> blocks.Shared:
        config = self.config
        images = 0 if inputs.image is None else inputs.image.segment.shape[1]

        def turn(positions):
            return rope.rotation(positions, config.rope_axes, config.rope_theta)

        return blocks.Shared(
            vec=jax.nn.silu(inputs.vec),
            visual_clean=visual.clean,
            text_clean=words.clean,
            visual_rope=turn(visual.position),
            text_rope=turn(words.position if config.rope_on_text else jnp.zeros_like(words.position)),
            visual_segment=visual.segment,
            text_segment=words.segment,
            cross_segment=words.segment.at[:, :images].set(0),
            frames={name: frame_tokens(visual, tokens) for name, tokens in inputs.frames.items()},
        )


def _add_to_video(visual: tk.Tokens, value: jax.Array) -> tk.Tokens:
    """Adds value (B, n, hidden) to the last n tokens, those of the video."""
    return visual._replace(value=visual.value.at[:, -value.shape[1] :].add(value.astype(visual.value.dtype)))
