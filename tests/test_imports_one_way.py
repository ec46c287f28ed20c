"""Imports point one way: experiments and tpu -> data_pipelines -> omnihuman_jax, without circles."""

import pathlib

import pytest

from tests.import_graph import ROOT, import_graph, imported_modules, python_files

ALLOWED = {
    "omnihuman_jax": {"omnihuman_jax"},
    "data_pipelines": {"data_pipelines", "omnihuman_jax"},
    "experiments": {"experiments", "data_pipelines", "omnihuman_jax"},
    "tpu": {"tpu", "experiments", "data_pipelines", "omnihuman_jax"},
}


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_is_below_it(room):
    graph = import_graph()
    wrong = [
        f"{name} imports {other}"
        for name, others in graph.items()
        if name.split(".")[0] == room
        for other in sorted(others)
        if other.split(".")[0] not in ALLOWED[room]
    ]
    assert wrong == []


def test_no_module_imports_itself_in_a_circle():
    graph = import_graph()
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_no_source_file_names_a_path_of_one_machine():
    homes = ("/ho" + "me/", "/wo" + "rk/", "/ro" + "ot/")
    wrong = []
    for path in python_files(ROOT):
        text = (ROOT / path).read_text(encoding="utf-8")
        wrong += [f"{path}: {home}" for home in homes if home in text]
    assert wrong == []


def test_imports_are_resolved_to_modules():
    modules = {
        name: pathlib.PurePath(path)
        for name, path in {"a": "a/__init__.py", "a.b": "a/b.py", "a.c": "a/c.py", "a.d": "a/d/__init__.py"}.items()
    }
    source = "import a.b\nimport numpy\nfrom a import c, f\nfrom . import b\ndef g():\n    from .d import x\n"
    found = imported_modules(source, pathlib.PurePath("a/e.py"), modules)
    assert found == {"a", "a.b", "a.c", "a.d"}


# Room of omnihuman_jax -> rooms that it must not need.
APART = {
    "omnihuman_jax.training": ("omnihuman_jax.inference", "omnihuman_jax.checkpoints.export"),
    "omnihuman_jax.checkpoints": ("omnihuman_jax.inference", "omnihuman_jax.training"),
    "omnihuman_jax.inference": ("omnihuman_jax.training",),
    "omnihuman_jax.models": ("omnihuman_jax.training", "omnihuman_jax.checkpoints", "omnihuman_jax.inference"),
}


@pytest.mark.parametrize("room", APART)
def test_rooms_of_the_library_are_apart(room):
    wrong = [
        f"{name} imports {other}"
        for name, others in import_graph().items()
        if f"{name}.".startswith(f"{room}.")
        for other in sorted(others)
        if f"{other}.".startswith(tuple(f"{apart}." for apart in APART[room]))
    ]
    assert wrong == []
