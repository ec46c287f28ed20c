"""Faults, injected: each does the sensible thing, says so, and nothing is lost."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from data_pipelines.input_pipeline import batches as batches_lib
from data_pipelines.input_pipeline.pipeline import InputPipeline
from experiments.common import cli
from omnihuman_jax.checkpoints import manager as checkpoints_lib
from omnihuman_jax.checkpoints import restore as restore_lib
from omnihuman_jax.checkpoints.fingerprint import fingerprint
from omnihuman_jax.checkpoints.manager import Checkpoints
from omnihuman_jax.checkpoints.read import load_for_inference, read_meta
from omnihuman_jax.errors import UserError
from omnihuman_jax.sharding.mesh import make_mesh, training_mesh
from omnihuman_jax.training import loop, run
from omnihuman_jax.training import step as step_lib
from omnihuman_jax.training.faults import STALLED, Watchdog
from omnihuman_jax.training.goodput import Goodput
from omnihuman_jax.training.log_files import LineFile
from omnihuman_jax.training.stages import curriculum
from omnihuman_jax.training.state import abstract_state
from omnihuman_jax.training.tasks import omnihuman
from omnihuman_jax.training.tasks.omnihuman import OmniHumanTask
from tests.checkpoints.test_not_finite import poison_on_disk
from tests.data_pipelines.fake_dataset import Flaky, write_fake_dataset
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
    """An input pipeline that does something before it gives the batch of a step."""

    def __init__(self, input_pipeline, trouble):
        self._feed, self._trouble = input_pipeline, trouble

    def iterate(self, first_step, rows):
        for step, batch in enumerate(self._feed.iterate(first_step, rows), start=first_step):
            yield self._trouble(step, dict(batch)) or batch

    def __getattr__(self, name):
        return getattr(self._feed, name)


def train(whole, name, trouble, config=None, sample=None, **settings):
    root, dataset, default = whole
    config = config or default
    (root / name).mkdir(exist_ok=True)
    input_pipeline = Troubled(InputPipeline.from_config(config, curriculum(config), dataset), trouble)
    task = OmniHumanTask(config, input_pipeline, sample, **settings)
    loop.train(task, config, cli.to_plain(config), root / name)
    return root / name


def lines(workdir, name="metrics.jsonl"):
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


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
    records, log = lines(workdir, "data_log.jsonl"), lines(workdir)
    assert "step 5: loss nan" in said and "skipped (1 in a row, 1 since the start)" in said
    assert f"records {', '.join(records[4]['records'])}" in said
    assert [line["skipped_steps"] for line in log] == [0] * 4 + [1] * 4
    assert log[4]["loss"] is None and all(np.isfinite(line["loss"]) for i, line in enumerate(log) if i != 4)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params(workdir)))


def test_a_skipped_step_leaves_parameters_as_they_were(whole):
    root, dataset, config = whole
    before = tiny_config(root / "data", steps=(4, 0, 0))
    train_tiny(before, root / "before", dataset)
    after = tiny_config(root / "data", steps=(4, 1, 0))

    def poison(step, batch):
        return batch | {"latents": np.full_like(batch["latents"], np.inf)} if step == 5 else None

    same(train(whole, "one_bad", poison, after), root / "before")


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_is_skipped_although_the_loss_is_finite(whole, monkeypatch):
    right = step_lib.sample_losses

    def with_bad_gradient(network, params, batch, t, eps):
        """Adds a square root at zero, whose slope is infinite, to the rows that are marked."""
        marked = batch["latents"][:, 0, 0, 0, 0] == 7.0
        inside = jnp.where(marked, 0 * jax.tree.leaves(params)[0].sum(), 1.0)
        return right(network, params, batch, t, eps) + jnp.where(marked, jnp.sqrt(inside), 0.0)

    def mark(step, batch):
        if step == 5:
            batch["latents"][:, 0, 0, 0, 0] = 7.0
            return batch

    monkeypatch.setattr(step_lib, "sample_losses", with_bad_gradient)
    monkeypatch.setattr(omnihuman, "jit_train_step", step_lib.jit_train_step)
    workdir = train(whole, "gradient", mark)
    log = lines(workdir)
    assert all(line["loss"] is not None for line in log)
    assert [line["grad_norm"] is None for line in log] == [False] * 4 + [True] + [False] * 3
    assert log[-1]["skipped_steps"] == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params(workdir)))


@pytest.mark.slow
def test_bad_steps_are_counted_across_a_restart(whole):
    config = tiny_config(whole[0] / "data", steps=(4, 4, 0))
    config.faults.max_bad_steps = 3

    def poison(step, batch):
        if step == 6 and not (whole[0] / "bad_twice" / "checkpoints" / "6").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return batch | {"latents": np.full_like(batch["latents"], np.nan)} if step >= 5 else None

    workdir = train(whole, "bad_twice", poison, config)
    assert lines(workdir)[-1]["step"] == 6
    with pytest.raises(UserError, match=r"step 7: .*3 steps in a row were not finite"):
        train(whole, "bad_twice", poison, config)


def test_too_many_bad_steps_in_a_row_end_the_run_and_name_the_last_checkpoint(whole):
    config = tiny_config(whole[0] / "data", steps=(4, 4, 0))
    config.faults.max_bad_steps = 2

    def poison(step, batch):
        return batch | {"latents": np.full_like(batch["latents"], np.nan)} if step >= 5 else None

    with pytest.raises(UserError, match=r"2 steps in a row were not finite .*last good checkpoint is .*/checkpoints/"):
        train(whole, "all_bad", poison, config)


def test_updates_that_overflow_are_skipped_and_end_the_run_although_loss_and_gradient_are_finite(whole):
    config = tiny_config(whole[0] / "data", steps=(4, 4, 0))
    config.faults.max_bad_steps = 2
    config.stages.stage2.learning_rate = 1e39  # infinity in float32
    words = (
        r"step 6: loss [\d.]+, gradient norm [\d.e-]+, but the new parameters, moments or EMA are not finite.*2 steps"
    )
    with pytest.raises(UserError, match=words):
        train(whole, "overflow", lambda *_: None, config)
    log = lines(whole[0] / "overflow")
    assert log[-1]["step"] == 5 and log[-1]["skipped_steps"] == 1 and log[-1]["loss"] is not None
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params(whole[0] / "overflow")))


def test_a_stage_does_not_start_from_parameters_that_are_not_finite(whole, tmp_path):
    root, dataset, config = whole
    source = tmp_path / "source"
    shutil.copytree(root / "whole" / "stages" / "stage1", source)
    poison_on_disk(source, "params")
    config = config.copy_and_resolve_references()
    config.stages.stage1.init_from = str(source)
    with pytest.raises(UserError, match="source: NaN or infinity in params/x_embed/kernel"):
        train_tiny(config, tmp_path / "run", dataset)


def test_fingerprints_are_sums_of_bits_on_every_mesh():
    tree = {"a": np.arange(64, dtype=np.float32).reshape(8, 8), "b": np.float32(1.5), "c": np.arange(4, dtype=np.int32)}
    expected = {k: int(np.asarray(v).view(np.uint32).sum(dtype=np.uint64) % 2**32) for k, v in tree.items()}
    for sizes in ({"data": 8, "fsdp": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
        mesh = make_mesh(sizes)
        specs = {"a": PartitionSpec("fsdp", "tensor"), "b": PartitionSpec(), "c": PartitionSpec()}
        placed = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in tree.items()}
        assert fingerprint(placed).sums == expected
    placed["a"] = placed["a"].at[3, 3].add(1e-5)
    found = fingerprint(placed).sums
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
    for meta in (root / "unreadable").glob("*/*/meta/metadata"):
        meta.write_text("{")
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


def spoil(change):
    """A damage that changes the text of the JSON item."""

    def damage(folder):
        path = folder / "meta" / "metadata"
        path.write_text(change(path.read_text()))

    return damage


def of_arrays(action):
    """A damage that does something to every file of array data."""

    def damage(folder):
        for path in (folder / "state").glob("**/d/*"):
            action(path)

    return damage


DAMAGES = {
    "flipped bytes": damage,
    "cut arrays": of_arrays(lambda path: os.truncate(path, path.stat().st_size // 2)),
    "empty arrays": of_arrays(lambda path: os.truncate(path, 0)),
    "no arrays": of_arrays(os.unlink),
    "no description of the arrays": lambda folder: (folder / "state" / "_METADATA").unlink(),
    "no state": lambda folder: shutil.rmtree(folder / "state"),
    "no meta": lambda folder: shutil.rmtree(folder / "meta"),
    "an empty folder": lambda folder: [shutil.rmtree(part) for part in folder.iterdir() if part.is_dir()],
    "cut meta": spoil(lambda text: text[: len(text) // 2]),
    "meta of nothing": spoil(lambda text: "{}"),
    "meta of another type": spoil(lambda text: "null"),
    "another step in meta": spoil(lambda text: text.replace('"step": 8', '"step": 9')),
    "another count in meta": spoil(lambda text: text.replace('"rows": ', '"rows": 1')),
}


def restore(workdir, config):
    """What a start restores, as (path, restored), and what it says."""
    said, mesh = [], training_mesh(config)
    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(workdir, every=2, keep=2, stages={"stage1": 4, "stage2": 8}, log=said.append)
        try:
            return checkpoints.restore_latest(abstract_state(config, mesh), config), "\n".join(said)
        finally:
            checkpoints.close()


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_kind_of_damage_is_recognised_and_the_one_before_is_used(whole, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(restore_lib, "RETRY_SECONDS", ())
    root, _, config = whole
    shutil.copytree(root / "whole", tmp_path / "run")
    DAMAGES[kind](tmp_path / "run" / "checkpoints" / "8")
    restored, said = restore(tmp_path / "run", config)
    assert restored.meta["step"] == int(restored.state.step) == 6
    assert "checkpoints/8 is skipped and moved to damaged/" in said
    assert (tmp_path / "run" / "damaged" / "8").is_dir()


@pytest.mark.slow
def test_where_all_running_checkpoints_are_damaged_a_stage_is_used(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(restore_lib, "RETRY_SECONDS", ())
    root, dataset, config = whole
    shutil.copytree(root / "whole", tmp_path / "run")
    for folder in [*(tmp_path / "run" / "checkpoints").glob("[0-9]*"), tmp_path / "run" / "stages" / "stage2"]:
        damage(folder)
    restored, said = restore(tmp_path / "run", config)
    assert restored.path == tmp_path / "run" / "stages" / "stage1" and restored.meta["step"] == 4
    assert said.count("is skipped and moved to damaged/") == 3
    shutil.copytree(tmp_path / "run" / "damaged" / "6", tmp_path / "run" / "checkpoints" / "6")
    train_tiny(config, tmp_path / "run", dataset)
    same(tmp_path / "run", root / "whole")
    same(tmp_path / "run" / "stages" / "stage2", root / "whole" / "stages" / "stage2")


def test_a_read_error_while_restoring_that_heals_is_no_damage(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(restore_lib, "RETRY_SECONDS", (0.0,))
    root, _, config = whole
    shutil.copytree(root / "whole", tmp_path / "run")
    right, failures = restore_lib.restore, [OSError(errno.EIO, "Input/output error")]

    def flaky(*arguments):
        if failures:
            raise failures.pop()
        return right(*arguments)

    monkeypatch.setattr(restore_lib, "restore", flaky)
    restored, said = restore(tmp_path / "run", config)
    assert restored.meta["step"] == 8 and not said and not failures


@pytest.mark.slow
def test_changed_moment_dtypes_are_cast_and_are_no_damage(whole, tmp_path):
    root, _, config = whole
    shutil.copytree(root / "whole", tmp_path / "run")
    before, _ = restore(tmp_path / "run", config)
    changed = config.copy_and_resolve_references()
    changed.optimizer.mu_dtype = "bfloat16"
    after, said = restore(tmp_path / "run", changed)
    pairs = list(zip(jax.tree.leaves(before.state), jax.tree.leaves(after.state), strict=True))
    assert not said and any(a.dtype != b.dtype for a, b in pairs)
    for a, b in pairs:
        np.testing.assert_array_equal(np.asarray(a.astype(b.dtype)), np.asarray(b))


def test_the_policy_keeps_the_last_and_every_mth(whole):
    config = tiny_config(whole[0] / "data", steps=(4, 4, 0))
    config.checkpoint.update({"every": 1, "keep": 2, "keep_every": 3})
    workdir = train(whole, "kept", lambda *_: None, config)
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [3, 6, 7, 8]
    assert sorted(p.name for p in (workdir / "stages").iterdir()) == ["stage1", "stage2"]


def wait_until(happened):
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def wait_for_save(workdir, step):
    """Saves are asynchronous: waits until one is whole."""
    wait_until((workdir / "checkpoints" / str(step)).is_dir)


@contextlib.contextmanager
def disk():
    """A function that sets the size to which files may grow, None for no limit: it stands for the full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_is_told_and_the_next_save_works_and_no_line_is_lost(whole, capsys, monkeypatch):
    root, refused = whole[0], []
    right = Checkpoints._write
    monkeypatch.setattr(
        Checkpoints, "_write", lambda self, save: (failed := right(self, save), refused.extend(failed))[0]
    )
    with disk() as limit:

        def fill(step, _):
            if step == 5:
                wait_for_save(root / "full", 4)
                limit(0)  # not one more byte, in the logs neither
            if step == 8:
                wait_until(lambda: refused)  # step 6
                limit(None)

        workdir = train(whole, "full", fill)
    said = capsys.readouterr().out
    assert "a checkpoint could not be written" in said and "/checkpoints/4; training goes on" in said
    assert "metrics.jsonl: File too large; lines are kept in memory" in said and "nothing is missing" in said
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["4", "8"]
    same(workdir, root / "whole")
    assert [line["loss"] for line in lines(workdir)] == [line["loss"] for line in lines(root / "whole")]
    assert lines(workdir, "data_log.jsonl") == lines(root / "whole", "data_log.jsonl")


