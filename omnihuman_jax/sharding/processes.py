"""Several processes as one run: joining them, the rows each reads, and decisions that all take at the same step."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from omnihuman_jax.errors import UserError

# Read by jax.distributed.initialize() itself where no cluster environment tells it.
ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

_LONGEST_WAIT_SECONDS = 3600


def join(coordinator: str, num_processes: int, process_id: int, *, automatic: bool = False) -> int:
    """Joins this process to the others of a run; call before anything touches a JAX backend.

    Args:
      coordinator: HOST:PORT of process 0; "" takes JAX_COORDINATOR_ADDRESS.
      num_processes: processes of the run; 0 takes JAX_NUM_PROCESSES.
      process_id: 0 … num_processes - 1; -1 takes JAX_PROCESS_ID.
      automatic: ask the cluster (Cloud TPU, GKE, Slurm) instead.

    Returns:
      The number of processes; 1, without joining anything, when nothing says that there are others.

    Raises:
      UserError: some of the three are known and some are not, or they do not fit.
    """
    # A SIGTERM before the loop listens shall end the process, not wait in JAX's own notifier.
    jax.config.update("jax_enable_preemption_service", False)
    if automatic:
        jax.distributed.initialize()
        return jax.process_count()
    told = (coordinator, num_processes or "", "" if process_id < 0 else process_id)
    values = [str(value) or os.environ.get(name, "") for value, name in zip(told, ENVIRONMENT, strict=True)]
    if not any(values):
        return 1
    flags = ("--coordinator_address", "--num_processes", "--process_id")
    missing = [f"{flag} (or {name})" for flag, name, value in zip(flags, ENVIRONMENT, values, strict=True) if not value]
    if missing:
        raise UserError(f"a run of several processes also needs {' and '.join(missing)}")
    if not (values[1].isdigit() and values[2].isdigit() and int(values[2]) < int(values[1])):
        raise UserError(f"process {values[2]} of {values[1]}: give a number from 0 to one less than the processes")
    if int(values[1]) > 1:
        jax.distributed.initialize(values[0], int(values[1]), int(values[2]), heartbeat_timeout_seconds=60)
    return int(values[1])


def is_main() -> bool:
    """Whether this process writes the logs."""
    return jax.process_index() == 0


def log(message: str) -> None:
    """Prints a line once for all processes."""
    if is_main():
        print(message, flush=True)


def process_rows(sharding: NamedSharding, rows: int) -> slice:
    """The global rows of a batch that this process's devices hold under the sharding.

    Raises:
      UserError: they are not one contiguous block.
    """
    spans = {s[0].indices(rows)[:2] for s in sharding.addressable_devices_indices_map((rows,)).values()}
    begin, end = min(b for b, _ in spans), max(e for _, e in spans)
    if sum(e - b for b, e in spans) != end - begin:
        raise UserError(
            f"mesh: the batch rows of process {jax.process_index()} are not contiguous ({sorted(spans)}); make "
            f"mesh.sequence x mesh.tensor a divisor or a multiple of the devices of a process"
        )
    return slice(begin, end)


def agreed_problem(problem: str) -> str:
    """What keeps this process, or else another one, from going on; "" when none is kept. All processes call it."""
    if jax.process_count() == 1:
        return problem
    fine = multihost_utils.process_allgather(np.array(not problem))
    return problem or ("" if fine.all() else f"process {int(fine.argmin())} could not read it")


def broadcast_from_main(answer: bool) -> bool:
    """The first process's answer; the others may see a shared folder differently. All processes call it."""
    return answer if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.array(answer)))


def agreed_steps(steps: Sequence[int], most: int = 1024) -> list[int]:
    """The first process's step numbers, the last `most` of them in order."""
    steps = sorted(steps)[-most:]
    if jax.process_count() == 1:
        return steps
    padded = np.full(most, -1, np.int64)
    padded[: len(steps)] = steps
    return [int(step) for step in multihost_utils.broadcast_one_to_all(padded) if step >= 0]


def check_same_on_all(what: str, digest: str) -> None:
    """Raises UserError unless all processes have the same hex digest of something that decides the training."""
    if jax.process_count() == 1:
        return
    words = np.frombuffer(bytes.fromhex(digest)[:32].ljust(32, b"\0"), np.uint32)
    everyones = multihost_utils.process_allgather(words)
    if (everyones != everyones[0]).any():
        other = int((everyones != everyones[0]).any(1).argmax())
        raise UserError(f"{what}: process {other} has another one than process 0; give all processes the same")


def gather(tree: Any) -> Any:
    """Whole arrays in the memory of every host, of arrays that lie on the devices of all. All processes call it."""
    return jax.device_get(tree) if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def wait_for_all(name: str) -> None:
    """Returns when all processes have called it as often; ends with an error when one of them is gone."""
    if jax.process_count() > 1:  # at the coordinator, not by a collective of the devices, which gives up or waits on
        ocp.multihost.sync_global_processes(
            name, processes=set(range(jax.process_count())), timeout=_LONGEST_WAIT_SECONDS
        )


def compile_together(function: Any, *args: Any) -> Callable[..., Any]:
    """Compiles a jitted function for these arguments; returns when all processes have.

    One that runs ahead, because it finds its program in the cache, would give up in its first collective (CPU: 30 s).
    """
    compiled = function.lower(*args).compile()
    wait_for_all("compiled")
    return compiled


class StopConsensus:
    """Lets all processes act on a flag of any of them at one and the same step, without stalling the devices.

    `reached` at the top of every step; the result of the step before is returned, which every process reads alike.
    """

    def __init__(self, mesh: Mesh):
        self._alone = jax.process_count() == 1
        self._before: jax.Array | None = None
        everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._place: Callable[[bool], jax.Array] = lambda flag: jax.make_array_from_callback(
            (mesh.size,), everywhere, lambda index: np.full(len(range(*index[0].indices(mesh.size))), flag, np.int32)
        )
        self._count = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def reached(self, flag: bool) -> bool:
        """Whether any process had raised its flag by the step before (alone: whether this one has by now)."""
        if self._alone:
            return flag
        before, self._before = self._before, self._count(self._place(flag))
        return before is not None and bool(before > 0)
