"""Where a job keeps what lasts: a bucket.

The trainer itself reads and writes gs:// where much is read or written: the run directory, records, compiled programs.
What it knows as files only, such as the VAE, a job reads through Cloud Storage FUSE: it mounts its bucket at /gcs, and
gs://BUCKET/x in any other config key becomes /gcs/x in the job.
"""

import re

from omnihuman_jax import stores
from omnihuman_jax.errors import UserError

MOUNT = "/gcs"
# Hosts wait for files of each other, so none may believe what it saw before.
MOUNT_OPTIONS = "implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0"
# Not stages.NAME.init_from: the trainer reads its own checkpoints in gs://, but what was exported from files only.
_NATIVE = ("--workdir", "--config.data.dir", "--config.compilation_cache")
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


def in_job(flag: str, value: str, bucket: str) -> str:
    """The value of a flag in the job: gs:// stays where the trainer reads it itself, else gs://BUCKET/x is /gcs/x.

    Others stay as they are. Raises UserError for another store, and for another bucket where a file is meant.
    """
    scheme = stores.scheme_of(value)
    if not scheme:
        return value
    if scheme != "gs":
        raise UserError(f"{flag}={value}: a job can read gs:// only; copy it into gs://{bucket}")
    if flag in _NATIVE:
        return value
    head, _, path = value.removeprefix("gs://").partition("/")
    if head != bucket:
        raise UserError(f"{flag}={value}: a job mounts one bucket, gs://{bucket}; copy it there")
    return f"{MOUNT}/{path}".rstrip("/")


def workdir_in_job(workdir: str, bucket: str) -> str:
    """--workdir as the job sees it; UserError unless it is below a bucket, or below the mount."""
    path = in_job("--workdir", workdir, bucket).rstrip("/")
    if not (path.startswith(f"{MOUNT}/") or re.fullmatch(r"gs://[^/]+/.+", path)):
        raise UserError(f"--workdir={workdir}: must be a folder in the bucket; give gs://{bucket}/RUN or {MOUNT}/RUN")
    return path


def check_data_dir(data_dir: str, bucket: str) -> None:
    """Raises UserError unless `data.dir` is in a bucket, or in the mounted one as /gcs/DATA."""
    if not in_job("--config.data.dir", data_dir, bucket).startswith((f"{MOUNT}/", "gs://")):
        raise UserError(f"data.dir={data_dir!r} is not in a bucket; give --config.data.dir=gs://{bucket}/DATA")
