"""The compiler's flags of each generation: its libtpu takes them, and they do what they are there for."""

import os
import pathlib
import subprocess
import sys

import pytest

from tpu.jobs.environment import compiler_flags
from tpu.jobs.tpu_types import TPU_TYPES

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Parameters divided over fsdp and gathered layer by layer, as those of the network; prints asynchronous gathers.
PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tpu.topologies import get_topology
slices = int(sys.argv[2])
mesh = Mesh(np.array(get_topology(sys.argv[1], slices).devices).reshape(slices, -1), ("data", "fsdp"))
def loss(w, x):
    for layer in w:
        x = jnp.tanh(x @ layer)
    return (x.astype(jnp.float32) ** 2).sum()
w, x = (
    jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))
    for shape, spec in (((3, 2048, 2048), (None, "fsdp")), ((1024, 2048), (("data", "fsdp"),)))
)
text = jax.jit(jax.grad(loss), out_shardings=w.sharding).lower(w, x).compile().as_text()
print(text.count("async-collective"))
"""


def compile_with(flags: str, topology: str, slices: int) -> subprocess.CompletedProcess:
    environment = os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-c", PROGRAM, topology, str(slices)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("name", ["v4-8", "v5litepod-8", "v5p-8", "v6e-8", "tpu7x-8"])
def test_a_generation_compiles_with_its_flags(name, slices):
    tpu = TPU_TYPES[name]
    done = compile_with(compiler_flags(tpu, slices), tpu.topology, slices)
    assert done.returncode == 0, done.stderr[-1000:]
    assert tpu.generation == "tpu7x" or int(done.stdout) > 0


@pytest.mark.slow
def test_without_them_nothing_is_gathered_beside_the_computation():
    done = compile_with("", "v5p:2x2x1", 1)
    assert done.returncode == 0 and int(done.stdout) == 0


@pytest.mark.slow
def test_an_unknown_flag_would_end_the_process():
    assert compile_with("--xla_tpu_no_such_flag=true", "v5p:2x2x1", 1).returncode != 0
