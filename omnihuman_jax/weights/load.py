"""Loading into shards, a tensor at a time.

Peak host memory on top of the sharded result: this host's part of one leaf of the parameter tree (the stacked layers of
one kind), and one tensor of the file.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from omnihuman_jax.weights.names import Entry, OnAccess, block_shape, leaf_names
from omnihuman_jax.weights.read import Files


class Source(OnAccess):
    """Our tensors by dotted name, read from file on access, in the file's dtype and our layout."""

    def __init__(self, files: Files, entries: Sequence[Entry]):
        super().__init__({name: entry for entry in entries for name in entry.ours})
        self._files = files

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        span = entry.span(name)
        if len(entry.ours) == 1:
            value = self._files.read(entry.theirs)
        elif entry.axis == 0:
            value = self._files.read(entry.theirs, span)
        else:
            value = self._files.read(entry.theirs)[:, span]
        return entry.layout.to_ours(value, entry.patch)


class Cast(OnAccess):
    """Another mapping's tensors in one dtype."""

    def __init__(self, tensors: Mapping[str, np.ndarray], dtype: Any):
        super().__init__(tensors)
        self._dtype = np.dtype(dtype)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._entries[name].astype(self._dtype, copy=False)


def load(tensors: Mapping[str, np.ndarray], abstract: Any, shardings: Any = None, *, dtypes: str = "model") -> Any:
    """Parameters from tensors by dotted name, straight into their shards: nested dict of arrays, as `abstract`.

    Args:
      tensors: name -> array in our layout, as `Source`; each is read once.
      abstract: nested dict of `jax.ShapeDtypeStruct`.
      shardings: nested dict of shardings (`sharding.rules.tree_shardings`); None = all on the default device.
      dtypes: "model" = those of `abstract`; "file" = those of the tensors.
    """
    if shardings is None:
        whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: whole, abstract)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, sharding: _load_leaf(tensors, path, leaf, sharding, dtypes), abstract, shardings
    )


def _load_leaf(tensors, path: Any, leaf: jax.ShapeDtypeStruct, sharding: Any, dtypes: str) -> jax.Array:
    names = leaf_names(path, leaf.shape)
    stacked = block_shape(path, leaf.shape) != tuple(leaf.shape)
    # Device -> ((start, stop), …) of its shard; replicas share one buffer.
    bounds = {
        device: tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(leaf.shape).items()
    }
    parts: dict[Any, np.ndarray] = {}
    for layer, name in enumerate(names):
        value = tensors[name]
        for key in set(bounds.values()):
            if not layer:
                dtype = leaf.dtype if dtypes == "model" else value.dtype
                parts[key] = np.empty([stop - start for start, stop in key], dtype)
            # The layer axis is never sharded.
            where = tuple(slice(*pair) for pair in (key[1:] if stacked else key))
            parts[key][layer if stacked else ...] = value[where]
    arrays = [jax.device_put(parts[key], device) for device, key in bounds.items()]
    # Waits, so that these buffers are freed before the next leaf's are allocated.
    return jax.block_until_ready(jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays))
