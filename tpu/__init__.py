"""TPU topologies and ahead-of-time compilation, on a machine that has no TPU.

libtpu compiles for any topology, but must be told not to look for the TPU of this machine. JAX reads these settings
when its backends start, which is after this package is imported.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Nothing here drives a TPU, so several programs may compile at once.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# Without a TPU, libtpu warns about what it cannot find; errors still come as exceptions.
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-16")
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
