"""Imports an open text-to-video base into a directory to train from (--config.stages.stage1.init_from=DIR).

python -m experiments.import_weights --config=experiments/configs/motif_2b.py --input=DIR --format=motif --output=DIR
"""

from collections import ChainMap, Counter
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from flax import traverse_util
from ml_collections import ConfigDict

from experiments.common import cli
from omnihuman_jax.checkpoints import export
from omnihuman_jax.errors import UserError
from omnihuman_jax.models.functional import Network, make_network
from omnihuman_jax.random_keys import INIT, purpose_key
from omnihuman_jax.training import config_ranges
from omnihuman_jax.weights import formats
from omnihuman_jax.weights.formats import FORMATS
from omnihuman_jax.weights.load import Cast, Source
from omnihuman_jax.weights.names import is_condition
from omnihuman_jax.weights.read import open_files

_TENCENT = (
    "Tencent Hunyuan Community License: not for use in the EU, the UK and South Korea; works and outputs may not "
    "improve other AI models"
)
NOTICES = {
    "motif": "Motif-Video-2B: Apache License 2.0",
    "hunyuan": f"HunyuanVideo: {_TENCENT}",
    "hunyuan_diffusers": f"HunyuanVideo: {_TENCENT}",
    "hunyuan15_diffusers": f"HunyuanVideo-1.5: {_TENCENT}",
}


def import_base(config: ConfigDict, source: str, naming: str, output: str) -> None:
    """Writes an exported directory with the weights of a base and fresh condition modules, which have no effect yet.

    Tensors are copied from file to file: memory holds one output file (5 GB) at a time and the condition modules. A
    prefix of all tensor names is removed. Raises UserError if an argument or the checkpoint is wrong; nothing is
    written then.
    """
    cli.check_given(input=source, format=naming, output=output)
    formats.check_format(naming)
    folder = export.check_output(output)
    network = make_network(config)
    files = formats.without_prefix(open_files(source), network.config, network.abstract_params)
    entries = formats.base_entries(naming, network.config, network.abstract_params)
    formats.check_files(naming, files, entries, network.config, network.abstract_params)
    dtypes = Counter(str(stored.dtype) for stored in files.stored.values())
    counts = ", ".join(f"{count} {dtype}" for dtype, count in sorted(dtypes.items()))
    print(f"{files.path}: {len(entries)} tensors ({counts}), written as {network.config.param_dtype}")
    if files.prefix:
        print(f"{files.path}: removing the prefix {files.prefix} from every tensor's name")
    print(f"licence: {NOTICES[naming]}")
    base = Cast(Source(files, entries), jnp.dtype(network.config.param_dtype))
    tensors = ChainMap(base, export.to_tensors(fresh_conditions(network, config.seed)))
    export.save(folder, config, tensors, {"step": 0, "stage": "imported"}, ema=False)
    cli.list_files(folder)


def fresh_conditions(network: Network, seed: int) -> dict[str, Any]:
    """Freshly initialised condition modules, as a nested dict; the base's parameters are never allocated."""

    @jax.jit
    def init(key: jax.Array) -> dict[str, jax.Array]:
        parameters = traverse_util.flatten_dict(network.init(key), sep=".")
        return {name: leaf for name, leaf in parameters.items() if is_condition(name)}

    return traverse_util.unflatten_dict(init(purpose_key(seed, INIT)), sep=".")


def define_flags() -> None:
    """Defined when run as a program only, so that importing this module takes no flag names."""
    cli.define_config_flag()
    flags.DEFINE_string("input", None, "A safetensors file, one of its shards, their index, or the directory.")
    flags.DEFINE_string("format", None, f"Naming of its tensors: {', '.join(FORMATS)}.")
    flags.DEFINE_string("output", None, "Directory to make; must not exist, or be empty.")


def main(_: list[str]) -> None:
    """Entry point."""
    values = flags.FLAGS
    if values.config is None:
        raise UserError("--config is missing; give the base's preset, as --config=experiments/configs/motif_2b.py")
    config_ranges.check(values.config)
    values.config.simulated_devices = 1  # files are converted on the host
    cli.setup_platform(values.config)
    values.config.simulated_devices = 0
    import_base(values.config, values.input, values.format, values.output)


if __name__ == "__main__":
    define_flags()
    cli.run_main(main)
