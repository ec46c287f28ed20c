"""Shared by the experiment commands: the config flag and its checks, devices, the run directory."""

import contextlib
import hashlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from omnihuman_jax import command, stores
from omnihuman_jax.command import check_given, check_key  # noqa: F401 (commands call cli.check_given)
from omnihuman_jax.errors import UserError, nearest
from omnihuman_jax.models.vae.vae import encoder_sha256
from omnihuman_jax.sharding import processes
from omnihuman_jax.stores import AnyPath
from omnihuman_jax.training.run_config import flatten

flags.disclaim_key_flags()  # so that --help lists flags defined here under the command


def define_config_flag() -> Any:
    """Defines --config=PRESET.py[:ARG] with --config.KEY=VALUE overrides."""
    return config_flags.DEFINE_config_file("config", None, "Preset file, as experiments/configs/demo.py or demo.py:v2.")


def run_main(main: Callable[[list[str]], int | None], in_stores: Collection[str] | None = ()) -> None:
    """Runs an absl main; UserErrors and wrong flags, presets or config keys print one line and exit with status 2.

    Args:
      main: the command.
      in_stores: patterns of the flags and config keys, as `config.data.dir`, that may be in an object store; None if
        the command checks them itself.
    """

    def check_schemes() -> None:
        if in_stores is not None:
            values = command.own_flags()
            config = values.pop("config", None)
            of_config = flatten(to_plain(config), "config.") if isinstance(config, ConfigDict) else {"config": config}
            stores.check_schemes(values | of_config, in_stores)

    command.run_main(lambda: main([]), check=_check_config_arguments, parsed=check_schemes)


def _check_config_arguments(args: list[str]) -> None:
    """Checks preset file and override keys before absl, which would print a traceback."""
    # "--config FILE" is "--config=FILE" to absl.
    joined = re.sub(r"(^|\n)(--?config)\n", r"\1\2=", "\n".join(args)).split("\n")
    values = dict(re.match(r"--?([^=]+)=?(.*)", a, re.S).groups() for a in joined if a.startswith("-") and len(a) > 2)
    if "config" not in values:
        return
    config = load_preset(values["config"])
    for key in values:
        if key.startswith("config."):
            check_key(config, key.removeprefix("config."))


def load_preset(preset: str) -> ConfigDict:
    """The config of PRESET.py[:ARG]; UserError without such a file, or for an argument that the preset rejects."""
    file = Path(preset.split(":", 1)[0])
    if not file.is_file():
        folder = Path(__file__).parents[1] / "configs"
        presets = [p.stem for p in folder.glob("*.py") if p.stem not in ("__init__", "base")]
        raise UserError(f"--config={preset}: no such preset{nearest(file.stem, presets)} in {os.path.relpath(folder)}/")
    holder = flags.FlagValues()
    flag = config_flags.DEFINE_config_file("config", None, "", flag_values=holder, sys_argv=[""])
    holder(["", f"--config={preset}"])
    return flag.value


def define_process_flags() -> None:
    """Defines the flags that connect the processes of a run."""
    flags.DEFINE_string("coordinator_address", "", "HOST:PORT of process 0, the same for all; or set the environment.")
    flags.DEFINE_integer("num_processes", 0, "Processes of the run, one a host; default $JAX_NUM_PROCESSES or 1.")
    flags.DEFINE_integer("process_id", -1, "This process, from 0; default $JAX_PROCESS_ID.")
    flags.DEFINE_bool("multi_host", False, "Find the other processes by the cluster: Cloud TPU, GKE, Slurm.")


def join_processes() -> int:
    """Joins the run of the flags or environment; returns its number of processes."""
    f = flags.FLAGS
    return processes.join(f.coordinator_address, f.num_processes, f.process_id, automatic=f.multi_host)


@contextlib.contextmanager
def one_of_several(config: ConfigDict) -> Iterator[None]:
    """Joins the processes of the run, sets up devices, and runs the block.

    If the block fails in one of several processes, this prints the error and ends the process immediately: a regular
    exit would wait for the others, which wait for this one.
    """
    num_processes = join_processes()
    setup_platform(config, num_processes)
    try:
        yield
    except BaseException as error:
        if num_processes == 1:
            raise
        expected = isinstance(error, UserError)
        try:
            print(f"error: {error}" if expected else traceback.format_exc(), file=sys.stderr)
        finally:  # even if printing fails: the other processes must not wait
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):  # a log on a full disk
                    stream.flush()
            os._exit(2 if expected else 1)


def setup_platform(config: ConfigDict, num_processes: int = 1) -> None:
    """Sets up devices and the compilation cache; call before anything touches a JAX backend.

    Raises UserError if the processes cannot share the simulated devices equally.
    """
    if config.simulated_devices:
        if config.simulated_devices % num_processes:
            raise UserError(
                f"simulated_devices={config.simulated_devices} is not divisible by {num_processes} processes; set "
                f"--config.simulated_devices to a multiple"
            )
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", config.simulated_devices // num_processes)
        # A device waiting in a collective holds a thread of XLA's pool (default: one per core, set by NPROC). Too few
        # threads deadlock; far more slow each other down (8 per device: by a quarter on 2 cores).
        os.environ["NPROC"] = str(max(2 * config.simulated_devices, os.cpu_count() or 1))
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(stores.absolute(config.compilation_cache)))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def setup_one_device(config: ConfigDict) -> None:
    """`setup_platform` for a command that does not train, with at most one simulated device."""
    config.simulated_devices = min(config.simulated_devices, 1)
    setup_platform(config)


def process_started() -> float:
    """`time.time()` of this process's start from /proc, or now if that is not available."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
        return int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")
    except OSError:
        return time.time()


def check_workdir(path: str) -> AnyPath:
    """The path of a run directory; UserError if it is in an object store that cannot be written to."""
    workdir = stores.get_path(path)
    if stores.is_remote(workdir):
        stores.check_writable("--workdir", workdir)
    return workdir


def make_workdir(path: str | AnyPath) -> AnyPath:
    """Makes a run directory, which an object store needs not; UserError if it is a file or cannot be made."""
    workdir = stores.get_path(path)
    if stores.is_remote(workdir):
        return workdir
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={path}: {error.strerror}; name a directory that you can write") from error
    return workdir


def check_vae(checkpoint: str, made_with: str) -> None:
    """Raises UserError if `vae.checkpoint`, unless "", is not the VAE that made the latents.

    `made_with` is the digest of its encoder or, in older data sets, of the whole file.
    """
    if not checkpoint or not Path(checkpoint).is_file() or encoder_sha256(checkpoint) == made_with:
        return
    with open(checkpoint, "rb") as file:
        whole = hashlib.file_digest(file, "sha256").hexdigest()
    if whole != made_with:
        raise UserError(
            f"vae.checkpoint={checkpoint} is not the VAE that made the latents (digest of its encoder: "
            f"{made_with[:12]}…); set --config.vae.checkpoint to that file, or prepare the data again with this one"
        )


def to_plain(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON types."""
    return json.loads(json.dumps(config.to_dict()))


def list_files(folder: Path) -> None:
    """Prints the files of a directory with their sizes."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{file}  {file.stat().st_size / 1e6:.2f} MB")
