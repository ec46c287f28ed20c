"""The report says what the evaluation found, whatever it found."""

import html.parser
import json
import re

import numpy as np
import pytest

from data_pipelines import schema
from data_pipelines.raw import media
from experiments.report import write
from omnihuman_jax.errors import UserError
from tests.experiments import painted


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> schema.Dataset:
    return painted.heldout_dataset(tmp_path_factory.mktemp("heldout"))


@pytest.fixture(scope="module")
def good(dataset):
    return painted.evaluate(painted.obedient, dataset)


def run_directory(path):
    """A run directory with the files that the report reads."""
    path.mkdir()
    ratios = {"text": 0.9, "reference": 0.7, "audio": 0.5, "pose": 0.0}
    stages = {name: {"steps": 20, "ratios": ratios} for name in ("stage1", "stage2")}
    model = {"num_dual_blocks": 1, "num_single_blocks": 2, "hidden_size": 32}
    (path / "config.json").write_text(json.dumps({"stages": stages, "model": model}))
    lines = [
        {
            "step": step,
            "stage": "stage1" if step <= 20 else "stage2",
            "loss": 1.0 / step,
            "loss_by_condition": {"text": 1.0, "audio": 0.5},
            "active_ratio": {"text": 0.85, "reference": 0.7, "audio": 0.4, "pose": 0.0},
            "scheduled_ratio": {"text": 0.9, "reference": 0.7, "audio": 0.5, "pose": 0.0},
            "step_seconds": 0.5,
        }
        for step in (*range(1, 31), *range(26, 41))  # steps 26-30 twice, as after a crash
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Links(html.parser.HTMLParser):
    """Collects src and href, and checks that elements are closed in order."""

    def __init__(self):
        super().__init__()
        self.links, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_whole_and_its_links_are_relative_and_exist(tmp_path, dataset, good):
    run = run_directory(tmp_path / "run")
    elsewhere = tmp_path / "made.mp4"
    media.write_mp4(elsewhere, np.zeros((5, 32, 32, 3), np.uint8))
    video = write.Video(elsewhere, "A <title>", "driven by audio & pose")
    path = write.write_report(
        run,
        dataset,
        evaluation=good,
        videos=[video],
        phases={"training": 61.0},
        missing=["pkg 1.0"],
        device="a machine",
    )
    text = path.read_text()
    page = Links()
    page.feed(text)
    assert page.open == []
    assert "media/made.mp4" in page.links and "report.json" in page.links
    for link in page.links:
        assert (run / link).is_file(), link
    assert "A &lt;title&gt;" in text and "pkg 1.0" in text and "synthetic" in text and "prox" in text
    assert not re.search(r"\b(FID|FVD|Sync-C)\b", text)
    assert str(tmp_path) not in text
    for strip in run.glob("media/evaluation_*.mp4"):
        assert media.has_audio(strip)


def test_report_json_holds_the_numbers(tmp_path, dataset, good):
    run = run_directory(tmp_path / "run")
    write.write_report(run, dataset, evaluation=good, device="a machine")
    data = json.loads((run / "report.json").read_text())
    assert data["evaluation"]["measures"]["mouth"]["rows"]["right"]["n"] == painted.CLIPS
    stage = data["training"]["stages"]["stage2"]
    assert stage["target"]["audio"] == 0.5 and stage["after guidance dropout"]["audio"] == 0.4
    assert stage["last_loss"] == pytest.approx(np.mean([1 / 40, 1 / 39]))
    assert data["data"]["groups"][0]["clips"] == painted.CLIPS


def test_report_shows_the_condition_gain_and_says_in_words_what_is_obeyed(tmp_path, dataset, good):
    run = run_directory(tmp_path / "run")
    assert write.read_gains(run) == []
    assert "evaluation.gain_every" in write.write_report(run, dataset, evaluation=None, device="x").read_text()

    def gain(value):
        told = {"gain": value, "error": 0.1, "clips": 8}
        return {"audio": {where: {"0.5": {"wrong": told, "none": {}}} for where in ("all", "mouth")}}

    lines = [{"step": s, "condition_gain": gain(v)} for s, v in ((20, 0.5), (40, 1.5), (40, 2.5))]
    text = "".join(json.dumps(line) + "\n" for line in [{"step": 20, "held_out_loss": {}}, *lines])
    (run / "evaluation.jsonl").write_text(text + json.dumps(lines[0])[:-1])  # cut after an inner brace
    assert write.read_gains(run) == [(20, gain(0.5)), (40, gain(2.5))]
    page = write.write_report(run, dataset, evaluation=good, device="x").read_text()
    assert "audio (mouth)" in page and "against another clip's" in page
    assert re.search(r"<b>obeyed</b>: [^;]*audio \(does the mouth follow the voice\)", page)
    assert json.loads((run / "report.json").read_text())["condition_gain"][1]["step"] == 40


def test_report_without_evaluation_says_so(tmp_path, dataset):
    run = run_directory(tmp_path / "run")
    text = write.write_report(run, dataset, evaluation=None, device="a machine").read_text()
    assert "Not measured in this run" in text


def test_a_run_without_metrics_is_one_line(tmp_path, dataset):
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        write.write_report(tmp_path, dataset, evaluation=None)
