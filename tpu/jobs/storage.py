"""Where a job keeps what lasts: a bucket, which a job sees as the directory /gcs.

The trainer reads and writes files only, so a job mounts its bucket with Cloud Storage FUSE, and gs://BUCKET/x in a flag
becomes /gcs/x in the job.
"""

import re

from omnihuman_jax.errors import UserError

MOUNT = "/gcs"
# Hosts wait for files of each other, so none may believe what it saw before.
MOUNT_OPTIONS = "implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")


def find_bucket(workdir: str, bucket: str) -> str:
    """The bucket that --workdir=gs://BUCKET/… or --bucket names; UserError for none, a wrong name, or two."""
    named = workdir.removeprefix("gs://").split("/")[0] if workdir.startswith("gs://") else ""
    if named and bucket and named != bucket:
        raise UserError(f"--workdir={workdir} is not in --bucket={bucket}; a job mounts one bucket, leave --bucket out")
    if not (named or bucket):
        raise UserError(
            f"--workdir={workdir}: what a pod writes to its own disk is lost with it; give --workdir=gs://BUCKET/RUN"
        )
    if not _BUCKET.fullmatch(named or bucket):
        raise UserError(f"bucket {named or bucket!r}: no name of a bucket; it has lower-case letters, digits and -_.")
    return named or bucket


def to_mounted(flag: str, value: str, bucket: str) -> str:
    """The value of a flag with gs://BUCKET/x as /gcs/x, others as they are; UserError for another bucket or store."""
    scheme, found, rest = value.partition("://")
    if not found or not re.fullmatch(r"[a-z][a-z0-9]*", scheme):
        return value
    if scheme != "gs":
        raise UserError(f"{flag}={value}: a job can read gs:// only; copy it into gs://{bucket}")
    head, _, path = rest.partition("/")
    if head != bucket:
        raise UserError(f"{flag}={value}: a job mounts one bucket, gs://{bucket}; copy it there")
    return f"{MOUNT}/{path}".rstrip("/")


def workdir_in_job(workdir: str, bucket: str) -> str:
    """--workdir as the job sees it; UserError unless it is below the mounted bucket."""
    path = to_mounted("--workdir", workdir, bucket)
    if not path.startswith(f"{MOUNT}/"):
        raise UserError(f"--workdir={workdir}: must be a folder in the bucket; give gs://{bucket}/RUN or {MOUNT}/RUN")
    return path


def check_data_dir(data_dir: str, bucket: str) -> None:
    """Raises UserError unless `data.dir` is in the mounted bucket."""
    if not to_mounted("data.dir", data_dir, bucket).startswith(f"{MOUNT}/"):
        raise UserError(f"data.dir={data_dir!r} is not in the bucket; give --config.data.dir=gs://{bucket}/DATA")
