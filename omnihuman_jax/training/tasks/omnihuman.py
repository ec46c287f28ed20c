"""Training of OmniHuman through its stages: flow matching on batches whose conditions follow the stage ratios."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from omnihuman_jax import batch as batch_lib
from omnihuman_jax.checkpoints.load import is_exported, load_parameters
from omnihuman_jax.checkpoints.restore import same_network
from omnihuman_jax.errors import UserError
from omnihuman_jax.models.functional import make_network
from omnihuman_jax.sharding import mesh as mesh_lib
from omnihuman_jax.sharding import rules
from omnihuman_jax.sharding.processes import gather, is_main, process_rows, wait_for_all
from omnihuman_jax.training import condition_gain
from omnihuman_jax.training import metrics as metrics_lib
from omnihuman_jax.training import stages as stages_lib
from omnihuman_jax.training.condition_gain import ConditionGain
from omnihuman_jax.training.held_out import HeldOutLoss
from omnihuman_jax.training.hooks import Evaluation
from omnihuman_jax.training.log_files import last_step_in
from omnihuman_jax.training.metrics import RatioCounter
from omnihuman_jax.training.run import Run
from omnihuman_jax.training.run_config import config_digest
from omnihuman_jax.training.stages import Stage, ends_stage, stage_at
from omnihuman_jax.training.state import TrainState, abstract_state, init_state, make_optimizer, state_from_params
from omnihuman_jax.training.step import jit_train_step
from omnihuman_jax.training.step_settings import StepSettings
from omnihuman_jax.training.task import Hook

Batch = Mapping[str, np.ndarray]


class InputPipeline(Protocol):
    """Source of batches; a batch is a pure function of the step."""

    def iterate(self, first_step: int, rows: slice) -> Iterator[Batch]:
        """The given global rows of the batches of steps first_step, first_step + 1, …"""

    def describe(self, step: int) -> dict[str, Any]:
        """`records`, `active` and `scheduled`: record id and condition names of every global row of a step."""

    def use_stages(self, stages: Sequence[Stage]) -> None:
        """Draws every step from this table; UserError if the data set cannot supply it."""

    def fingerprint(self) -> str:
        """Hex digest of the metadata of the data set and of every record."""

    def held_out(self, count: int, rows: slice, view: str = "full") -> list[dict[str, np.ndarray]]:
        """The given global rows of `count` held-out batches, of full frames or of "face" crops."""


class SampleVideo(Protocol):
    """Writes a sample video at the end of a stage."""

    def path(self, step: int, stage: Stage) -> Path:
        """The GIF that a call writes."""

    def __call__(self, params: Any, step: int, stage: Stage) -> tuple[Path, tuple[int, int]]:
        """Writes it from the EMA parameters; returns its path and (height, width)."""


class OmniHumanTask:
    """See `training.task.Task`.

    Args:
      config: resolved config.
      input_pipeline: source of batches.
      sample: writes a video at the end of every stage; None for none.
      replace_parameters_at: stages whose `init_from` may replace what the run has trained; see
        `stages.loads_init_from`.

    Raises:
      UserError: the devices or the data set do not support the mesh, the stages or an evaluation.
    """

    saved = "parameters, optimizer, EMA, data position and ratio counts"

    def __init__(
        self,
        config: ConfigDict,
        input_pipeline: InputPipeline,
        sample: SampleVideo | None = None,
        replace_parameters_at: Collection[str] = (),
    ):
        self.stages, self.mesh = stages_lib.curriculum(config), mesh_lib.training_mesh(config)
        self.config, self.network, self.input_pipeline = config, make_network(config), input_pipeline
        self._sample, self._replace_parameters_at = sample, replace_parameters_at
        self._rows = process_rows(rules.batch_sharding(self.mesh), config.global_batch_size)
        due = {key: config.evaluation[key] for key in ("every", "gain_every") if config.evaluation[key]}
        self._held_out = input_pipeline.held_out(config.evaluation.batches, self._rows) if due else []
        for key, every in () if self._held_out else due.items():
            raise UserError(
                f"evaluation.{key}={every}: the data set has no held-out clips as long as the training window; set it "
                f"to 0, or prepare data with a held-out split"
            )
        self._data = input_pipeline.fingerprint()
        self._train_step = jit_train_step(config, self.network, self.mesh)
        self._counter = RatioCounter()

    def digests(self) -> dict[str, str]:
        """Digests of the data set and of --replace_parameters_at."""
        named = config_digest({"stages": sorted(self._replace_parameters_at)})
        return {"data set": self._data, "--replace_parameters_at": named}

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        return abstract_state(self.config, self.mesh, self.network)

    def init_state(self) -> TrainState:
        """A fresh state."""
        return init_state(self.config, self.mesh, self.network)

    def check_saved(self, saved: Mapping[str, Any], config: ConfigDict, path: Path) -> None:
        """Raises UserError if the checkpoint is of a network with different shapes."""
        same_network(saved, config, path)

    def meta(self) -> dict[str, Any]:
        """The stage table in use and the ratio counts."""
        return {"stages": stages_lib.to_json(self.stages), "counter": self._counter.state()}

    def restore(self, meta: Mapping[str, Any]) -> list[str]:
        """Sets `stages` to the continuation of the saved table; returns what the config changes."""
        saved, own, done = stages_lib.from_json(meta["stages"]), self.stages, meta["step"]
        self._counter = RatioCounter(**meta.get("counter", {}))
        table = stages_lib.continued(saved, own, done)
        try:
            self.input_pipeline.use_stages(table)
        except UserError as error:  # from the saved rows; the config rows were already planned on this data set
            return [
                f"the data set at hand cannot give what steps 1 to {done} drew ({error}); they count as drawn by the "
                f"stages of this config, so records may repeat or be left out once"
            ]
        self.stages = table
        return stages_lib.changes(saved, own, done)

    def enter_stage(self, state: TrainState, step: int, log: Callable[[str], None]) -> TrainState:
        """The initial state of a stage: from the previous stage, or with parameters from `init_from`."""
        stage = stage_at(self.stages, step)
        log(f"{stage.name}: steps {stage.first_step}–{stage.last_step}, ratios {dict(stage.ratios)}")
        shardings = jax.tree.map(lambda x: x.sharding, state)
        if stages_lib.loads_init_from(self.stages, step, self._replace_parameters_at):
            raw = None if is_exported(stage.init_from) else False  # exports hold one set of parameters
            _, params, info = load_parameters(stage.init_from, use_ema=raw, shardings=shardings.params)
            log(f"{stage.name}: parameters from {info['path']} (step {info['step']}), fresh optimizer")
            fresh = jax.jit(lambda p: state_from_params(self.config, p), out_shardings=shardings)(params)
            return fresh._replace(step=state.step)
        if stage.init_from:
            log(
                f"{stage.name}: keeps the parameters trained so far; --replace_parameters_at={stage.name} would load "
                f"those of init_from={stage.init_from}"
            )
        if step > 1 and self.config.optimizer.reset_at_stage:
            fresh = jax.jit(make_optimizer(self.config).init, out_shardings=shardings.opt_state)(state.params)
            return state._replace(opt_state=fresh)
        return state

    def batches(self, first_step: int) -> Iterator[Batch]:
        """The rows of this process, for the batches from a step on."""
        return self.input_pipeline.iterate(first_step, self._rows)

    def train_step(self, step: int) -> Any:
        """The same for every step."""
        return self._train_step

    def arguments(self, step: int, batch: Batch) -> tuple[Any, ...]:
        """(batch on the mesh, settings of the stage)."""
        stage, rate = stage_at(self.stages, step), stages_lib.learning_rate_at(self.stages, step)
        never = batch_lib.never_present(stage.ratios, stage.motion_ratio) if self.config.data.omit_absent else ()
        return batch_lib.place(self.config, self.mesh, batch, never), StepSettings.of(stage, rate)

    def describe(self, step: int, batch: Batch) -> dict[str, Any]:
        """Records, conditions and the ratios so far."""
        described, stage = self.input_pipeline.describe(step), stage_at(self.stages, step)
        if step == stage.first_step:
            self._counter = RatioCounter()  # ratios are counted per stage
        counter = self._counter
        counter.add(described)
        return described | {
            "bucket": batch_lib.bucket_of(batch),
            "active_ratio": counter.ratios(counter.active),
            "scheduled_ratio": counter.ratios(counter.scheduled),
            "target_ratio": stage.ratios,
        }

    def log_line(self, step: int, described: Mapping[str, Any], metrics: Any, seconds: float) -> dict[str, Any]:
        """Losses by condition, realised ratios, gradient norms, throughput."""
        rates = metrics_lib.throughput(
            self.network.config, self.config.global_batch_size, described["bucket"], self.mesh, seconds
        )
        return {
            **metrics_lib.losses(metrics, described["active"]),
            "active_ratio": described["active_ratio"],
            "scheduled_ratio": described["scheduled_ratio"],
            "grad_norm_by_part": {name: float(norm) for name, norm in metrics["grad_norm_by_part"].items()},
            "learning_rate": stages_lib.learning_rate_at(self.stages, step),
            **rates,
        }

    def hooks(self, run: Run) -> list[Hook]:
        """Sample videos and held-out evaluations, as configured."""
        hooks: list[Hook] = [SampleVideos(run, self, self._sample)] if self._sample else []
        parts, evaluation = (self.config, self.network, self.mesh), self.config.evaluation
        if evaluation.every:

            def held_out_loss() -> HeldOutLoss:
                placed = [batch_lib.place(self.config, self.mesh, batch) for batch in self._held_out]
                return HeldOutLoss(*parts, placed)

            hooks.append(HeldOut(run, "held_out_loss", evaluation.every, held_out_loss))
        if evaluation.gain_every:

            def gain() -> ConditionGain:
                crops = self.input_pipeline.held_out(evaluation.batches, self._rows, "face")
                return ConditionGain(*parts, [*self._held_out, *crops])

            hooks.append(HeldOut(run, "condition_gain", evaluation.gain_every, gain, condition_gain.summary))
        return hooks

    def finish(self, state: TrainState) -> None:
        """Nothing to do."""


class SampleVideos(Evaluation):
    """Writes a sample video from the EMA at the end of every stage."""

    def __init__(self, run: Run, task: OmniHumanTask, sample: SampleVideo):
        super().__init__(run)
        self._task, self._sample = task, sample

    def due(self, step: int) -> bool:
        """Whether the step ends a stage."""
        return ends_stage(self._task.stages, step)

    def is_there(self, step: int) -> bool:
        """Whether the file exists."""
        return self._sample.path(step, stage_at(self._task.stages, step)).exists()

    def evaluate(self, step: int, state: TrainState) -> None:
        """Writes the video in process 0; training continues if that fails."""
        stage, ema = stage_at(self._task.stages, step), gather(state.ema)
        if is_main():
            # Work done by one process alone must not be sharded over all devices.
            with contextlib.nullcontext() if jax.process_count() == 1 else jax.set_mesh(mesh_lib.local_mesh()):
                try:
                    path, size = self._sample(ema, step, stage)
                    self.run.writer.video(f"sample/{stage.name}", path, size, step)
                except (OSError, UserError) as error:  # such as a full disk; training matters more
                    self.run.log(f"{stage.name}: the sample video could not be written: {error}; training goes on")
        wait_for_all("sampled")


class HeldOut(Evaluation):
    """Evaluates the EMA on held-out clips every `every` steps and writes to evaluation.jsonl.

    Args:
      run: the run.
      name: key of the values in the file.
      every: interval in steps.
      measure: builds the function that evaluates parameters; called at the first evaluation.
      summary: formats a log line; None for no line.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        every: int,
        measure: Callable[[], Callable[[Any], Mapping[str, Any]]],
        summary: Callable[[Mapping[str, Any]], str] | None = None,
    ):
        super().__init__(run)
        self._name, self._every, self._make, self._measure, self._summary = name, every, measure, None, summary

    def due(self, step: int) -> bool:
        """Whether `every` divides the step."""
        return step % self._every == 0

    def is_there(self, step: int) -> bool:
        """Whether evaluation.jsonl has the result."""
        return last_step_in(self.run.workdir / "evaluation.jsonl", self._name) >= step

    def evaluate(self, step: int, state: TrainState) -> None:
        """Writes a line of evaluation.jsonl."""
        self._measure = self._measure or self._make()
        values = self._measure(state.ema)
        self.run.writer.evaluation(step, self._name, values)
        if self._summary:
            self.run.log(f"step {step}: {self._name.replace('_', ' ')}: {self._summary(values)}")
