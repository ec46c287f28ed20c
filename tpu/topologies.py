"""TPU generations and topologies: "v5p:4x4x4" -> compile-only devices and the properties of a chip."""

import dataclasses
import math
import re
from collections.abc import Mapping

import jax
from jax.experimental import topologies

from omnihuman_jax.errors import UserError, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Generation:
    """Properties of a TPU generation.

    Attributes:
      devices_per_chip: JAX devices per chip; 2 on tpu7x, each with its own memory.
      hbm_gib: HBM of one device that the compiler may use, GiB (from its out-of-memory error; some HBM is reserved).
      peak_flops: published dense bfloat16 FLOP/s of a chip.
      clock_hz: clock of the cores, peak_flops divided by the matrix units' FLOPs per cycle.
      dims: dimensions of the topology (2: torus or mesh of columns x rows; 3: torus).
      sizes: available layouts.
      options: more arguments of libtpu's topology.
    """

    devices_per_chip: int
    hbm_gib: float
    peak_flops: float
    clock_hz: float
    dims: int
    sizes: tuple[str, ...]
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)


_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")

# HBM as the compiler reports it (libtpu 0.0.42.1); peak FLOP/s from Google Cloud's pages on each generation.
GENERATIONS: dict[str, Generation] = {
    # v4 runs in megacore mode: both cores of a chip are one device.
    "v4": Generation(1, 30.75, 275e12, 1.05e9, 3, _CUBES, {"chip_config_name": "megacore"}),
    "v5e": Generation(1, 15.75, 197e12, 1.5e9, 2, _SQUARES),
    "v5p": Generation(1, 95.74, 459e12, 1.75e9, 3, _CUBES),
    "v6e": Generation(1, 31.25, 918e12, 1.75e9, 2, _SQUARES),
    "tpu7x": Generation(2, 94.75, 2307e12, 2.2e9, 3, _CUBES),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more equal slices, connected by the data-centre network, with the compile-only devices of all of them."""

    name: str  # of one slice, as "v5p:4x4x4"
    generation: Generation
    num_slices: int
    devices: tuple[jax.Device, ...]

    @property
    def chips(self) -> int:
        """Number of chips in all slices."""
        return len(self.devices) // self.generation.devices_per_chip


def get_topology(name: str, num_slices: int = 1) -> Topology:
    """The topology called `name`, such as "v5e:4x4" or "v5p:4x4x4"; UserError if libtpu has none like it."""
    kind, _, layout = name.partition(":")
    if kind not in GENERATIONS:
        raise UserError(f"--topology={name}: unknown TPU generation{nearest(kind, GENERATIONS)}; {_examples()}")
    generation = GENERATIONS[kind]
    if num_slices < 1:
        raise UserError(f"--num_slices={num_slices}: must be at least 1")
    offered = f"layouts of {kind}: {', '.join(generation.sizes)}"
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", layout) or layout.count("x") + 1 != generation.dims:
        shape = "x".join("ABC"[: generation.dims])
        raise UserError(f"--topology={name}: {layout!r} is not of the form {shape}; {offered}")
    options = dict(generation.options) | ({"num_slices": num_slices} if num_slices > 1 else {})
    try:
        devices = topologies.get_topology_desc(name, platform="tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise UserError(f"--topology={name}: libtpu refuses it ({str(error).strip()}); {offered}") from error
    expected = math.prod(int(size) for size in layout.split("x")) * generation.devices_per_chip * num_slices
    if len(devices) != expected:
        raise UserError(f"--topology={name}: {len(devices)} devices instead of {expected}; {offered}")
    return Topology(name, generation, num_slices, tuple(devices))


def _examples() -> str:
    return "topologies: " + ", ".join(f"{kind}:{'|'.join(g.sizes)}" for kind, g in GENERATIONS.items())
