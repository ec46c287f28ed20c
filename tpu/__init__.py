"""Ahead-of-time compilation for TPU topologies on a machine without a TPU.

libtpu compiles for any topology if these settings stop it from looking for a local TPU. JAX reads them when its
backends start, after this package is imported.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Nothing here uses a TPU, so several programs may load libtpu at once.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# Silences libtpu's warnings about the missing TPU; errors still raise exceptions.
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-16")
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
