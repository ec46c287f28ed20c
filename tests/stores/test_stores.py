"""Paths, objects and folders of object stores, and what a person is told of stores that cannot be used."""

import pytest

from omnihuman_jax import stores
from omnihuman_jax.errors import UserError
from tests.stores import servers


@pytest.mark.parametrize(
    ("path", "scheme"), [("gs://b/x", "gs"), ("s3://b", "s3"), ("a/b", ""), ("/gs://b", ""), ("gs:/b", "")]
)
def test_a_scheme_is_what_stands_before_two_slashes(path, scheme):
    assert stores.scheme_of(path) == scheme
    assert stores.is_remote(stores.get_path(path)) == bool(scheme)


def test_an_unknown_scheme_is_refused_in_words():
    with pytest.raises(UserError, match=r"az://b/x: unknown scheme az://; give a local path, gs://BUCKET/DIR or s3://"):
        stores.get_path("az://b/x")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("output", "gs://b/x", r"--output=gs://b/x: must be a local path"),
        ("plugins", ["a", "s3://b"], r"--plugins=s3://b: must be a local path"),
        ("output", "az://b/x", r"unknown scheme az://; give a local path$"),
        ("workdir", "hdfs://b/x", r"unknown scheme hdfs://; give a local path or gs://BUCKET/DIR or s3://BUCKET/DIR"),
        ("config.vae.checkpoint", "gs://b/vae.safetensors", "must be a local path"),
    ],
)
def test_only_what_may_be_in_a_store_takes_its_scheme(name, value, words):
    allowed = ("workdir", "config.stages.*.init_from")
    stores.check_schemes({"config.stages.a.init_from": "s3://b/run", "workdir": "gs://b/run"}, allowed)
    stores.check_schemes({"output": "a/b", "steps": 3, "text": "see http: there"})
    with pytest.raises(UserError, match=words):
        stores.check_schemes({name: value}, allowed)


def test_bytes_are_appended_to_an_object_and_its_end_is_read(store):
    path = store.root / "lines.jsonl"
    assert stores.read_tail(path, 100) == b""
    for part in (b"one\n", b"two\n", b"three\n"):
        stores.append(path, part)
    assert path.read_bytes() == b"one\ntwo\nthree\n"
    assert stores.read_tail(path, 6) == b"three\n" and stores.read_tail(path, 100) == path.read_bytes()
    assert store.names() == ["lines.jsonl"]


def test_appending_to_a_large_object_keeps_it(store):
    path, large = store.root / "lines.jsonl", b"0123456789abcde\n" * 400_000  # more than a part of an upload has
    stores.append(path, large)
    stores.append(path, b"end\n")
    assert path.read_bytes() == large + b"end\n"


def fill(folder, names=("a", "b/c", stores.COMMIT_FILE)):
    for name in names:
        stores.write_whole(folder / name, name.encode())


def test_a_folder_is_copied_with_its_mark_last_and_removed_with_it_first(store):
    fill(store.root / "old")
    fill(store.root / "new", ["left over"])
    stores.copy_tree(store.root / "old", store.root / "new")
    assert store.names("new") == store.names("old") == ["a", "b/c", stores.COMMIT_FILE]
    assert (store.root / "new" / "b/c").read_bytes() == b"b/c"
    stores.move_tree(store.root / "new", store.root / "moved")
    assert store.names("moved") == store.names("old") and store.names("new") == []
    store.faults.seen.clear()
    stores.remove_tree(store.root / "old")
    assert store.names("old") == []
    removals = [i for i, seen in enumerate(store.faults.seen) if not seen.startswith(("GET", "HEAD"))]
    commit = [i for i in removals if stores.COMMIT_FILE in store.faults.seen[i]]
    assert commit == removals[:1], store.faults.seen
    stores.remove_tree(store.root / "old")  # nothing there


def test_a_folder_whose_copying_fails_is_not_marked_as_whole(gs):
    fill(gs.root / "old")
    gs.faults.of = lambda method, path: 403 if "b%2Fc" in path and method == "POST" else 0
    with pytest.raises(OSError, match="no permission"):
        stores.copy_tree(gs.root / "old", gs.root / "new")
    gs.faults.clear()
    assert stores.COMMIT_FILE not in gs.names("new") and stores.COMMIT_FILE in gs.names("old")


def test_a_store_that_can_be_written_is_left_as_it_was(store):
    stores.check_writable("--workdir", store.root)
    assert store.names() == []


@pytest.mark.parametrize(("status", "words"), [(403, "no permission"), (401, "no permission")])
def test_no_permission_is_one_line(store, status, words):
    store.faults.of = lambda method, path: status
    with pytest.raises(UserError, match=f"--workdir={store.root}: {words}.*credentials can write to") as error:
        stores.check_writable("--workdir", store.root)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=f"data.dir={store.root}: {words}.*credentials can read"):
        stores.read_object("data.dir", store.root)


def test_a_missing_bucket_is_one_line(store):
    missing = stores.get_path(f"{store.scheme}://missing/run")
    with pytest.raises(UserError, match=f"--workdir={missing}: no such bucket.*: {store.scheme}://missing$"):
        stores.check_writable("--workdir", missing)


@pytest.mark.parametrize("status", [429, pytest.param(503, marks=pytest.mark.slow)])
def test_requests_that_are_refused_for_the_moment_are_made_again(store, status):
    path, refused = store.root / "lines", []

    def first_of_each(method, where):
        if method == "GET" or method == "HEAD" or where in refused:
            return 0
        refused.append(where)
        return status

    store.faults.of = first_of_each
    stores.append(path, b"one\n")
    stores.append(path, b"two\n")
    assert refused and path.read_bytes() == b"one\ntwo\n"


def test_an_answer_that_never_comes_ends_as_an_error(gs, monkeypatch):
    files = stores.file_system(gs.root)
    assert files.requests_timeout == 120
    monkeypatch.setattr(files, "requests_timeout", 0.2)
    gs.faults.slow = lambda method, path: 2.0
    with pytest.raises(OSError):
        stores.write_whole(gs.root / "x", b"x")


def test_the_proxy_shows_that_requests_go_through_it(gs):
    stores.write_whole(gs.root / "x", b"x")
    assert any(seen.startswith("POST") for seen in gs.faults.seen) and servers.BUCKET in gs.faults.seen[0]
