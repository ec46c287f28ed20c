"""Packages come by digest through the ordinary clients, once; what cannot be had is named."""

import io
import subprocess
import tarfile
import zipfile

import pytest

from data_pipelines.raw import fetch
from omnihuman_jax.errors import UserError


@pytest.fixture
def wheel(tmp_path):
    """A tiny real wheel that pip can find without a network."""
    directory = tmp_path / "wheels"
    directory.mkdir()
    path = directory / "tiny_thing-1.0-py3-none-any.whl"
    info = "tiny_thing-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("tiny_thing/data/a.txt", "alpha")
        file.writestr("tiny_thing/data/b.txt", "beta")
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def offline_pip(monkeypatch, wheel):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))


def package(wheel, **change):
    values = {"kind": "pypi", "name": "tiny-thing", "version": "1.0", "sha256": fetch.sha256_of(wheel)}
    return fetch.Package(**(values | change))


def test_a_wheel_is_fetched_once_and_members_come_out_of_it(tmp_path, wheel, offline_pip, monkeypatch):
    cache = tmp_path / "cache"
    first = fetch.fetch(package(wheel), cache)
    assert fetch.sha256_of(first) == fetch.sha256_of(wheel)

    def no_client(*args, **kwargs):
        raise AssertionError("a client was called although the archive is cached")

    monkeypatch.setattr(subprocess, "run", no_client)
    assert fetch.fetch(package(wheel), cache) == first
    assert fetch.fetch(package(wheel), cache) == first  # also once its digest has been checked
    member = fetch.fetch_member(package(wheel), "tiny_thing/data/b.txt", cache=cache)
    assert member.read_text() == "beta"
    root = fetch.fetch_tree(package(wheel), "tiny_thing/data/", cache=cache)
    assert sorted(path.name for path in (root / "tiny_thing/data").iterdir()) == ["a.txt", "b.txt"]


def test_wrong_digest_is_refused_and_nothing_stays(tmp_path, wheel, offline_pip):
    with pytest.raises(fetch.PackageUnavailableError, match=r"tiny-thing 1\.0.*expected 1111"):
        fetch.fetch(package(wheel, sha256="1111"), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_unknown_version_names_the_package(tmp_path, wheel, offline_pip):
    with pytest.raises(UserError, match=r"tiny-thing 9\.9") as error:
        fetch.fetch(package(wheel, version="9.9"), tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_a_damaged_archive_in_the_cache_is_noticed(tmp_path, wheel):
    directory = tmp_path / "cache" / fetch.sha256_of(wheel)
    directory.mkdir(parents=True)
    (directory / wheel.name).write_bytes(b"damaged")
    with pytest.raises(fetch.PackageUnavailableError, match="delete it"):
        fetch.fetch(package(wheel), tmp_path / "cache")


def test_missing_member_and_wrong_member_digest_are_refused(tmp_path, wheel, offline_pip):
    with pytest.raises(fetch.PackageUnavailableError, match="holds no file"):
        fetch.fetch_member(package(wheel), "none", cache=tmp_path / "cache")
    with pytest.raises(fetch.PackageUnavailableError, match="sha256"):
        fetch.fetch_member(package(wheel), "tiny_thing/data/a.txt", "00", cache=tmp_path / "cache")


def test_tarballs_stay_inside_their_root(tmp_path):
    path = tmp_path / "evil-1.0.tgz"
    with tarfile.open(path, "w:gz") as file:
        for name in ("package/good", "../evil"):
            info = tarfile.TarInfo(name)
            info.size = 1
            file.addfile(info, io.BytesIO(b"x"))
    evil = fetch.Package("npm", "evil", "1.0", fetch.sha256_of(path))
    directory = tmp_path / "cache" / evil.sha256
    directory.mkdir(parents=True)
    path.rename(directory / path.name)
    assert fetch.fetch_member(evil, "package/good", cache=tmp_path / "cache").read_bytes() == b"x"
    with pytest.raises(fetch.PackageUnavailableError, match="outside"):
        fetch.fetch_tree(evil, "", cache=tmp_path / "cache")
    assert not list(tmp_path.rglob("evil"))


def test_a_machine_without_the_client_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    with pytest.raises(fetch.PackageUnavailableError, match=r"npm package x 1.*client"):
        fetch.fetch(fetch.Package("npm", "x", "1", "00"), tmp_path)


def test_cache_location_order(monkeypatch, tmp_path):
    monkeypatch.setenv("OMNIHUMAN_CACHE", str(tmp_path / "b"))
    assert fetch.cache_dir(tmp_path / "a") == tmp_path / "a"
    assert fetch.cache_dir() == tmp_path / "b"
    monkeypatch.delenv("OMNIHUMAN_CACHE")
    assert fetch.cache_dir().name == "cache" and (fetch.cache_dir().parent / "data_pipelines").is_dir()
