"""Loading streams: values, shards, and what it needs of host memory."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from omnihuman_jax.checkpoints.export import to_tensors
from omnihuman_jax.sharding.rules import tree_shardings
from omnihuman_jax.weights import formats
from omnihuman_jax.weights.load import Source, load
from omnihuman_jax.weights.names import is_condition
from omnihuman_jax.weights.read import open_files
from tests.weights.bases import network_of, random_params, write_base


@pytest.mark.parametrize("naming", formats.FORMATS)
def test_a_base_comes_back_in_our_layout(naming, tmp_path):
    network, params = network_of(naming), random_params(network_of(naming))
    theirs = write_base(tmp_path / "base.safetensors", naming, params)
    files = open_files(tmp_path / "base.safetensors")
    entries = formats.base_entries(naming, network.config, network.abstract_params)
    formats.check_files(naming, files, entries, network.config, network.abstract_params)
    source, ours = Source(files, entries), to_tensors(params)
    assert set(source) == {name for name in ours if not is_condition(name)}
    for name in source:
        np.testing.assert_array_equal(source[name], ours[name], err_msg=name)
    assert len(theirs) == len(entries)


def test_parameters_go_to_their_shards_whatever_the_mesh():
    network = network_of("motif")
    params = random_params(network)
    mesh = jax.make_mesh((2, 2, 1, 2), ("data", "fsdp", "sequence", "tensor"))
    shardings = tree_shardings(network.abstract_params, mesh)
    loaded = load(to_tensors(params), network.abstract_params, shardings)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, loaded, shardings))
    assert loaded["single"]["q"]["kernel"].sharding.shard_shape((1, 32, 32)) == (1, 16, 16)


def test_the_result_has_the_models_dtypes_or_the_files():
    network = network_of("motif")
    half = {name: value.astype(jnp.bfloat16) for name, value in to_tensors(random_params(network)).items()}
    for dtypes, expected in (("model", jnp.float32), ("file", jnp.bfloat16)):
        loaded = load(half, network.abstract_params, dtypes=dtypes)
        assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(expected)}


MEASURE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from omnihuman_jax.weights.load import Source, load
from omnihuman_jax.weights.names import Entry, LINEAR, our_shapes, expand, row
from omnihuman_jax.weights.read import open_files

jax.config.update("jax_platforms", "cpu")
LAYERS, D = 12, 1024
kernel = jax.ShapeDtypeStruct((LAYERS, D, D), jnp.float32)
abstract = {"single": {name: {"kernel": kernel} for name in ("q", "k", "v", "out")}}
names = [f"single.blocks.{{}}.{name}" for name in ("q", "k", "v")]
table = [row("blocks.{}.qkv", *names), row("blocks.{}.proj", "single.blocks.{}.out")]
entries = expand(table, our_shapes(abstract), (1, 2, 2))

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

load({"single.blocks.0.q.kernel": np.ones((4, 4), np.float32)},
     {"single": {"q": {"kernel": jax.ShapeDtypeStruct((1, 4, 4), jnp.float32)}}})
source = Source(open_files(sys.argv[1]), entries)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
params = jax.block_until_ready(load(source, abstract))
peak = status("VmHWM") - before
result = sum(x.nbytes for x in jax.tree.leaves(params))
group = max(x.nbytes for x in jax.tree.leaves(params))
print((peak - result) / group)
"""


def test_loading_needs_little_memory_beside_the_result(tmp_path):
    layers, d = 12, 1024
    tensors = {}
    for i in range(layers):
        tensors[f"blocks.{i}.qkv.weight"] = np.full((3 * d, d), i, np.float32)
        tensors[f"blocks.{i}.proj.weight"] = np.full((d, d), i, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "base.safetensors")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "base.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    groups = float(done.stdout.split()[-1])
    print(f"peak host memory above the result: {groups:.2f} of the largest group")
    assert groups <= 1.3
