"""What the processes of a job find in their environment: the compiler's flags of each generation, with reasons.

libtpu ends a process at once for a flag that it does not know, so a test compiles for every generation with its flags
and the libtpu of requirements.txt. Not here: sets that offload collectives to the SparseCores, and scheduler sets with
20 flags. Peers use them on v6e and tpu7x, but such a set made a v5p job of a peer hang, and none has been measured with
this step.
"""

from tpu.jobs.tpu_types import TpuType

CACHE = "/tmp/omnihuman"  # of downloaded records, on the host's own disk

# FSDP gathers every block's parameters: gathered while the block before is computed instead of between the two.
_GATHER_EARLY = (
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
    "--xla_enable_async_all_gather=true",
)
_GATHERING = ("v4", "v5e", "v5p", "v6e")  # on tpu7x these change nothing: its SparseCores gather
# Slices lie along data: gradients cross the network between slices while the rest of the backward pass runs.
_SEVERAL_SLICES = (
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
    "--xla_tpu_data_parallel_opt_different_sized_ops=true",
)


def compiler_flags(tpu: TpuType, num_slices: int) -> str:
    """LIBTPU_INIT_ARGS of a job."""
    chosen = _GATHER_EARLY if tpu.generation in _GATHERING else ()
    return " ".join(chosen + (_SEVERAL_SLICES if num_slices > 1 else ()))


def environment(tpu: TpuType, num_slices: int, *, platforms: str = "tpu,cpu") -> dict[str, str]:
    """Environment of the processes that train, and with "cpu" of the preflight, which compiles the same on CPUs."""
    # Without "tpu" first, JAX would train on the CPU of a host whose TPU does not start.
    own = {"JAX_PLATFORMS": platforms, "LIBTPU_INIT_ARGS": compiler_flags(tpu, num_slices)}
    return own | {"OMNIHUMAN_CACHE": CACHE}
