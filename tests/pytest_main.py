"""Runs pytest on the files named on the command line: the `main` of every Bazel `py_test`."""

import os
import sys

import pytest

if __name__ == "__main__":
    # Bazel's sandbox is read-only apart from the test's own folder.
    if "TEST_TMPDIR" in os.environ:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(os.environ["TEST_TMPDIR"], "jax"))
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
