"""Imports point one way: experiments and tpu -> data_pipelines -> omnihuman_jax, without circles."""

import pathlib

import pytest

from tools import build_files

ROOT = build_files.ROOT
ALLOWED = {
    "omnihuman_jax": {"omnihuman_jax"},
    "data_pipelines": {"data_pipelines", "omnihuman_jax"},
    "experiments": {"experiments", "data_pipelines", "omnihuman_jax"},
    "tpu": {"tpu", "experiments", "data_pipelines", "omnihuman_jax"},
}


def import_graph() -> dict[str, set[str]]:
    """Module -> first-party modules it imports, for every room."""
    paths = build_files.python_files(ROOT)
    modules = {build_files.module_name(path): path for path in paths}
    return {
        name: build_files.imported_modules((ROOT / path).read_text(encoding="utf-8"), path, modules)
        for name, path in modules.items()
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
    for path in build_files.python_files(ROOT):
        text = (ROOT / pathlib.Path(path)).read_text(encoding="utf-8")
        wrong += [f"{path}: {home}" for home in homes if home in text]
    assert wrong == []
