"""Sweeps: grids, and the table of what the runs reached."""

import json
import pathlib

import pytest

from omnihuman_jax.errors import UserError
from tests.tpu.launching import run
from tpu.jobs import sweep

GRID = [{"config.seed": 1}, {"config.seed": 2, "config.mesh.tensor": 2}, {"config.seed": 3}]


def write_run(folder: pathlib.Path, lines: list[str]) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("\n".join(lines))


def line(step: int, loss: float) -> str:
    return json.dumps({"step": step, "stage": "stage1", "loss": loss, "step_seconds": 0.5, "mfu": None})


@pytest.fixture
def runs(tmp_path):
    """Three rows: one done, one whose last line is half written and that was restarted, one not started."""
    write_run(tmp_path / "runs" / "lr-0", [line(step, 100 - step) for step in range(1, 21)] + [""])
    write_run(tmp_path / "runs" / "lr-1", [line(1, 9.0), line(2, 8.0), line(2, 7.0), '{"step": 3, "lo'])
    (tmp_path / "grid.json").write_text(json.dumps(GRID))
    return tmp_path


def test_every_combination_of_a_grid_is_a_row(tmp_path):
    (tmp_path / "grid.json").write_text('{"config.a": [1, 2], "config.b": ["x", "y"]}')
    rows = sweep.read_grid(tmp_path / "grid.json")
    assert rows == [{"config.a": a, "config.b": b} for a in (1, 2) for b in "xy"]


def test_a_list_is_taken_as_it_is(runs):
    assert sweep.read_grid(runs / "grid.json") == GRID
    assert sweep.row_flags({"config.a": True, "config.plan.buckets": [[1, 2, 3]]}) == [
        "--config.a=True",
        "--config.plan.buckets=([1, 2, 3],)",
    ]


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ("{", "cannot be read"),
        ("{}", "give"),
        ("[]", "give"),
        ("3", "give"),
        ("[[1]]", "give"),
        ('{"config.seed": 1}', "config.seed: give a list of values"),
        ('{"config.seed": []}', "config.seed: give a list of values"),
        ('{"seed": [1]}', "row 0: 'seed' must begin with 'config.'"),
        ('[{"config.seed": null}]', "row 0: config.seed=null"),
        ('[{"config.seed": 1}, {"config.seed": 1}]', "row 1 is row 0 again"),
    ],
)
def test_what_is_no_grid_is_refused(grid, words, tmp_path):
    (tmp_path / "grid.json").write_text(grid)
    with pytest.raises(UserError, match="--sweep=") as error:
        sweep.read_grid(tmp_path / "grid.json")
    assert words in str(error.value)


def test_the_table_has_a_line_a_row_with_means_of_the_last_steps(runs):
    done, going_on, waiting = sweep.collect(str(runs / "runs"), "lr", GRID)
    # Steps 11 to 20.
    assert done == {
        **{"name": "lr-0", "config.seed": 1, "config.mesh.tensor": "", "step": 20, "stage": "stage1"},
        **{"loss": "84.5", "step_seconds": "0.5", "tokens_per_second": "", "mfu": ""},
    }
    assert (going_on["step"], going_on["loss"]) == (2, "8")  # steps 1 and 2, the second as it was run again
    assert (waiting["step"], waiting["stage"], waiting["loss"]) == (0, "not started", "")


def test_a_log_that_is_none_is_named_with_its_line(runs):
    (runs / "runs" / "lr-0" / "metrics.jsonl").write_text("nonsense\n" + line(1, 1.0))
    with pytest.raises(UserError, match="lr-0/metrics.jsonl: line 1"):
        sweep.collect(str(runs / "runs"), "lr", GRID)


def test_the_table_is_written_as_csv_or_markdown(runs, capsys):
    usual = {"action": "collect", "name": "lr", "sweep": runs / "grid.json", "workdir": runs / "runs"}
    assert run(**usual, output=runs / "table.csv") == 0
    lines = (runs / "table.csv").read_text().splitlines()
    assert lines[0] == "name,config.seed,config.mesh.tensor,step,stage,loss,step_seconds,tokens_per_second,mfu"
    assert lines[2].startswith("lr-1,2,2,2,stage1,8,0.5") and len(lines) == 4
    assert run(**usual) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("| --- | --- |")
    with pytest.raises(UserError, match="ends in .csv or .md"):
        run(**usual, output=runs / "table.xls")
