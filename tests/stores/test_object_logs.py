"""Log files in object stores: nothing is lost while a store fails, and an object always ends with a whole line."""

import json
import signal
import struct
import subprocess
import sys
import time

import pytest

from omnihuman_jax.training import object_logs
from omnihuman_jax.training.log_files import MetricsWriter, ObjectLines, last_step_in

LINES = [{"step": step, "loss": step / 7} for step in range(1, 21)]


def test_lines_wait_in_memory_while_a_store_fails_and_none_is_missing(store, monkeypatch):
    monkeypatch.setattr(object_logs, "UPLOAD_SECONDS", 0.0)
    said, path = [], store.root / "metrics.jsonl"
    file = ObjectLines(path, said.append)
    for line in LINES[:5]:
        file.write(line)
    file.sync()
    assert [json.loads(line) for line in path.read_text().splitlines()] == LINES[:5]
    store.faults.of = lambda method, path: 403
    for line in LINES[5:10]:
        file.write(line)
        file.sync()
    assert len(said) == 1 and "no permission" in said[0] and "kept in memory" in said[0]
    store.faults.clear()
    assert [json.loads(line) for line in path.read_text().splitlines()] == LINES[:5]
    for line in LINES[10:]:
        file.write(line)
    file.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == LINES
    assert said[1:] == [f"{path}: writable again, nothing is missing"]
    assert last_step_in(path) == 20 and store.names() == ["metrics.jsonl"]


def test_what_never_reached_the_store_is_told_at_the_end(gs):
    said = []
    file = ObjectLines(gs.root / "metrics.jsonl", said.append)
    gs.faults.of = lambda method, path: 403
    file.write(LINES[0])
    file.close()
    size = len(json.dumps(LINES[0])) + 1
    assert said[-1] == f"{gs.root}/metrics.jsonl: the last {size} bytes could not be written"


def test_writing_does_not_wait_for_a_slow_store(gs):
    gs.faults.slow = lambda method, path: 1.0
    file, begun = ObjectLines(gs.root / "metrics.jsonl", print), time.monotonic()
    for line in LINES:
        file.write(line)
    assert time.monotonic() - begun < 0.5
    gs.faults.clear()
    file.close()
    assert (gs.root / "metrics.jsonl").read_text().count("\n") == len(LINES)


WRITER = """
import sys
from omnihuman_jax import stores
from omnihuman_jax.training import object_logs
from omnihuman_jax.training.log_files import ObjectLines
object_logs.UPLOAD_SECONDS = 0.0
file = ObjectLines(stores.get_path(sys.argv[1]), print)
for step in range(1, 10**6):
    file.write({"step": step, "text": "x" * 2000})
    if step % 20 == 0:
        file.sync()
        print(step, flush=True)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_whole_lines_and_all_that_it_synced(gs, environment):
    path = gs.root / "metrics.jsonl"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    synced = [int(writer.stdout.readline()) for _ in range(3)][-1]
    gs.faults.slow = lambda method, path: 0.05  # so that it is killed in the middle of something
    time.sleep(0.12)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    gs.faults.clear()
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)) and steps[-1] >= synced


def records(data):
    """The payloads of TensorBoard's records: length (8 bytes), its CRC (4), payload, CRC (4)."""
    found = []
    while data:
        (size,) = struct.unpack_from("<Q", data)
        found.append(data[12 : 12 + size])
        assert len(found[-1]) == size
        data = data[16 + size :]
    return found


def test_a_run_writes_its_lines_and_events(store):
    from tensorboardX.proto.event_pb2 import Event

    writer = MetricsWriter(store.root, log_records=True)
    for step in (1, 2, 3):
        writer.records(step, {"records": ["a", "b"]})
        writer.step({"step": step, "stage": "s", "loss": float("nan")}, {})
    writer.evaluation(3, "gain", {"audio": 1.5})
    writer.sync()
    assert last_step_in(store.root / "metrics.jsonl") == 3 == last_step_in(store.root / "evaluation.jsonl", "gain")
    assert last_step_in(store.root / "evaluation.jsonl", "other") == 0 == last_step_in(store.root / "none.jsonl")
    writer.close()
    assert (store.root / "data_log.jsonl").read_text().count('"records": ["a", "b"]') == 3
    (name,) = store.names("tensorboard")
    events = [Event.FromString(one) for one in records((store.root / "tensorboard" / name).read_bytes())]
    assert [event.step for event in events] == [0, 1, 2, 3, 3]
    assert events[-1].summary.value[0].tag == "gain/audio"


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluation.jsonl"])
def test_a_second_start_goes_on_at_the_end(gs, name):
    for step in (1, 2):
        file = ObjectLines(gs.root / name, print)
        file.write({"step": step})
        file.close()
    assert (gs.root / name).read_text() == '{"step": 1}\n{"step": 2}\n'
