"""What the processes of a job find in their environment: the compiler's flags of each generation, with reasons."""

import dataclasses

from tpu.jobs.tpu_types import TpuType


@dataclasses.dataclass(frozen=True)
class CompilerFlags:
    """Flags of libtpu that belong together.

    libtpu ends a process at once for a flag that it does not know, so a test compiles for every generation with its
    flags and the libtpu of requirements.txt.

    Attributes:
      flags: as in LIBTPU_INIT_ARGS.
      generations: that get them.
      reason: why.
      several_slices: only where there are several.
    """

    flags: tuple[str, ...]
    generations: tuple[str, ...]
    reason: str
    several_slices: bool = False


# Not here: sets that offload collectives to the SparseCores, and scheduler sets with 20 flags. Peers use them on v6e
# and tpu7x, but such a set made a v5p job of a peer hang, and none has been measured with this step.
COMPILER_FLAGS = (
    CompilerFlags(
        (
            "--xla_tpu_enable_async_collective_fusion=true",
            "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
            "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
            "--xla_tpu_overlap_compute_collective_tc=true",
            "--xla_enable_async_all_gather=true",
        ),
        ("v4", "v5e", "v5p", "v6e"),  # on tpu7x they change nothing: its SparseCores gather
        "FSDP gathers every block's parameters: gathered while the block before is computed instead of between the two",
    ),
    CompilerFlags(
        (
            "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
            "--xla_tpu_data_parallel_opt_different_sized_ops=true",
        ),
        ("v4", "v5e", "v5p", "v6e", "tpu7x"),
        "slices lie along data: gradients cross the network between slices while the rest of the backward pass runs",
        several_slices=True,
    ),
)


def compiler_flags(tpu: TpuType, num_slices: int) -> str:
    """LIBTPU_INIT_ARGS of a job."""
    chosen = (
        row
        for row in COMPILER_FLAGS
        if tpu.generation in row.generations and (num_slices > 1 or not row.several_slices)
    )
    return " ".join(flag for row in chosen for flag in row.flags)


def training_environment(tpu: TpuType, num_slices: int) -> dict[str, str]:
    """Environment of the processes that train."""
    return {
        # Without "tpu" first, JAX would train on the CPU of a host whose TPU does not start.
        "JAX_PLATFORMS": "tpu,cpu",
        "LIBTPU_INIT_ARGS": compiler_flags(tpu, num_slices),
    }


def preflight_environment(tpu: TpuType, num_slices: int) -> dict[str, str]:
    """Environment of the preflight, which compiles what the job will run, on CPUs."""
    return {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": compiler_flags(tpu, num_slices)}
