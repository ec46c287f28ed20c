"""Faults, injected: each does the sensible thing, says so, and nothing is lost."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from data_pipelines import batches as batches_lib
from data_pipelines.feed import Feed
from experiments import cli
from omnihuman_jax.errors import UserError
from omnihuman_jax.sharding.mesh import make_mesh
from omnihuman_jax.training import loop
from omnihuman_jax.training.checkpoints import fingerprint, load_for_inference
from omnihuman_jax.training.curriculum import curriculum
from omnihuman_jax.training.faults import STALLED, Watchdog
from omnihuman_jax.training.goodput import Goodput
from tests.training.tiny import tiny_config, tiny_data, train_tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without faults: 8 steps, checkpoints at every second."""
    root = tmp_path_factory.mktemp("faults")
    dataset = tiny_data(root / "data")
    config = tiny_config(root / "data", steps=(4, 4, 0))
    train_tiny(config, root / "whole", dataset)
    return root, dataset, config


class Troubled:
    """A feed that does something before it gives the batch of a step."""

    def __init__(self, feed, trouble):
        self._feed, self._trouble = feed, trouble

    def iterate(self, first_step, rows):
        for step, batch in enumerate(self._feed.iterate(first_step, rows), start=first_step):
            yield self._trouble(step, dict(batch)) or batch

    def __getattr__(self, name):
        return getattr(self._feed, name)


def train(whole, name, trouble, config=None):
    root, dataset, default = whole
    config = config or default
    (root / name).mkdir(exist_ok=True)
    feed = Troubled(Feed.from_config(config, curriculum(config), dataset), trouble)
    loop.train(config, cli.to_plain(config), root / name, feed, None)
    return root / name


def params(workdir):
    return load_for_inference(workdir, use_ema=False)[1]


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, params(a), params(b))


def test_a_stop_signal_saves_and_the_run_continues_bit_for_bit(whole, capsys):
    def stop(step, _):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    workdir = train(whole, "stopped", stop)
    told = capsys.readouterr().out
    assert "stopped by SIGTERM after step 3 of 8" in told and "start the same command again" in told
    assert (workdir / "checkpoints" / "3").is_dir()
    train(whole, "stopped", lambda *_: None)
    assert "after step 3 of 8" in capsys.readouterr().out
    same(workdir, whole[0] / "whole")


def test_a_step_that_is_not_finite_is_skipped_and_told(whole, capsys):
    def poison(step, batch):
        if step == 5:
            batch["latents"] = np.full_like(batch["latents"], np.nan)
            return batch

    workdir = train(whole, "poisoned", poison)
    said = capsys.readouterr().out
    records = [json.loads(line) for line in (workdir / "data_log.jsonl").read_text().splitlines()]
    assert "step 5: loss nan" in said and "skipped (1 in a row, 1 since the start)" in said
    assert records[4]["records"][0] in said
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0] * 4 + [1] * 4
    assert lines[4]["loss"] is None and all(np.isfinite(line["loss"]) for i, line in enumerate(lines) if i != 4)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params(workdir)))


def test_a_skipped_step_leaves_parameters_as_they_were(whole):
    root, dataset, config = whole
    before = tiny_config(root / "data", steps=(4, 0, 0))
    train_tiny(before, root / "before", dataset)
    after = tiny_config(root / "data", steps=(4, 1, 0))

    def poison(step, batch):
        return batch | {"latents": np.full_like(batch["latents"], np.inf)} if step == 5 else None

    same(train(whole, "one_bad", poison, after), root / "before")


def test_too_many_bad_steps_in_a_row_end_the_run_and_name_the_last_checkpoint(whole):
    config = tiny_config(whole[0] / "data", steps=(4, 4, 0))
    config.faults.max_bad_steps = 2

    def poison(step, batch):
        return batch | {"latents": np.full_like(batch["latents"], np.nan)} if step >= 5 else None

    with pytest.raises(UserError, match=r"2 steps in a row were not finite .*last good checkpoint is .*/checkpoints/"):
        train(whole, "all_bad", poison, config)


