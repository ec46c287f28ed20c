"""Ids and file names of records cannot collide, and are as they were where nothing could."""

import itertools
import pathlib

import pytest

from data_pipelines.prepare import names
from data_pipelines.raw.manifest import RawClip
from data_pipelines.schema import FACE, clip_filename, view_id


def assigned(*ids, source="clips"):
    return names.assign([RawClip(name, pathlib.Path("x"), source) for name in ids])


def test_clips_that_cannot_collide_keep_their_names():
    first, second = assigned("a", "sub/b-7")
    assert (first.whole, first.cut(0), second.whole, second.cut(3)) == (
        "clips/a", "clips/a-0", "clips/sub/b-7", "clips/sub/b-7-3"
    )  # fmt: skip


def test_cuts_are_numbered_differently_beside_a_clip_that_looks_like_one():
    first, second = assigned("talk-1", "talk")
    assert (first.whole, second.whole, second.cut(1)) == ("clips/talk-1", "clips/talk", "clips/talk-c1")


def test_a_name_that_is_taken_gets_a_number():
    assert [name.whole for name in assigned("a", "a", "a")] == ["clips/a", "clips/a~2", "clips/a~3"]
    assert [name.whole for name in assigned("a/b", "a__b")] == ["clips/a/b", "clips/a__b~2"]


@pytest.mark.parametrize(
    "ids",
    [
        ("a", "a-1", "a-c1", "a-cc2", "a"),
        ("a", "a#face", "a@face", "a-0#face"),
        ("a-1", "a-1-1", "a", "a~2", "a"),
        ("x/y", "x__y", "x/y-0", "x__y-1"),
        ("長" * 100, "長" * 99 + "長", "長" * 101),
    ],
)
def test_no_two_files_have_one_name(ids):
    views = ("full", FACE)
    made = [
        [clip_filename(view_id(record, view)) for record in (name.whole, *map(name.cut, range(12))) for view in views]
        for name in assigned(*ids)
    ]
    assert all(not set(one) & set(other) for one, other in itertools.combinations(made, 2))
    assert all(len(set(one)) == len(one) for one in made)


def test_long_file_names_are_shortened_to_what_a_file_system_takes():
    long = "clips/" + "/".join(["日本語の長いフォルダ名" * 2] * 5)
    name = clip_filename(long)
    assert len(name.encode()) <= 255 and name.startswith("clips__日本語") and name.endswith(".mp4")
    assert clip_filename(long + "#face") != name
    assert clip_filename("a/b#face") == "a__b@face.mp4"