def filling(limit, workdir, step, then=lambda: None):
    """What fills the disk before a step, once the checkpoint before it is whole."""

    def fill(now, _):
        if now == step:
            wait_for_save(workdir, step - 1)
            limit(20_000)
            then()

    return fill


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(whole):
    with disk() as limit:
        fill = filling(limit, whole[0] / "full_at_end", 7)
        with pytest.raises(UserError, match="could not be written.*checkpoints/6; make room and start the same"):
            train(whole, "full_at_end", fill)


def test_a_stop_whose_save_fails_says_so(whole):
    with disk() as limit:
        fill = filling(limit, whole[0] / "full_at_stop", 5, then=lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(UserError, match="checkpoints/5.*the last complete one is .*checkpoints/4; make room"):
            train(whole, "full_at_stop", fill)


def refuse(monkeypatch, *names):
    """Makes saves to folders of these names fail, as on a full disk."""
    right = checkpoints_lib.ocp.AsyncCheckpointer.save

    def save(self, path, *arguments, **keywords):
        if path.name in names:
            raise OSError(errno.ENOSPC, "No space left on device")
        return right(self, path, *arguments, **keywords)

    monkeypatch.setattr(checkpoints_lib.ocp.AsyncCheckpointer, "save", save)


def test_a_stage_that_could_not_be_written_is_made_from_its_running_checkpoint(whole, monkeypatch, capsys):
    refuse(monkeypatch, "stage1")
    workdir = train(whole, "mended", lambda *_: None)
    said = capsys.readouterr().out
    assert "stages/stage1: No space" in said.replace("[Errno 28] ", "")
    assert "stages/stage1: was missing; copied from" in said
    same(workdir / "stages" / "stage1", whole[0] / "whole" / "stages" / "stage1")
    assert read_meta(workdir / "stages" / "stage1")["step"] == 4


@pytest.mark.slow
def test_a_stage_that_is_nowhere_is_an_error_at_the_end(whole, monkeypatch):
    refuse(monkeypatch, "stage1", "4")
    with pytest.raises(UserError, match=r"stages/stage1: .*No space left.*checkpoints/8; make room"):
        train(whole, "stage_lost", lambda *_: None)


@pytest.mark.slow
def test_starting_over_replaces_the_stages_of_the_training_before(whole, capsys):
    root, dataset, config = whole
    shutil.copytree(root / "whole", root / "over")
    shutil.rmtree(root / "over" / "checkpoints")
    other = config.copy_and_resolve_references()
    other.seed = 7
    train_tiny(other, root / "over", dataset)
    assert "stages/stage1: replaced; it held step 4" in capsys.readouterr().out
    train_tiny(other, root / "fresh", dataset)
    for stage in ("stage1", "stage2"):
        same(root / "over" / "stages" / stage, root / "fresh" / "stages" / stage)


class Sampler:
    """Writes a picture of one pixel, and counts."""

    def __init__(self, folder):
        self._folder, self.calls = folder, []

    def path(self, step, stage):
        return self._folder / f"{stage.name}.gif"

    def __call__(self, params, step, stage):
        self.calls.append(stage.name)
        self.path(step, stage).write_bytes(b"GIF89a")
        return self.path(step, stage), (1, 1)


@pytest.mark.slow
def test_a_sample_that_cannot_be_written_does_not_end_the_run(whole, tmp_path, capsys):
    class Refused(Sampler):
        def __call__(self, params, step, stage):
            raise OSError(errno.ENOSPC, "No space left on device")

    same(train(whole, "no_sample", lambda *_: None, sample=Refused(tmp_path)), whole[0] / "whole")
    assert "stage1: the sample video could not be written" in capsys.readouterr().out


@pytest.mark.slow
def test_waiting_for_the_last_save_is_no_stall(whole, monkeypatch):
    dogs, paused = [], []

    class Recorded(Watchdog):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            dogs.append(self)

    right = Checkpoints.wait
    monkeypatch.setattr(run, "Watchdog", Recorded)

    def wait(self):
        if self._saving and not self._saving.done():
            paused.append(dogs[-1]._paused)
        right(self)

    monkeypatch.setattr(Checkpoints, "wait", wait)
    train(whole, "waited", lambda *_: None)
    assert paused and all(paused)


@pytest.mark.slow
def test_a_border_between_stages_may_move_behind_the_run(whole, capsys):
    """Stage 1 of 8 steps is stopped after 4 and is to have had 2: it ends there and stage 2 begins, from elsewhere."""
    root, dataset, _ = whole

    def stop(step, _):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    workdir = train(whole, "moved", stop, tiny_config(root / "data", steps=(8, 2, 0)))
    config = tiny_config(root / "data", steps=(2, 6, 0))
    config.stages.stage2.init_from = str(root / "whole" / "stages" / "stage2")
    config.stages.stage2.learning_rate = 0.0
    train(whole, "moved", lambda *_: None, config, replace_parameters_at=("stage2",))
    said = capsys.readouterr().out
    assert "stage2: steps 5–8" in said and "stage2: parameters from" in said
    assert [line["stage"] for line in lines(workdir)] == ["stage1"] * 4 + ["stage2"] * 4
    assert [read_meta(workdir / "stages" / name)["step"] for name in ("stage1", "stage2")] == [4, 8]
    same(workdir, root / "whole" / "stages" / "stage2")


@pytest.mark.slow
def test_a_stage_that_has_ended_is_kept_when_its_length_changes_later(whole):
    root, dataset, _ = whole
    train_tiny(tiny_config(root / "data", steps=(4, 4, 0)), root / "longer", dataset)
    before = (root / "longer" / "stages" / "stage1" / "meta" / "metadata").read_bytes()
    train_tiny(tiny_config(root / "data", steps=(6, 4, 0)), root / "longer", dataset)
    assert (root / "longer" / "stages" / "stage1" / "meta" / "metadata").read_bytes() == before


@pytest.mark.slow
def test_what_a_stop_leaves_out_is_made_up_for_by_the_next_start(whole, tmp_path):
    root, _, _ = whole
    dataset = write_fake_dataset(tmp_path / "data", 12, shapes=((7, 4, 4),), heldout=5)
    config = tiny_config(tmp_path / "data", steps=(4, 2, 0))
    config.evaluation.update({"every": 2, "batches": 1})
    sampler = Sampler(tmp_path)

    def stop(step, _):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    workdir = train((tmp_path, dataset, config), "stopped", stop, sample=sampler)
    assert sampler.calls == [] and [line["step"] for line in lines(workdir, "evaluation.jsonl")] == [2]
    for _ in range(2):  # the second start finds everything done
        train((tmp_path, dataset, config), "stopped", lambda *_: None, sample=sampler)
    assert sampler.calls == ["stage1", "stage2"]
    assert [line["step"] for line in lines(workdir, "evaluation.jsonl")] == [2, 4, 6]


def test_lines_survive_a_full_disk_and_a_half_line(tmp_path):
    path, said = tmp_path / "lines.jsonl", []
    path.write_text('{"step": 1}\n{"st')
    with disk() as limit:
        file = LineFile(path, said.append)
        file.write({"step": 2})
        limit(path.stat().st_size + 5)  # the next line is cut in its middle
        file.write({"step": 3})
        file.write({"step": 4})
        limit(None)
        file.write({"step": 5, "loss": float("nan")})
        file.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        *({"step": i} for i in (1, 2, 3, 4)),
        {"step": 5, "loss": None},
    ]
    assert len(said) == 2 and "kept in memory" in said[0] and "nothing is missing" in said[1]


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
    with pytest.raises(UserError, match=r"record .* \(row \d+ of .*\) cannot be read after 3 attempts .*Input/output"):
        train_tiny(config, root / "unread", Flaky(dataset, failures=10**6))


