"""Writes the Bazel BUILD files from the Python imports: `make build-files`.

One target a module, named after it: `py_test` for tests, `py_binary` for modules with a `__main__` guard, `py_library`
for the rest. `deps` are the first-party modules that the file imports, wherever in the file. Third-party packages come
from the interpreter that Bazel is given (requirements.txt), as the rules that would fetch them need a network.
"""

import ast
import dataclasses
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROOMS = ("omnihuman_jax", "data_pipelines", "experiments", "tpu", "tools", "benchmarks", "tests")
NOT_DATA = {".py", ".pyc", ".bzl", ".md", ""}
HEADER = "# Written by `make build-files` from the imports; do not edit by hand.\n"


@dataclasses.dataclass(frozen=True)
class Target:
    """One rule of a BUILD file. Labels are as Bazel writes them, relative to the package where that is shorter."""

    rule: str
    name: str
    srcs: tuple[str, ...]
    deps: tuple[str, ...]
    data: tuple[str, ...] = ()


def python_files(root: pathlib.Path) -> list[pathlib.PurePath]:
    """Every Python file of the rooms, relative to `root`, sorted."""
    found = (path.relative_to(root) for room in ROOMS for path in (root / room).rglob("*.py"))
    return sorted(path for path in found if not any(part.startswith((".", "__pycache__")) for part in path.parts))


def module_name(path: pathlib.PurePath) -> str:
    """`a/b/c.py` -> `a.b.c`; `a/b/__init__.py` -> `a.b`."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str, path: pathlib.PurePath, modules: dict[str, pathlib.PurePath]) -> set[str]:
    """First-party modules that `source` imports: `from a import b` is `a.b` where that is a module, else `a`."""
    package = module_name(path.parent / "__init__.py").split(".")
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else base for name in names}
    return {name for name in found if name in modules and modules[name] != path}


def label(path: pathlib.PurePath, package: pathlib.PurePath) -> str:
    """Bazel label of the target that holds `path`, as written inside `package`."""
    return f":{path.stem}" if path.parent == package else f"//{path.parent.as_posix()}:{path.stem}"


def label_order(text: str) -> tuple[bool, str]:
    """Buildifier's order: labels of the same package first."""
    return (not text.startswith(":"), text.replace(":", "!"))


def data_files(root: pathlib.Path, package: pathlib.PurePath, packages: set[pathlib.PurePath]) -> list[str]:
    """Files that are not Python in `package` or in its folders that are no packages of their own."""
    files = []
    for path in sorted((root / package).rglob("*")):
        relative = path.relative_to(root / package)
        inside = {package / parent for parent in relative.parents} & packages == {package}
        if path.is_file() and inside and path.suffix not in NOT_DATA and not path.name.startswith("."):
            files.append(relative.as_posix())
    return files


def module_target(
    root: pathlib.Path, path: pathlib.PurePath, modules: dict[str, pathlib.PurePath], data: list
) -> Target:
    """The rule for one module."""
    source = (root / path).read_text(encoding="utf-8")
    imports = imported_modules(source, path, modules)
    deps = {label(modules[name], path.parent) for name in imports}
    init = path.parent / "__init__.py"
    if path != init and module_name(init) in modules and not _imports_own_modules(root, init, modules):
        deps.add(":__init__")
    if path.parts[0] == "tests" and path.name.startswith("test_"):
        rule = "py_test"
    else:
        rule = "py_binary" if 'if __name__ == "__main__":' in source else "py_library"
    used = any(pathlib.PurePath(name).name in source or pathlib.PurePath(name).parts[0] in source for name in data)
    ordered = tuple(sorted(deps, key=label_order))
    return Target(rule, path.stem, (path.name,), ordered, (":data",) if used else ())


def _imports_own_modules(root: pathlib.Path, init: pathlib.PurePath, modules: dict[str, pathlib.PurePath]) -> bool:
    names = imported_modules((root / init).read_text(encoding="utf-8"), init, modules)
    return any(modules[name].parent == init.parent for name in names)


def _list(values: tuple[str, ...]) -> str:
    if len(values) == 1:
        return f'["{values[0]}"]'
    return "[\n" + "".join(f'        "{value}",\n' for value in values) + "    ]"


def render(package: pathlib.PurePath, targets: list[Target], data: list[str]) -> str:
    """The text of one BUILD file, laid out as buildifier would."""
    rules = {target.rule for target in targets}
    plain = sorted(rules - {"py_test"})
    loads = []
    if plain:
        loads.append(
            f'load("@rules_python//python:defs.bzl", {", ".join(f"{chr(34)}{rule}{chr(34)}" for rule in plain)})'
        )
    if "py_test" in rules:
        loads.append('load("//tests:pytest.bzl", "py_test")')
    blocks = [HEADER + "\n".join(loads), 'package(default_visibility = ["//:__subpackages__"])']
    if package == pathlib.PurePath("tests"):
        blocks.append('exports_files(["pytest_main.py"])')
    if data:
        blocks.append(f'filegroup(\n    name = "data",\n    srcs = {_list(tuple(data))},\n)')
    for target in targets:
        lines = [f"{target.rule}(", f'    name = "{target.name}",']
        if target.rule == "py_binary" and package.parts[:1] == ("tests",):
            lines.append("    testonly = True,")  # it may use tests, which are so of themselves
        for key in ("srcs", "data", "deps"):
            if getattr(target, key):
                lines.append(f"    {key} = {_list(getattr(target, key))},")
        blocks.append("\n".join([*lines, ")"]))
    return "\n\n".join(blocks) + "\n"


def build_files(root: pathlib.Path = ROOT) -> dict[pathlib.PurePath, str]:
    """BUILD file path (relative to `root`) -> its text, for every folder that holds Python files."""
    paths = python_files(root)
    modules = {module_name(path): path for path in paths}
    packages = {path.parent for path in paths}
    files = {}
    for package in sorted(packages):
        data = data_files(root, package, packages)
        targets = [module_target(root, path, modules, data) for path in paths if path.parent == package]
        libraries = tuple(f":{target.name}" for target in targets if target.rule == "py_library")
        if package.parts[0] != "tests" and libraries and all(target.name != package.name for target in targets):
            targets.append(Target("py_library", package.name, (), libraries))
        files[package / "BUILD"] = render(package, targets, data)
    return files


def main() -> int:
    """Writes what differs and says so."""
    for path, text in build_files().items():
        file = ROOT / path
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
