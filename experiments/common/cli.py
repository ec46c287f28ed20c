"""What the experiment commands share: the config flag and its checks, the platform, the run directory."""

import contextlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from data_pipelines.raw.fetch import sha256_of
from omnihuman_jax import command
from omnihuman_jax.errors import UserError, nearest
from omnihuman_jax.sharding import processes

flags.disclaim_key_flags()  # what is defined here belongs to the command, whose --help lists it


def define_config_flag() -> Any:
    """Defines --config=PRESET.py[:ARG] with --config.KEY=VALUE overrides."""
    return config_flags.DEFINE_config_file("config", None, "Preset file, as experiments/configs/demo.py or demo.py:v2.")


def run_main(main: Callable[[list[str]], int | None]) -> None:
    """Runs an absl main; wrong flags, presets, config keys and UserErrors become one line and exit status 2."""
    command.run_main(lambda: main([]), check=_check_config_arguments)


def _check_config_arguments(args: list[str]) -> None:
    """Checks preset file and override keys before absl does, which would answer with a traceback."""
    # "--config FILE" is "--config=FILE" to absl.
    joined = re.sub(r"(^|\n)(--?config)\n", r"\1\2=", "\n".join(args)).split("\n")
    values = dict(re.match(r"--?([^=]+)=?(.*)", a, re.S).groups() for a in joined if a.startswith("-") and len(a) > 2)
    preset = values.get("config")
    if preset is None:
        return
    config = load_preset(preset)
    for key in values:
        if key.startswith("config."):
            check_key(config, key.removeprefix("config."))


def load_preset(preset: str) -> ConfigDict:
    """The config of PRESET.py[:ARG].

    Raises:
      UserError: no such file (with the nearest preset), or an argument the preset refuses.
    """
    file = Path(preset.split(":", 1)[0])
    if not file.is_file():
        folder = Path(__file__).parents[1] / "configs"
        presets = [p.stem for p in folder.glob("*.py") if p.stem not in ("__init__", "base")]
        raise UserError(f"--config={preset}: no such preset{nearest(file.stem, presets)} in {_relative(folder)}/")
    holder = flags.FlagValues()
    flag = config_flags.DEFINE_config_file("config", None, "", flag_values=holder, sys_argv=[""])
    holder(["", f"--config={preset}"])
    return flag.value


def _relative(path: Path) -> str:
    return os.path.relpath(path)


def check_key(config: ConfigDict, dotted: str) -> None:
    """Raises UserError with the nearest valid name unless the dotted key exists in the config."""
    node, done = config, []
    for part in dotted.split("."):
        if not isinstance(node, ConfigDict) or part not in node:
            valid = node.keys() if isinstance(node, ConfigDict) else []
            raise UserError(f"--config.{dotted}: unknown config key {part!r}{_nearest_key(config, done, part, valid)}")
        done.append(part)
        node = node[part]


def _nearest_key(config: ConfigDict, done: list[str], part: str, valid: list[str]) -> str:
    if not valid:
        return f"; {'.'.join(done)} has no keys below it"
    prefix = ".".join([*done, ""])
    return nearest(prefix + part, [prefix + key for key in valid])


def define_process_flags() -> None:
    """Defines the flags by which the processes of one run find each other."""
    flags.DEFINE_string("coordinator_address", "", "HOST:PORT of process 0, the same for all; or set the environment.")
    flags.DEFINE_integer("num_processes", 0, "Processes of the run, one a host; default $JAX_NUM_PROCESSES or 1.")
    flags.DEFINE_integer("process_id", -1, "This process, from 0; default $JAX_PROCESS_ID.")
    flags.DEFINE_bool("multi_host", False, "Find the other processes by the cluster: Cloud TPU, GKE, Slurm.")


def join_processes() -> int:
    """Joins the run that the flags or the environment tell of; returns its number of processes."""
    f = flags.FLAGS
    return processes.join(f.coordinator_address, f.num_processes, f.process_id, automatic=f.multi_host)


@contextlib.contextmanager
def one_of_several(config: ConfigDict) -> Iterator[None]:
    """Joins the processes of the run, chooses devices, and runs the block as one of them.

    Where it fails in a process of several, the error is printed and the process ends: a regular exit would wait for the
    others, which wait for this one.
    """
    num_processes = join_processes()
    setup_platform(config, num_processes)
    try:
        yield
    except BaseException as error:
        if num_processes == 1:
            raise
        mistake = isinstance(error, UserError)
        try:
            print(f"error: {error}" if mistake else traceback.format_exc(), file=sys.stderr)
        finally:  # also where not even that can be written: the others must not wait
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):  # a log on a full disk
                    stream.flush()
            os._exit(2 if mistake else 1)


def setup_platform(config: ConfigDict, num_processes: int = 1) -> None:
    """Chooses devices and the compilation cache; call before anything touches a JAX backend.

    Raises:
      UserError: simulated devices that the processes cannot share equally.
    """
    if config.simulated_devices:
        if config.simulated_devices % num_processes:
            raise UserError(
                f"simulated_devices={config.simulated_devices} cannot be shared by {num_processes} processes; set "
                f"--config.simulated_devices to a multiple"
            )
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", config.simulated_devices // num_processes)
        # A device waiting in a collective holds a thread of XLA's pool, which has as many as there are cores; with too
        # few, the devices it waits for never run; with many more, they get in each other's way (8 a device: a quarter
        # slower on 2 cores). XLA reads the size from NPROC.
        os.environ["NPROC"] = str(max(2 * config.simulated_devices, os.cpu_count() or 1))
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.compilation_cache).absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def process_started() -> float:
    """`time.time()` of this process's start, as the kernel tells it; now where it does not."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
        return int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")
    except OSError:
        return time.time()


def make_workdir(path: str) -> Path:
    """Makes a run directory.

    Raises:
      UserError: it is a file, or cannot be made.
    """
    workdir = Path(path)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={path}: {error.strerror}; name a directory you may write") from error
    return workdir


def check_vae(checkpoint: str, made_with: str) -> None:
    """Raises UserError where `vae.checkpoint` is not the VAE that made the latents ("" = not needed, not checked)."""
    if checkpoint and Path(checkpoint).is_file() and sha256_of(checkpoint) != made_with:
        raise UserError(
            f"vae.checkpoint={checkpoint} is not the VAE that made the latents (sha256 {made_with[:12]}…); set "
            f"--config.vae.checkpoint to that file, or prepare the data again with this one"
        )


def to_plain(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON types."""
    return json.loads(json.dumps(config.to_dict()))


def list_files(folder: Path) -> None:
    """Prints the files of a directory with their sizes."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{file}  {file.stat().st_size / 1e6:.2f} MB")
