"""Names that Google Cloud gives to slices: "v5p-128" -> topology, hosts, and the labels that GKE schedules by."""

import dataclasses
import math

from omnihuman_jax.errors import UserError, nearest
from tpu.topologies import GENERATIONS

CHIPS_PER_HOST = 4  # of the machine types below; training slices have no other


@dataclasses.dataclass(frozen=True)
class Series:
    """What Google Cloud calls a generation.

    Attributes:
      prefix: of the cloud name, "v5litepod" in "v5litepod-256".
      counted_per_chip: what the number of a cloud name counts: 2 TensorCores a chip, or 1, the chip itself.
      accelerator: value of the node label cloud.google.com/gke-tpu-accelerator.
      machine_type: of the hosts, with 4 chips each.
      runtime_version: software of a TPU VM; "" where there are none outside GKE.
    """

    prefix: str
    counted_per_chip: int
    accelerator: str
    machine_type: str
    runtime_version: str


SERIES: dict[str, Series] = {
    "v4": Series("v4", 2, "tpu-v4-podslice", "ct4p-hightpu-4t", "tpu-ubuntu2204-base"),
    "v5e": Series("v5litepod", 1, "tpu-v5-lite-podslice", "ct5lp-hightpu-4t", "v2-alpha-tpuv5-lite"),
    "v5p": Series("v5p", 2, "tpu-v5p-slice", "ct5p-hightpu-4t", "v2-alpha-tpuv5"),
    "v6e": Series("v6e", 1, "tpu-v6e-slice", "ct6e-standard-4t", "v2-alpha-tpuv6e"),
    "tpu7x": Series("tpu7x", 2, "tpu7x", "tpu7x-standard-4t", ""),
}


@dataclasses.dataclass(frozen=True)
class TpuType:
    """One slice."""

    generation: str  # key of `tpu.topologies.GENERATIONS`
    layout: str  # chips in each dimension, "4x4x4"

    @property
    def series(self) -> Series:
        """What Google Cloud calls its generation."""
        return SERIES[self.generation]

    @property
    def chips(self) -> int:
        """Chips of the slice."""
        return math.prod(int(size) for size in self.layout.split("x"))

    @property
    def hosts(self) -> int:
        """Machines of the slice, and so processes of a run on it."""
        return self.chips // CHIPS_PER_HOST

    @property
    def devices(self) -> int:
        """JAX devices of the slice."""
        return self.chips * GENERATIONS[self.generation].devices_per_chip

    @property
    def cloud_name(self) -> str:
        """ "v5p-128": what gcloud and xpk call it."""
        return f"{self.series.prefix}-{self.chips * self.series.counted_per_chip}"

    @property
    def topology(self) -> str:
        """ "v5p:4x4x4": what `tpu.plan` calls it."""
        return f"{self.generation}:{self.layout}"

    def describe(self) -> str:
        """For the terminal: what is taken for the name, since some count TensorCores and some chips."""
        return (
            f"{self.cloud_name}: {self.chips} chips as {self.layout}, {self.hosts} hosts of "
            f"{self.series.machine_type}, {self.devices} JAX devices"
        )


_ALL = [TpuType(kind, layout) for kind, generation in GENERATIONS.items() for layout in generation.sizes]
TPU_TYPES: dict[str, TpuType] = {tpu.cloud_name: tpu for tpu in _ALL}


def get_tpu_type(name: str) -> TpuType:
    """The slice of a cloud name such as "v5p-128" or of a topology as `tpu.plan` has it; UserError if there is none."""
    found = TPU_TYPES.get(name) or next((tpu for tpu in _ALL if tpu.topology == name), None)
    if found:
        return found
    kind = name.replace(":", "-").partition("-")[0]
    of_kind = [n for n, tpu in TPU_TYPES.items() if kind in (tpu.series.prefix, tpu.generation)]
    if of_kind:
        raise UserError(f"--tpu_type={name}: no such slice; {kind} has {', '.join(of_kind)}")
    raise UserError(f"--tpu_type={name}: unknown TPU type{nearest(name, TPU_TYPES)}")
