"""Which first-party modules import which, read from the source files."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROOMS = ("omnihuman_jax", "data_pipelines", "experiments", "tpu", "benchmarks", "tests")


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


def import_graph() -> dict[str, set[str]]:
    """Module -> first-party modules it imports, for every room."""
    modules = {module_name(path): path for path in python_files(ROOT)}
    return {
        name: imported_modules((ROOT / path).read_text(encoding="utf-8"), path, modules)
        for name, path in modules.items()
    }
