"""Object stores that tests share: servers on loopback, each behind a proxy that can fail."""

import dataclasses
import os
import uuid
from collections.abc import Iterator

import pytest
from etils import epath

from omnihuman_jax import stores
from tests.stores import servers

SERVERS = {"gs": (servers.fake_gcs, servers.of_gcs), "s3": (servers.moto_s3, servers.of_s3)}


@dataclasses.dataclass
class Store:
    """A store, a folder of its bucket that is the test's own, and what goes wrong with it."""

    scheme: str
    root: epath.Path
    faults: servers.Faults

    def names(self, folder: str = "") -> list[str]:
        """Names of all objects below the folder, relative to it."""
        path = str(self.root / folder) if folder else str(self.root)
        found = stores.file_system(path).find(path)
        return sorted(f"{self.scheme}://{name}".removeprefix(path + "/") for name in found)


def _serve(scheme: str) -> Iterator[tuple[str, servers.Faults]]:
    serve, environment = SERVERS[scheme]
    with serve() as url, servers.proxy(url) as (address, faults), pytest.MonkeyPatch.context() as patch:
        for name, value in environment(address).items():
            patch.setenv(name, value)
        # The address of an earlier session must not be kept.
        stores.fsspec.get_filesystem_class(scheme).clear_instance_cache()
        yield scheme, faults


@pytest.fixture(scope="session")
def _gs() -> Iterator[tuple[str, servers.Faults]]:
    yield from _serve("gs")


@pytest.fixture(scope="session")
def _s3() -> Iterator[tuple[str, servers.Faults]]:
    yield from _serve("s3")


def _one(server: tuple[str, servers.Faults]) -> Iterator[Store]:
    scheme, faults = server
    faults.clear()
    yield Store(scheme, epath.Path(f"{scheme}://{servers.BUCKET}/{uuid.uuid4().hex[:8]}"), faults)
    faults.clear()


@pytest.fixture
def gs(_gs) -> Iterator[Store]:
    """Cloud Storage."""
    yield from _one(_gs)


@pytest.fixture(params=["gs", pytest.param("s3", marks=pytest.mark.slow)])
def store(request) -> Iterator[Store]:
    """Each of the stores; the quick tests have one."""
    yield from _one(request.getfixturevalue(f"_{request.param}"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    """Downloaded records of one test are not there in the next."""
    monkeypatch.setenv("OMNIHUMAN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def environment() -> dict[str, str]:
    """Of commands that tests start."""
    return os.environ | {"JAX_PLATFORMS": "cpu"}
