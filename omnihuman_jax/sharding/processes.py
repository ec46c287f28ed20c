"""Multi-process runs: joining processes, the batch rows each reads, and decisions taken together at one step."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from omnihuman_jax.errors import UserError

# jax.distributed.initialize() reads the same variables if it detects no cluster.
ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

_LONGEST_WAIT_SECONDS = 3600


def join(coordinator: str, num_processes: int, process_id: int, *, automatic: bool = False) -> int:
    """Joins this process to a run; call before anything touches a JAX backend.

    Args:
      coordinator: HOST:PORT of process 0; "" = JAX_COORDINATOR_ADDRESS.
      num_processes: processes of the run; 0 = JAX_NUM_PROCESSES.
      process_id: 0 … num_processes - 1; -1 = JAX_PROCESS_ID.
      automatic: let JAX detect all three from the cluster (Cloud TPU, GKE, Slurm).

    Returns:
      The number of processes; 1, without joining, if none of the three is set.

    Raises:
      UserError: only some of the three are set, or they do not fit.
    """
    # Before the loop installs its handler, SIGTERM must end the process; JAX's preemption service would catch it.
    jax.config.update("jax_enable_preemption_service", False)
    if automatic:
        jax.distributed.initialize()
        return jax.process_count()
    arguments = (coordinator, num_processes or "", "" if process_id < 0 else process_id)
    values = [str(value) or os.environ.get(name, "") for value, name in zip(arguments, ENVIRONMENT, strict=True)]
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
    """The rows of a batch that this process's devices hold; UserError if they are not one contiguous block."""
    spans = {s[0].indices(rows)[:2] for s in sharding.addressable_devices_indices_map((rows,)).values()}
    begin, end = min(b for b, _ in spans), max(e for _, e in spans)
    if sum(e - b for b, e in spans) != end - begin:
        raise UserError(
            f"mesh: the batch rows of process {jax.process_index()} are not contiguous ({sorted(spans)}); make "
            f"mesh.sequence x mesh.tensor a divisor or a multiple of the devices of a process"
        )
    return slice(begin, end)


def agreed_problem(problem: str) -> str:
    """This process's problem, or else another's; "" if no process has one. All processes call it."""
    if jax.process_count() == 1:
        return problem
    fine = multihost_utils.process_allgather(np.array(not problem))
    return problem or ("" if fine.all() else f"process {int(fine.argmin())} could not read it")


def broadcast_from_main(answer: bool) -> bool:
    """The first process's answer; the others may see a shared folder differently. All processes call it."""
    return answer if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.array(answer)))


def agreed_steps(steps: Sequence[int]) -> list[int]:
    """The first process's last 1024 step numbers, sorted. All processes call it."""
    most = 1024
    steps = sorted(steps)[-most:]
    if jax.process_count() == 1:
        return steps
    padded = np.full(most, -1, np.int64)
    padded[: len(steps)] = steps
    return [int(step) for step in multihost_utils.broadcast_one_to_all(padded) if step >= 0]


def check_same_on_all(what: str, digest: str) -> None:
    """Raises UserError unless all processes have the same hex digest of `what`."""
    if jax.process_count() == 1:
        return
    words = np.frombuffer(bytes.fromhex(digest)[:32].ljust(32, b"\0"), np.uint32)
    everyones = multihost_utils.process_allgather(words)
    if (everyones != everyones[0]).any():
        other = int((everyones != everyones[0]).any(1).argmax())
        raise UserError(f"{what}: process {other} differs from process 0; give all processes the same")


def gather(tree: Any) -> Any:
    """Sharded arrays as whole arrays in the memory of every host. All processes call it."""
    return jax.device_get(tree) if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def wait_for_all(name: str) -> None:
    """A barrier of all processes; raises an error if one of them dies."""
    if jax.process_count() > 1:  # not a device collective, which times out or hangs
        ocp.multihost.sync_global_processes(
            name, processes=set(range(jax.process_count())), timeout=_LONGEST_WAIT_SECONDS
        )


def compile_together(function: Any, *args: Any) -> Callable[..., Any]:
    """Compiles a jitted function for these arguments and waits for all processes.

    Otherwise a process with a cache hit would time out in its first collective (CPU: 30 s).
    """
    compiled = function.lower(*args).compile()
    wait_for_all("compiled")
    return compiled


class StopConsensus:
    """Lets all processes act on a flag of any of them at the same step, without stalling the devices.

    Call `reached` at every step; it returns the previous step's result, which is the same in all processes.
    """

    def __init__(self, mesh: Mesh):
        self._alone = jax.process_count() == 1
        self._before: jax.Array | None = None
        everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._place: Callable[[bool], jax.Array] = lambda flag: jax.make_array_from_callback(
            (mesh.size,), everywhere, lambda index: np.full(mesh.size, flag, np.int32)[index]
        )
        self._count = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def reached(self, flag: bool) -> bool:
        """Whether any process set its flag by the previous step; a single process returns its current flag."""
        if self._alone:
            return flag
        before, self._before = self._before, self._count(self._place(flag))
        return before is not None and bool(before > 0)