def test_a_stalled_step_ends_the_process_with_the_stacks_of_its_threads():
    code = (
        "import time\n"
        "from omnihuman_jax.training.faults import Watchdog\n"
        "dog = Watchdog(0.5, lambda: 'CHECKPOINT')\n"
        "dog.start()\n"
        "def stuck_here():\n    time.sleep(60)\n"
        "stuck_here()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == STALLED
    assert "stuck_here" in ended.stderr and "the last checkpoint is CHECKPOINT" in ended.stderr


STALL = """
import sys, time
from pathlib import Path
from experiments.common import cli
from data_pipelines.input_pipeline.pipeline import InputPipeline
from data_pipelines.schema import Dataset
from omnihuman_jax.training import loop
from omnihuman_jax.training import step as step_lib
from omnihuman_jax.training.stages import curriculum
from omnihuman_jax.training.tasks.omnihuman import OmniHumanTask
from tests.training.test_faults import Troubled
from tests.checkpoints.test_not_finite import poison_on_disk
from tests.data_pipelines.fake_dataset import write_fake_dataset
from tests.training.tiny import tiny_config

root = Path(sys.argv[1])
config = tiny_config(root / "data", steps=(4, 4, 0))
config.faults.watchdog_seconds = 4
cli.setup_platform(config)

def hang_in_the_feed(step, _):
    if step == 6:
        time.sleep(600)

source = InputPipeline.from_config(config, curriculum(config), Dataset.open(root / "data"))
input_pipeline = Troubled(source, hang_in_the_feed)
loop.train(OmniHumanTask(config, input_pipeline), config, cli.to_plain(config), root / "stalled")
"""


@pytest.mark.slow
def test_a_run_that_stalls_ends_by_itself_and_can_be_continued(whole):
    root, dataset, config = whole
    (root / "stalled").mkdir()
    ended = subprocess.run(
        [sys.executable, "-c", STALL, str(root)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert ended.returncode == STALLED, ended.stderr[-2000:]
    assert "hang_in_the_feed" in ended.stderr and "faults.watchdog_seconds=4" in ended.stderr
    assert f"the last checkpoint is {root / 'stalled' / 'checkpoints' / '4'}" in ended.stderr
    train_tiny(config, root / "stalled", dataset)
    same(root / "stalled", root / "whole")


def test_the_watchdog_waits_while_compiling_and_ends_with_the_run():
    dog = Watchdog(0.2, lambda: "")
    dog.start()
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
