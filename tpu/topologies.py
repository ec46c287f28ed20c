"""TPU generations and topologies: "v5p:4x4x4" -> compile-only devices, and what a chip has."""

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
    """What a chip of a generation has.

    Attributes:
      devices_per_chip: JAX devices a chip; 2 on tpu7x, whose chip is two devices with a memory each.
      hbm_gib: HBM of one device that the compiler may use, GiB (what its out-of-memory error names; some is reserved).
      chip_hbm_gib: HBM of a chip as sold, GiB.
      peak_flops: dense bfloat16 FLOP/s of a chip, as published.
      clock_hz: clock of the cores, from peak_flops over the matrix units' multiply-adds a cycle.
      dims: number of dimensions of the topology (2: torus or mesh of columns x rows; 3: torus).
      sizes: layouts that are offered.
      options: further arguments of libtpu's topology.
    """

    devices_per_chip: int
    hbm_gib: float
    chip_hbm_gib: int
    peak_flops: float
    clock_hz: float
    dims: int
    sizes: tuple[str, ...]
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)


_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")

# HBM as the compiler reports it (libtpu 0.0.42.1); peak FLOP/s from Google Cloud's pages on each generation.
GENERATIONS: dict[str, Generation] = {
    # Megacore, as v4 machines run: both cores of a chip are one device.
    "v4": Generation(1, 30.75, 32, 275e12, 1.05e9, 3, _CUBES, {"chip_config_name": "megacore"}),
    "v5e": Generation(1, 15.75, 16, 197e12, 1.5e9, 2, _SQUARES),
    "v5p": Generation(1, 95.74, 95, 459e12, 1.75e9, 3, _CUBES),
    "v6e": Generation(1, 31.25, 32, 918e12, 1.75e9, 2, _SQUARES),
    "tpu7x": Generation(2, 94.75, 192, 2307e12, 2.2e9, 3, _CUBES),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more equal slices, with the devices to compile for.

    Attributes:
      name: as given, "v5p:4x4x4".
      generation: what its chips have.
      num_slices: slices, joined over the data-centre network.
      devices: compile-only devices of all slices.
    """

    name: str
    generation: Generation
    num_slices: int
    devices: tuple[jax.Device, ...]

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return len(self.devices) // self.generation.devices_per_chip

    @property
    def hbm_bytes(self) -> int:
        """HBM of one device that the compiler may use, bytes."""
        return int(self.generation.hbm_gib * GIB)

    @property
    def device_peak_flops(self) -> float:
        """Dense bfloat16 FLOP/s of one device."""
        return self.generation.peak_flops / self.generation.devices_per_chip


def get_topology(name: str, num_slices: int = 1) -> Topology:
    """The topology of a name such as "v5e:4x4" or "v5p:4x4x4".

    Raises:
      UserError: unknown generation, a layout that libtpu refuses, fewer than one slice.
    """
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
        raise UserError(f"--topology={name}: {len(devices)} devices where {expected} were expected; {offered}")
    return Topology(name, generation, num_slices, tuple(devices))


def _examples() -> str:
    return "topologies: " + ", ".join(f"{kind}:{'|'.join(g.sizes)}" for kind, g in GENERATIONS.items())
