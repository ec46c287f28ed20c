"""Forward and backward pass of a HunyuanVideo-like network: ours against diffusers' PyTorch class, on this CPU.

python -m benchmarks.mmdit_torch [--tokens=2048] [--text=64] [--heads=8] [--head_dim=64] [--dual=2] [--single=4]
    [--repeats=5] [--output=FILE.json]        (in .venv-parity, which has PyTorch)

Both have the same weights and inputs and compute the gradients of all parameters and of the input. They alternate, so
that the machine's load affects both. Prints seconds and the ratio theirs / ours: above 1 ours is faster.
"""

import dataclasses
import math
import statistics
import tempfile
import timeit
from collections import ChainMap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import jax
import numpy as np
import torch
from absl import flags
from flax import nnx

from benchmarks import side_by_side
from omnihuman_jax import command
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.models.dit.mmdit import OmniHuman
from omnihuman_jax.models.functional import Network
from omnihuman_jax.tokens import unpatchify
from omnihuman_jax.weights import formats
from omnihuman_jax.weights.load import Source, load
from omnihuman_jax.weights.names import is_condition, our_shapes
from omnihuman_jax.weights.read import open_files

NAMING = "hunyuan_diffusers"
CHANNELS, TEXT_DIM, POOLED = 16, 256, 64


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers of visual tokens, text tokens, heads, channels per head and blocks."""

    tokens: int = 2048
    text: int = 64
    heads: int = 8
    head_dim: int = 64
    dual: int = 2
    single: int = 4


def define_flags() -> None:
    """The command's flags."""
    side_by_side.define_flags(Sizes, repeats=5, timed="Timed runs of each side, after one that is not timed.")


