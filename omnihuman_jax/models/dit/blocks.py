"""Dual-stream and single-stream blocks of the MMDiT (FLUX / HunyuanVideo form), stacked and scanned."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from omnihuman_jax.models.dit import rope
from omnihuman_jax.models.dit.attention import attend
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.models.dit.entries import Way, entering
from omnihuman_jax.models.dit.frame_attention import FrameAttention, FrameTokens
from omnihuman_jax.models.dit.layers import (
    MLP,
    ZEROS,
    CrossAttention,
    HeadNorm,
    Linear,
    elementwise,
    gated,
    gelu,
    linear,
    modulate,
    swiglu,
)
from omnihuman_jax.sharding.rules import constrain


class Shared(NamedTuple):
    """Inputs of every block apart from its parameters and the streams.

    Attributes:
      vec: (B, 2, hidden) float32, silu of the modulation vectors: noisy, and clean (t = 0).
      visual_clean, text_clean: (B or 1, N), (B or 1, L) bool, which row of `vec` a token uses.
      visual_rope, text_rope: rotations of the tokens.
      visual_segment, text_segment: (B, N), (B, L) int32.
      cross_segment: (B, L) int32, segments of text cross-attention, which does not see image tokens.
      frames: condition name -> tokens of its frame-wise cross-attention, if any sample of the batch has it.
    """

    vec: jax.Array
    visual_clean: jax.Array
    text_clean: jax.Array
    visual_rope: rope.Rotation
    text_rope: rope.Rotation
    visual_segment: jax.Array
    text_segment: jax.Array
    cross_segment: jax.Array
    frames: dict[str, FrameTokens]


def _heads(config: ModelConfig, x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:2], config.num_heads, config.head_dim)


def _by_token(x: jax.Array) -> jax.Array:
    """Shards queries, keys or values (B, n, heads, D) by token, as the projections are.

    Needed in the backward pass: Ulysses attention returns gradients sharded by head, from which XLA would gather the
    projections' inputs and all-reduce their whole gradients over the sequence axis.
    """
    return constrain(x, "batch", "tokens", "local_heads", None)


def _turned(
    project: Linear, norm: HeadNorm, x: jax.Array, turn: rope.Rotation | None, config: ModelConfig
) -> jax.Array:
    """Normalised queries or keys (B, n, heads, D) in the order of `rope.halves`, rotated if `turn` is given."""
    reorder = functools.partial(rope.halves, head_dim=config.head_dim)

    @elementwise
    def normalise_and_turn(x, turn):
        x = norm(x, reorder)
        return (x if turn is None else rope.apply(x, turn)).astype(config.compute_dtype)

    return normalise_and_turn(_heads(config, project(x, reorder)), turn)


def _frame_attention(config: ModelConfig, rngs: nnx.Rngs) -> dict[str, FrameAttention]:
    return {name: FrameAttention(config, rngs=rngs) for name in entering(Way.CROSS_ATTENTION)}


def _add_conditions(block: nnx.Module, x: jax.Array, shared: Shared, span: slice) -> jax.Array:
    """x plus the frame-wise attention to each condition, which only visual tokens in `span` can see."""
    for name, tokens in shared.frames.items():
        part = x[:, span]
        seen = part + getattr(block, name)(part, tokens._replace(query=tokens.query[:, span]))
        x = jnp.concatenate([x[:, : span.start], seen, x[:, span.stop :]], 1)
    return x


class TextAttention(CrossAttention):
    """Cross-attention of visual tokens, with rotated queries, to the text tokens of the same block (Motif-Video)."""

    def __call__(self, x: jax.Array, text: jax.Array, shared: Shared) -> jax.Array:
        """x (B, N, hidden), modulated text (B, L, hidden) -> update (B, N, hidden)."""
        config = self.config
        q = _by_token(_turned(self.q, self.q_norm, x, shared.visual_rope, config))
        k = _turned(self.k, self.k_norm, text, None, config)
        segments = shared.visual_segment, shared.cross_segment
        v = _heads(config, self.v(text))
        out = attend(q, k, v, *segments, implementation=config.attention, sequence="replicated")
        return constrain(self.out(out.reshape(*out.shape[:2], -1)), "batch", "tokens", None)


class DualBlock(nnx.Module):
    """Visual and text streams with separate weights and a joint attention; adaLN in six parts for each stream."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        dim, inner = config.hidden_size, config.attention_dim
        for stream in ("img", "txt"):
            parts = {
                "mod": linear(config, dim, 6 * dim, rngs=rngs, init=ZEROS, dtype=jnp.float32),
                "q": linear(config, dim, inner, rngs=rngs, bias=config.qkv_bias),
                "k": linear(config, dim, inner, rngs=rngs, bias=config.qkv_bias),
                "v": linear(config, dim, inner, rngs=rngs, bias=config.qkv_bias),
                "q_norm": HeadNorm(config),
                "k_norm": HeadNorm(config),
                "out": linear(config, inner, dim, rngs=rngs),
                "mlp": MLP(config, rngs=rngs),
            }
            for name, part in parts.items():
                setattr(self, f"{stream}_{name}", part)
        if config.text_cross_attention_dual:
            self.cross = TextAttention(config, rngs=rngs)
        for name, module in _frame_attention(config, rngs).items():
            setattr(self, name, module)

    def _project(self, stream: str, x: jax.Array, turn: rope.Rotation) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Normalised, rotated queries and keys, and values, each (B, n, heads, D)."""
        q, k, v, q_norm, k_norm = (getattr(self, f"{stream}_{name}") for name in ("q", "k", "v", "q_norm", "k_norm"))
        return (
            _by_token(_turned(q, q_norm, x, turn, self.config)),
            _by_token(_turned(k, k_norm, x, turn, self.config)),
            _by_token(_heads(self.config, v(x))),
        )

    def __call__(
        self, streams: tuple[jax.Array, jax.Array], shared: Shared, span: slice
    ) -> tuple[jax.Array, jax.Array]:
        """(visual (B, N, hidden), text (B, L, hidden)) -> the same."""
        config, (visual, text) = self.config, streams
        vs1, vc1, vg1, vs2, vc2, vg2 = jnp.split(self.img_mod(shared.vec), 6, -1)
        ts1, tc1, tg1, ts2, tc2, tg2 = jnp.split(self.txt_mod(shared.vec), 6, -1)
        vclean, tclean = shared.visual_clean, shared.text_clean

        visual_qkv = self._project("img", modulate(visual, vs1, vc1, vclean, config), shared.visual_rope)
        text_in = modulate(text, ts1, tc1, tclean, config)
        text_qkv = self._project("txt", text_in, shared.text_rope)
        q, k, v = (jnp.concatenate(pair, 1) for pair in zip(visual_qkv, text_qkv, strict=True))
        segment = jnp.concatenate([shared.visual_segment, shared.text_segment], 1)
        out = attend(q, k, v, segment, segment, implementation=config.attention, sequence=config.sequence_attention)
        out = checkpoint_name(out.reshape(*out.shape[:2], -1), "attention")

        n = visual.shape[1]
        visual_out = self.img_out(constrain(out[:, :n], "batch", "tokens", "local_heads"))
        visual = gated(visual, vg1, vclean, visual_out)
        if config.text_cross_attention_dual:
            visual = visual + self.cross(visual_out, text_in, shared)
        text = gated(text, tg1, tclean, self.txt_out(constrain(out[:, n:], "batch", "tokens", "local_heads")))
        visual = _add_conditions(self, visual, shared, span)
        visual = gated(visual, vg2, vclean, self.img_mlp(modulate(visual, vs2, vc2, vclean, config)))
        text = gated(text, tg2, tclean, self.txt_mlp(modulate(text, ts2, tc2, tclean, config)))
        return constrain(visual, "batch", "tokens", None), text


class SingleBlock(nnx.Module):
    """One stream [visual, text] with attention and MLP in parallel; adaLN in three parts.

    In the decoder tail (`decoder`) the encoded visual tokens take the place of text.
    """

    def __init__(self, config: ModelConfig, *, decoder: bool = False, rngs: nnx.Rngs):
        self.config = config
        dim, inner = config.hidden_size, config.attention_dim
        self.mod = linear(config, dim, 3 * dim, rngs=rngs, init=ZEROS, dtype=jnp.float32)
        self.q = linear(config, dim, inner, rngs=rngs, bias=config.qkv_bias)
        self.k = linear(config, dim, inner, rngs=rngs, bias=config.qkv_bias)
        self.v = linear(config, dim, inner, rngs=rngs, bias=config.qkv_bias)
        self.q_norm, self.k_norm = HeadNorm(config), HeadNorm(config)
        self.mlp_in = linear(config, dim, config.mlp_hidden, rngs=rngs)
        if config.mlp_activation == "swiglu":
            self.mlp_gate = linear(config, dim, config.mlp_hidden, rngs=rngs)
        # HunyuanVideo's linear2 over [attention, mlp], split into two kernels so that both shard over `tensor`.
        self.out = linear(config, inner, dim, rngs=rngs)
        self.mlp_out = linear(config, config.mlp_hidden, dim, rngs=rngs, bias=False)
        self.has_cross = config.text_cross_attention_single and not decoder
        if self.has_cross:
            self.cross = TextAttention(config, rngs=rngs)
        for name, module in _frame_attention(config, rngs).items():
            setattr(self, name, module)

    def __call__(self, x: jax.Array, shared: Shared, span: slice) -> jax.Array:
        """x (B, N + L, hidden) -> the same; visual tokens first."""
        config = self.config
        shift, scale, gate = jnp.split(self.mod(shared.vec), 3, -1)
        clean = jnp.concatenate([shared.visual_clean, shared.text_clean], 1)
        turn = rope.concatenate(shared.visual_rope, shared.text_rope)
        segment = jnp.concatenate([shared.visual_segment, shared.text_segment], 1)
        h = modulate(x, shift, scale, clean, config)
        q = _by_token(_turned(self.q, self.q_norm, h, turn, config))
        k = _by_token(_turned(self.k, self.k_norm, h, turn, config))
        v = _by_token(_heads(config, self.v(h)))
        out = attend(q, k, v, segment, segment, implementation=config.attention, sequence=config.sequence_attention)
        out = checkpoint_name(out.reshape(*out.shape[:2], -1), "attention")
        out = constrain(out, "batch", "tokens", "local_heads")
        if self.has_cross:
            n = shared.visual_segment.shape[1]
            crossed = out[:, :n] + self.cross(out[:, :n], h[:, n:], shared)
            out = constrain(jnp.concatenate([crossed, out[:, n:]], 1), "batch", "tokens", None)
        hidden = constrain(self.mlp_in(h), "batch", "tokens", "mlp")
        hidden = swiglu(hidden, self.mlp_gate(h)) if config.mlp_activation == "swiglu" else gelu(hidden)
        x = gated(x, gate, clean, self.out(out) + self.mlp_out(hidden))
        return constrain(_add_conditions(self, x, shared, span), "batch", "tokens", None)


def stack(block: Callable[..., nnx.Module], config: ModelConfig, depth: int, *, rngs: nnx.Rngs) -> nnx.Module | None:
    """`depth` blocks as one module whose parameters have a leading layer axis; None if there are none."""
    if not depth:
        return None

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return block(config, rngs=rngs)

    return create(rngs)


def run(blocks: nnx.Module | None, streams: Any, config: ModelConfig, shared: Shared, span: slice) -> Any:
    """Runs stacked blocks in order, by `lax.scan` or unrolled, under the config's remat policy."""
    if blocks is None:
        return streams
    graph, state = nnx.split(blocks)

    def body(streams, layer):
        return nnx.merge(graph, layer)(streams, shared, span), None

    if config.remat != "none":
        policies = jax.checkpoint_policies
        policy = {
            "full": policies.nothing_saveable,
            "dots": policies.dots_with_no_batch_dims_saveable,
            "attention": policies.save_only_these_names("attention"),
        }[config.remat]
        body = jax.checkpoint(body, policy=policy, prevent_cse=not config.scan_blocks)
    if config.scan_blocks:
        return jax.lax.scan(body, streams, state)[0]
    depth = jax.tree.leaves(state)[0].shape[0]
    for i in range(depth):
        streams, _ = body(streams, jax.tree.map(lambda x, i=i: x[i], state))
    return streams