def test_fingerprints_are_sums_of_bits_on_every_mesh():
    tree = {"a": np.arange(64, dtype=np.float32).reshape(8, 8), "b": np.float32(1.5), "c": np.arange(4, dtype=np.int32)}
    expected = {k: int(np.asarray(v).view(np.uint32).sum(dtype=np.uint64) % 2**32) for k, v in tree.items()}
    for sizes in ({"data": 8, "fsdp": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
        mesh = make_mesh(sizes)
        specs = {"a": PartitionSpec("fsdp", "tensor"), "b": PartitionSpec(), "c": PartitionSpec()}
        placed = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in tree.items()}
        assert fingerprint(placed) == expected
    placed["a"] = placed["a"].at[3, 3].add(1e-5)
    found = fingerprint(placed)
    assert found["a"] != expected["a"] and found["b"] == expected["b"]


def damage(folder):
    """Flips bytes in the middle of every larger file of a checkpoint's arrays."""
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 4096:
            content = bytearray(path.read_bytes())
            middle = len(content) // 2
            content[middle : middle + 64] = bytes(b ^ 0xFF for b in content[middle : middle + 64])
            path.write_bytes(bytes(content))


def test_a_damaged_newest_checkpoint_is_named_set_aside_and_the_one_before_used(whole, capsys):
    root, dataset, config = whole
    short = tiny_config(root / "data", steps=(4, 2, 0))
    train_tiny(short, root / "damaged", dataset)
    damage(root / "damaged" / "checkpoints" / "6")
    capsys.readouterr()
    train_tiny(config, root / "damaged", dataset)
    said = capsys.readouterr().out
    assert "checkpoints/6 is skipped and moved to damaged/" in said
    assert "after step 4 of 8" in said
    assert (root / "damaged" / "damaged" / "6").is_dir()
    same(root / "damaged", root / "whole")


def test_checkpoints_that_cannot_be_read_are_not_the_same_as_none(whole):
    root, dataset, config = whole
    short = tiny_config(root / "data", steps=(2, 0, 0))
    train_tiny(short, root / "unreadable", dataset)
    for folder in (root / "unreadable" / "checkpoints").glob("[0-9]*"):
        (folder / "meta" / "metadata").write_text("{")
    with pytest.raises(UserError, match="no checkpoint can be read .*move the folder checkpoints/ away"):
        train_tiny(config, root / "unreadable", dataset)


def test_a_half_written_checkpoint_is_named_and_removed(whole, capsys):
    root, dataset, config = whole
    short = tiny_config(root / "data", steps=(4, 0, 0))
    train_tiny(short, root / "half", dataset)
    half = root / "half" / "checkpoints" / "6.orbax-checkpoint-tmp-123"
    (half / "state").mkdir(parents=True)
    capsys.readouterr()
    train_tiny(config, root / "half", dataset)
    assert f"{half}: half-written" in capsys.readouterr().out
    assert not half.exists()
    same(root / "half", root / "whole")


def wait_for_save(workdir, step):
    """Saves are asynchronous: waits until one is whole."""
    end = time.monotonic() + 60
    while not (workdir / "checkpoints" / str(step)).is_dir():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_disk_at_save_time_is_told_and_the_next_save_works(whole, capsys):
    """A limit on the size of written files stands for the full disk: the same refusal from the file system."""
    root = whole[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(step, _):
        if step == 5:
            wait_for_save(root / "full", 4)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if step in (5, 6, 7) else soft, hard))
        if step == 7:
            time.sleep(2)  # the save after step 6 fails meanwhile
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    try:
        workdir = train(whole, "full", fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    said = capsys.readouterr().out
    assert "a checkpoint could not be written" in said and "/checkpoints/4; training goes on" in said
    assert sorted(p.name for p in (workdir / "checkpoints").glob("[0-9]*"))[-1] == "8"
    same(workdir, whole[0] / "whole")


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(whole):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(step, _):
        if step == 7:
            wait_for_save(whole[0] / "full_at_end", 6)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if step >= 7 else soft, hard))

    try:
        with pytest.raises(UserError, match="could not be written.*checkpoints/6; make room and start the same"):
            train(whole, "full_at_end", fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


class Flaky:
    """A data set whose reads of some records fail so many times."""

    def __init__(self, dataset, failures):
        self._dataset, self.left = dataset, failures

    def read(self, i):
        if self.left > 0:
            self.left -= 1
            raise OSError("Input/output error")
        return self._dataset.read(i)

    def __getattr__(self, name):
        return getattr(self._dataset, name)


def test_a_read_error_that_heals_does_not_change_the_run(whole, monkeypatch):
    root, dataset, config = whole
    monkeypatch.setattr(batches_lib, "RETRY_SECONDS", (0.01, 0.01, 0.01))
    flaky = Flaky(dataset, failures=3)
    train_tiny(config, root / "healed", flaky)
    assert flaky.left == 0
    same(root / "healed", root / "whole")


def test_a_read_error_that_stays_names_the_record(whole, monkeypatch):
    root, dataset, config = whole
    monkeypatch.setattr(batches_lib, "RETRY_SECONDS", (0.01, 0.01))
    with pytest.raises(UserError, match=r"record .* \(row \d+ of .*\) cannot be read, 3 times tried .*Input/output"):
        train_tiny(config, root / "unread", Flaky(dataset, failures=10**6))


def test_a_stalled_step_ends_the_process_with_the_stacks_of_its_threads():
    code = (
        "import time\n"
        "from omnihuman_jax.training.faults import Watchdog\n"
        "dog = Watchdog(0.5, lambda: 'CHECKPOINT')\n"
        "def stuck_here():\n    time.sleep(60)\n"
        "stuck_here()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == STALLED
    assert "stuck_here" in ended.stderr and "the last checkpoint is CHECKPOINT" in ended.stderr


def test_the_watchdog_waits_while_compiling_and_ends_with_the_run():
    dog = Watchdog(0.2, lambda: "")
    with dog:
        time.sleep(0.6)  # would have ended this process
    dog.close()
    time.sleep(0.4)


def test_goodput_shares_add_up():
    goodput = Goodput(time.time() - 1.0)
    with goodput.cause("data"):
        time.sleep(0.1)
    time.sleep(0.1)
    report = goodput.report()
    assert sum(report.values()) == pytest.approx(1.0)
    assert report["start"] > 0.5 and 0.05 < report["data"] < 0.2 and report["useful"] > 0.05
