"""Lets Orbax write and read s3:// paths.

TensorStore has a driver for S3, but Orbax 0.12 makes specs for files and gs:// only and has no setting for others. The
three functions of it that decide are replaced here by ones that know s3:// too; gs:// and files are left to the
originals. `tests/stores` fails where another version of Orbax decides elsewhere.
"""

import functools
import os
from typing import Any

from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

_PREFIX = "s3://"


@functools.cache
def enable() -> None:
    """Makes Orbax take s3:// paths from now on, in this process."""
    of_gs, normalize, uses_gcs = (
        gcs_utils.get_kvstore_for_gcs,
        tensorstore_utils._normalize_path,
        tensorstore_utils._use_gcs_driver,
    )
    gcs_utils.get_kvstore_for_gcs = lambda path: kvstore(path) if path.startswith(_PREFIX) else of_gs(path)
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(_PREFIX) or uses_gcs(path)
    tensorstore_utils._normalize_path = lambda path: (
        _PREFIX + os.path.normpath(path.removeprefix(_PREFIX)) if path.startswith(_PREFIX) else normalize(path)
    )


def kvstore(path: str) -> dict[str, Any]:
    """TensorStore's spec of s3://BUCKET/KEY.

    The endpoint and the region are those of the variables that botocore, and so s3fs, reads.
    """
    bucket, _, key = path.removeprefix(_PREFIX).partition("/")
    spec = {"driver": "s3", "bucket": bucket, "path": key}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        spec["endpoint"] = endpoint
    if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        spec["aws_region"] = region
    return spec