def model_config(sizes: Sizes) -> ModelConfig:
    """Our configuration of the network."""
    spatial = 2 * (7 * sizes.head_dim // 32)
    return ModelConfig(
        latent_channels=CHANNELS,
        hidden_size=sizes.heads * sizes.head_dim,
        num_heads=sizes.heads,
        num_dual_blocks=sizes.dual,
        num_single_blocks=sizes.single,
        mlp_hidden=4 * sizes.heads * sizes.head_dim,
        rope_axes=(sizes.head_dim - 2 * spatial, spatial, spatial),
        text_dim=TEXT_DIM,
        text_len=sizes.text,
        text_refiner_depth=2,
        pooled_text_dim=POOLED,
        guidance_embed=True,
    )


def make_inputs(sizes: Sizes) -> dict[str, np.ndarray]:
    """One sample of `tokens` patches, as square as possible, in 8 latent frames if 8 divides them."""
    frames = math.gcd(sizes.tokens, 8)
    per_frame = sizes.tokens // frames
    rows = max(n for n in range(1, math.isqrt(per_frame) + 1) if per_frame % n == 0)
    rng = np.random.default_rng(0)
    shape = (1, frames, 2 * rows, 2 * per_frame // rows, CHANNELS)

    def draw(*size: int) -> np.ndarray:
        return rng.standard_normal(size).astype(np.float32)

    return {
        "x": draw(*shape),
        "cotangent": draw(*shape),
        "t": np.array([0.5], np.float32),
        "text": draw(1, sizes.text, TEXT_DIM),
        "mask": np.ones((1, sizes.text), bool),
        "pooled": draw(1, POOLED),
        "guidance": np.array([6.0], np.float32),
    }


def theirs(sizes: Sizes, inputs: dict[str, np.ndarray], folder: Path, dtype: str) -> Callable[[], np.ndarray]:
    """Their step, which returns the gradient of x, channels first; writes the weights to `folder`."""
    torch.manual_seed(0)
    config = formats.FORMATS[NAMING].class_config(model_config(sizes))
    model = diffusers.HunyuanVideoTransformer3DModel(**{k: v for k, v in config.items() if k != "_class_name"})
    model.save_pretrained(folder)
    kind = getattr(torch, dtype)
    model = model.to(kind)
    x, cotangent = (torch.from_numpy(inputs[name].transpose(0, 4, 1, 2, 3).copy()) for name in ("x", "cotangent"))
    x, cotangent = x.to(kind).requires_grad_(), cotangent.to(kind)
    arguments = {
        "timestep": 1000 * torch.from_numpy(inputs["t"]),
        "encoder_hidden_states": torch.from_numpy(inputs["text"]).to(kind),
        "encoder_attention_mask": torch.from_numpy(inputs["mask"]),
        "pooled_projections": torch.from_numpy(inputs["pooled"]).to(kind),
        "guidance": 1000 * torch.from_numpy(inputs["guidance"]),
    }

    def step() -> np.ndarray:
        model.zero_grad()
        x.grad = None
        (model(hidden_states=x, **arguments).sample * cotangent).sum().backward()
        return x.grad.float().numpy()

    return step


def ours(sizes: Sizes, inputs: dict[str, np.ndarray], folder: Path, dtype: str) -> Callable[[], np.ndarray]:
    """Our step with the weights in `folder`, without the gradients of the condition modules."""
    config = dataclasses.replace(model_config(sizes), dtype=dtype, param_dtype=dtype, motion_frames=0)
    network = Network(config)
    files = open_files(folder)
    entries = formats.base_entries(NAMING, config, network.abstract_params)
    shapes = our_shapes(network.abstract_params)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if is_condition(name)}
    params = load(ChainMap(Source(files, entries), zeros), network.abstract_params)
    b, _, h, w, c = inputs["x"].shape
    batch = {
        "motion": np.zeros((b, 0, h, w, c), np.float32),
        "has_motion": np.zeros(b, bool),
        "reference": np.zeros((b, h, w, c), np.float32),
        "text": inputs["text"],
        "text_mask": inputs["mask"],
        "active": np.array([[True, False, False, False]]),
    }

    graph, state = nnx.split(nnx.eval_shape(lambda: OmniHuman(config, rngs=nnx.Rngs(0))))

    def velocity(params: Any, x: jax.Array) -> jax.Array:
        leaves = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(leaves, params)
        model = nnx.merge(graph, leaves)
        embedded = model.embed(x, inputs["t"], batch, pooled=inputs["pooled"], guidance=inputs["guidance"])
        # The base model has no reference tokens, so keep only the video tokens.
        video = jax.tree.map(lambda leaf: leaf[:, -sizes.tokens :], embedded.visual)
        return unpatchify(model.trunk(embedded._replace(visual=video)), x.shape[1:4], config.patch_size)

    @jax.jit
    def gradients(params: Any, x: jax.Array) -> Any:
        return jax.grad(lambda p, x: (velocity(p, x) * inputs["cotangent"]).sum(), (0, 1))(params, x)

    def step() -> np.ndarray:
        grads = jax.block_until_ready(gradients(params, inputs["x"]))
        return np.asarray(grads[1], np.float32).transpose(0, 4, 1, 2, 3)

    return step


def compare(sizes: Sizes, dtype: str, repeats: int) -> dict[str, Any]:
    """Times both sides and compares the gradients of x."""
    inputs = make_inputs(sizes)
    with tempfile.TemporaryDirectory() as folder:
        steps = {"theirs": theirs(sizes, inputs, Path(folder), dtype), "ours": ours(sizes, inputs, Path(folder), dtype)}
    first = {name: step() for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            seconds[name].append(timeit.timeit(step, number=1))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return side_by_side.comparison(dtype, sizes, medians, first)


def main() -> None:
    """Entry point."""
    sizes = side_by_side.read_sizes(Sizes)
    results = []
    for dtype in ("float32", "bfloat16"):
        result = compare(sizes, dtype, flags.FLAGS.repeats)
        print(
            f"{dtype}: ours {result['ours_seconds']:.3f} s, PyTorch {result['theirs_seconds']:.3f} s, theirs / ours "
            f"{result['ratio']:.2f}, gradients differ by {result['agreement']:.1e}",
            flush=True,
        )
        results.append(result)
    side_by_side.write_results(results)


if __name__ == "__main__":
    define_flags()
    command.run_main(main)
