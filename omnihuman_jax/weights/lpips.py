"""LPIPS weights, in the naming of `lpips.LPIPS(net="vgg").state_dict()`, as safetensors:

    net.slice{1..5}.{i}.weight, .bias     VGG-16's convolutions; i is torchvision's index in `features`
    lin{0..4}.model.1.weight              the channels' weights, (1, width, 1, 1)

`lins.*` (copies of these weights) and `scaling_layer.*` are ignored.
"""

from __future__ import annotations

import re
from pathlib import Path

from flax import nnx

from omnihuman_jax.models.vae.perceptual import CONVOLUTIONS, LPIPS, WIDTHS
from omnihuman_jax.weights import modules
from omnihuman_jax.weights.names import PLAIN, Entry, expanded, one_to_one, permuted
from omnihuman_jax.weights.read import open_files

UNUSED = (r"lins\..*", r"scaling_layer\.(shift|scale)")


def _index(level: int, convolution: int) -> int:
    """torchvision's index: a ReLU follows every convolution, and a pooling precedes every level but the first."""
    return 2 * (sum(CONVOLUTIONS[:level]) + convolution) + level


def entries(widths: tuple[int, ...] = WIDTHS) -> list[Entry]:
    """One entry per parameter: kernels (3, 3, in, out) <- (out, in, 3, 3), weights (C,) <- (1, C, 1, 1)."""
    made = []
    for ours, shape in modules.parameter_shapes(lambda: LPIPS(widths, rngs=nnx.Rngs(0))).items():
        inside = re.fullmatch(r"levels\.(\d+)\.(\d+)\.(kernel|bias)", ours)
        if inside:
            level, convolution = int(inside[1]), int(inside[2])
            name = {"kernel": "weight", "bias": "bias"}[inside[3]]
            theirs = f"net.slice{level + 1}.{_index(level, convolution)}.{name}"
            made.append(one_to_one(theirs, ours, shape, permuted((3, 2, 0, 1)) if len(shape) == 4 else PLAIN))
        else:
            made.append(one_to_one(f"lin{ours.rpartition('.')[2]}.model.1.weight", ours, shape, expanded((0, 2, 3))))
    return made


def load(path: str | Path, widths: tuple[int, ...] = WIDTHS) -> LPIPS:
    """Reads a safetensors file; UserError if a tensor is unreadable, missing, unexpected, misshapen or not finite."""
    return modules.load(lambda: LPIPS(widths, rngs=nnx.Rngs(0)), open_files(path, UNUSED), entries(widths))
