"""Every test runs on 8 simulated CPU devices, with compiled programs kept in .pytest_cache from run to run."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# libtpu would ask a metadata server for its topology on a machine that has none.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Threads for 8 simulated devices that wait for each other; see experiments.common.cli.setup_platform.
os.environ.setdefault("NPROC", "16")

# Each worker of pytest-xdist has its own: JAX does not write a file of it at one stroke.
CACHE = pathlib.Path(__file__).resolve().parent.parent / ".pytest_cache" / "jax" / os.getenv("PYTEST_XDIST_WORKER", "")
# In the environment rather than jax.config, so that the commands that tests start share the cache.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Compiling takes most of the time here, so XLA leaves out its expensive passes: a third less.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax  # noqa: E402  (reads the environment when imported)
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--runslow") or "slow" in config.getoption("markexpr"):
        return
    skip = pytest.mark.skip(reason="slow: run with --runslow or -m slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
