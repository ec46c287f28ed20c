"""Seconds and peak memory of the Wan2.1 VAE: ours against diffusers' PyTorch class, on this CPU.

python -m benchmarks.vae_torch [--dim=96] [--frames=17] [--height=128] [--width=128] [--repeats=3]
    [--output=FILE.json]        (in .venv-parity, which has PyTorch)

Both have the same weights and clip. The tasks are encoding, decoding, and training: the gradients of the squared
reconstruction error with respect to all parameters and the clip. Both stream in chunks of one latent frame; in
training only diffusers does. Every measurement runs in a new process, and the sides alternate. Prints the ratios
theirs / ours: above 1 ours is faster, or needs less memory.
"""

import dataclasses
import multiprocessing
import re
import statistics
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks import side_by_side
from omnihuman_jax import command
from omnihuman_jax.errors import UserError

CHANNELS = 16
TASKS = ("encode", "decode", "train")
ROUNDS = 2  # processes per side and task


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Channels of the first level (Wan2.1: 96), frames 1 + 4n, height and width in pixels."""

    dim: int = 96
    frames: int = 17
    height: int = 128
    width: int = 128


def define_flags() -> None:
    """The command's flags."""
    side_by_side.define_flags(Sizes, repeats=3, timed="Timed runs per process, after one that is not timed.")


def make_inputs(sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """A clip (1, F, H, W, 3) in [-1, 1] and latents (1, T, H/8, W/8, 16)."""
    rng = np.random.default_rng(0)
    clip = rng.uniform(-1, 1, (1, sizes.frames, sizes.height, sizes.width, 3))
    latents = rng.standard_normal((1, 1 + (sizes.frames - 1) // 4, sizes.height // 8, sizes.width // 8, CHANNELS))
    return clip.astype(np.float32), latents.astype(np.float32)


def theirs(task: str, sizes: Sizes, folder: str, dtype: str) -> Callable[[], np.ndarray]:
    """diffusers' side of a task; its result has channels last."""
    import diffusers
    import torch

    kind = getattr(torch, dtype)
    vae = diffusers.AutoencoderKLWan.from_pretrained(folder, torch_dtype=kind)
    clip, latents = (torch.from_numpy(x.transpose(0, 4, 1, 2, 3).copy()).to(kind) for x in make_inputs(sizes))

    def run() -> np.ndarray:
        if task == "train":
            vae.zero_grad()
            x = clip.clone().requires_grad_()
            decoded = vae.decode(vae.encode(x).latent_dist.mean).sample
            (decoded - clip).square().sum().backward()
            out = x.grad
        else:
            with torch.no_grad():
                out = vae.encode(clip).latent_dist.mean if task == "encode" else vae.decode(latents).sample
        return out.float().numpy().transpose(0, 2, 3, 4, 1)

    return run


def ours(task: str, sizes: Sizes, folder: str, dtype: str) -> Callable[[], np.ndarray]:
    """Our side of a task; encodes and decodes one latent frame at a time, but trains on the whole clip."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from omnihuman_jax.models.vae.streaming import decode_clip, encode_clip
    from omnihuman_jax.models.vae.vae import load_vae

    vae = load_vae({"checkpoint": f"{folder}/ours.safetensors", "dtype": dtype})
    clip, latents = make_inputs(sizes)
    mean, std = (np.asarray(x, np.float32) for x in (vae.config.latent_mean, vae.config.latent_std))
    if task == "encode":
        return lambda: encode_clip(vae, clip, latents=1) * std + mean
    if task == "decode":
        return lambda: decode_clip(vae, (latents - mean) / std, latents=1)
    graph, state = nnx.split(vae)

    @jax.jit
    def gradients(state: Any, clip: jax.Array) -> Any:
        def error(state: Any, x: jax.Array) -> jax.Array:
            vae = nnx.merge(graph, state)
            return jnp.square(jnp.clip(vae.decode_raw(vae.encode_moments(x)[0]), -1, 1) - clip).sum()

        return jax.grad(error, (0, 1))(state, clip)

    return lambda: np.asarray(jax.block_until_ready(gradients(state, clip))[1], np.float32)


def write_weights(sizes: Sizes, folder: str) -> None:
    """Writes random weights in diffusers' format and in ours."""
    import diffusers
    import torch

    from omnihuman_jax.models.vae.vae import save_vae
    from omnihuman_jax.weights import wan_vae

    torch.manual_seed(0)
    diffusers.AutoencoderKLWan(base_dim=sizes.dim, z_dim=CHANNELS).save_pretrained(folder)
    save_vae(f"{folder}/ours.safetensors", wan_vae.load(folder))


def _memory(field: str) -> int:
    """Bytes of this process from /proc: VmRSS is the current memory, VmHWM the peak."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


def measure(side: str, task: str, sizes: Sizes, folder: str, dtype: str, repeats: int) -> dict[str, Any]:
    """Runs one side in this process: seconds of each run, peak bytes in addition to the model, and the result."""
    run = {"ours": ours, "theirs": theirs}[side](task, sizes, folder, dtype)
    loaded = _memory("VmRSS")
    result = run()  # compiles
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    seconds = timeit.repeat(run, number=1, repeat=repeats)
    return {"seconds": seconds, "peak_bytes": _memory("VmHWM") - loaded, "result": result}


def compare(task: str, sizes: Sizes, folder: str, dtype: str, repeats: int) -> dict[str, Any]:
    """Measures both sides of a task in alternation."""
    sides: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    for _ in range(ROUNDS):
        for side, runs in sides.items():
            runs.append(_in_new_process(measure, side, task, sizes, folder, dtype, repeats))
    seconds = {side: statistics.median(s for run in runs for s in run["seconds"]) for side, runs in sides.items()}
    results = {side: runs[0]["result"] for side, runs in sides.items()}
    ours, theirs = (max(run["peak_bytes"] for run in sides[side]) for side in ("ours", "theirs"))
    memory = {"ours_peak_bytes": ours, "theirs_peak_bytes": theirs, "memory_ratio": theirs / ours}
    return side_by_side.comparison(dtype, sizes, seconds, results) | {"task": task, **memory}


def _in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """The function's result from a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def main() -> None:
    """Entry point."""
    sizes = side_by_side.read_sizes(Sizes)
    if sizes.frames % 4 != 1 or sizes.height % 8 or sizes.width % 8:
        raise UserError(f"{sizes}: frames must be 1 + 4n, height and width multiples of 8; change the flags")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        _in_new_process(write_weights, sizes, folder)
        for dtype in ("float32", "bfloat16"):
            for task in TASKS:
                result = compare(task, sizes, folder, dtype, flags.FLAGS.repeats)
                print(
                    f"{task} {dtype}: ours {result['ours_seconds']:.2f} s and {result['ours_peak_bytes'] / 2**30:.2f} "
                    f"GiB, PyTorch {result['theirs_seconds']:.2f} s and {result['theirs_peak_bytes'] / 2**30:.2f} GiB; "
                    f"theirs / ours {result['ratio']:.2f} in time, {result['memory_ratio']:.2f} in memory; results "
                    f"differ by {result['agreement']:.1e}",
                    flush=True,
                )
                results.append(result)
                side_by_side.write_results(results)  # after each task, since all of them take long


if __name__ == "__main__":
    define_flags()
    command.run_main(main)
