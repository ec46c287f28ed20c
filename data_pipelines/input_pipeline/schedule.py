"""Selects the record and the active conditions of every row of every step: a pure function of (seed, step, row).

Nothing iterates from step 1: every count of earlier draws has a closed form. Step one million costs as much as step 1,
resuming needs only the step number, and hosts agree without communication. The parts:

- Splits. A balanced tree of two-way splits deals draws n = 0, 1, ... to receivers: of the first n arrivals at a node,
  floor((n * left + phase) / total) go left. So counts are exact and low-discrepancy: at any time a split is off by less
  than one draw. The phases come from the seed.
- A stage's steps are split over buckets (latent H,W), since all rows of a step share one shape. A bucket's draws (its
  steps times the batch size) are split by need (audio and pose, audio, pose, neither), and each need's draws over the
  cells of `mixture.py`. A cell's position is its number of draws so far, over all needs and earlier stages.
- A cell's draws follow a new random permutation of its records every epoch, so no record repeats within an epoch.
- A stage uses the clips that are at least as long as its window. If that leaves out some records of a cell, the rest
  form a cell with its own epochs; otherwise the cell continues from its position.
- Text and reference select no records. Shuffled blocks of `WINDOW` rows give their ratios, and every prefix of a block
  is within two rows of its share.

Accuracy: in any 1,000 consecutive samples of a stage a condition is scheduled within 1 % of its ratio, and over a whole
stage within a few rows. The exception: where buckets differ in their shares (one without eligible records leaves its
quota to the others), a span can hold a step too many of one bucket and one too few of another. Each two-way split
of the buckets adds less than one batch times the difference of its sides' shares.
tests/data_pipelines/input_pipeline/test_schedule.py checks both bounds.

A stage's plan does not depend on later stages or on its own length, and its streams are keyed by its name. So a change
to a later stage changes nothing earlier, and a change during a run is one more row in the table (`stages.continued`)
after which every cell continues from its position.
"""

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from data_pipelines.input_pipeline import mixture
from data_pipelines.input_pipeline.counter_random import hash64, make_key, permutation, uniform
from omnihuman_jax import conditions
from omnihuman_jax.errors import UserError
from omnihuman_jax.training.stages import Stage

WINDOW = 1000  # samples over which the ratios hold
SHUFFLED = 16  # a step's draws are shuffled within groups of so many rows; a window cuts at most two groups


@dataclasses.dataclass(frozen=True)
class Selection:
    """The rows of one step. The draws are uniform in [0,1) and independent of everything else."""

    step: int
    stage: int  # position in the stage table
    bucket: tuple[int, int]  # latent (H,W) of every row
    record: np.ndarray  # int64 [B], data set index
    scheduled: np.ndarray  # bool [B,conditions], by the ratios
    active: np.ndarray  # bool [B,conditions], scheduled and not dropped for classifier-free guidance
    start_draw: np.ndarray  # float64 [B,2], for the window's start
    reference_draw: np.ndarray  # float64 [B], for the reference frame


class _Split:
    """Deals draws to receivers in proportion to integer weights."""

    def __init__(self, weights: Sequence[int], *key: object):
        self._weights = [int(w) for w in weights]
        # One phase per two-way split, indexed by its middle.
        self._phases = hash64(make_key("split", *key), np.arange(max(len(weights), 2))).tolist()

    def counts(self, n: int | np.ndarray) -> np.ndarray:
        """int64 [receivers, *n.shape]: how many of the first n draws each receiver gets."""
        return np.stack(self._counts(np.asarray(n, np.int64), 0, len(self._weights)))

    def _counts(self, n: np.ndarray, begin: int, end: int) -> list[np.ndarray]:
        if end - begin == 1:
            return [n]
        middle = (begin + end) // 2
        left, total = sum(self._weights[begin:middle]), sum(self._weights[begin:end])
        to_left = (n * left + self._phases[middle] % total) // total if total else n
        return self._counts(to_left, begin, middle) + self._counts(n - to_left, middle, end)


@dataclasses.dataclass(frozen=True)
class _Bucket:
    """Deals the draws of one bucket in one stage to (need, cell) pairs."""

    needs: _Split
    cells: tuple[_Split | None, ...]  # by need
    leaves: tuple[tuple[int, int], ...]  # (need, cell) in the order of `counts`

    def counts(self, n: np.ndarray) -> np.ndarray:
        """int64 [leaves, *n.shape]."""
        by_need = self.needs.counts(n)
        return np.concatenate(
            [split.counts(by_need[need]) for need, split in enumerate(self.cells) if split is not None]
        )


class Schedule:
    """The selections of all stages over the records of one data set. Immutable and picklable."""

    def __init__(
        self,
        stages: Sequence[Stage],
        index: Sequence[Mapping],
        *,
        seed: int,
        guidance_dropout: Mapping[str, float] | None = None,
    ):
        """Plans every stage.

        Args:
          stages: the stage table; each stage starts right after the previous one.
          index: data set index with source, split, shape [Tclip,H,W] and flags (audio, pose) per clip.
          guidance_dropout: condition name -> probability of dropping a scheduled condition for classifier-free
            guidance, independent of the ratios.

        Raises:
          UserError: there are no training clips, or they cannot meet a stage's ratios or weights.
        """
        self.seed = int(seed)
        self._dropout = np.array([float((guidance_dropout or {}).get(name, 0.0)) for name in conditions.names()])
        for name, value in (guidance_dropout or {}).items():
            if name not in conditions.guided() or not 0 <= value <= 1:
                raise UserError(
                    f"guidance dropout {name}={value}: only {' and '.join(conditions.guided())} can be dropped, with a "
                    f"probability between 0 and 1"
                )
        records = [i for i, entry in enumerate(index) if entry["split"] == "train"]
        if not records:
            raise UserError("the data set has no training clips; prepare data with some, or hold out fewer")
        self._groups = mixture.make_cells(index, records)  # cells of clips of any length
        self._lengths = [np.array([index[i]["shape"][0] for i in group.records]) for group in self._groups]
        self._plan(stages)

    def with_stages(self, stages: Sequence[Stage]) -> Self:
        """The schedule of another stage table over the same records.

        Raises:
          UserError: the records cannot meet a stage's ratios or weights.
        """
        other = copy.copy(self)
        other._plan(stages)
        return other

    def _plan(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)
        self._check_table()
        self.cells: tuple[mixture.Cell, ...] = ()  # of all stages; `_usable` has the positions of each stage's cells
        self._usable = [self._usable_cells(stage) for stage in self.stages]
        self._members = [np.array(cell.records, np.int64) for cell in self.cells]
        # Cells of one name differ only in their minimum length, so the number of records identifies them.
        self._cell_keys = [make_key("cell", self.seed, cell.name, len(cell.records)) for cell in self.cells]
        self._mixtures, self._bucket_splits, self._streams = [], [], []
        self._bases = [np.zeros(len(self.cells), np.int64)]  # draws of each cell before each stage
        # Name and number among the rows of that name, so that inserting a row of another stage changes nothing.
        names = [stage.name for stage in self.stages]
        self._keys = [(self.seed, name, names[:i].count(name)) for i, name in enumerate(names)]
        for number, stage in enumerate(self.stages):
            self._add_stage(number, stage)

    def _usable_cells(self, stage: Stage) -> list[int]:
        """Positions in `cells` of the records that are long enough for a stage; adds new cells."""
        known = {(cell.name, len(cell.records)): i for i, cell in enumerate(self.cells)}
        usable = []
        for group, lengths in zip(self._groups, self._lengths, strict=True):
            fits = lengths >= stage.latent_frames
            count = int(np.count_nonzero(fits))
            if not count:
                continue
            if (group.name, count) not in known:
                cell = group
                if count < len(lengths):
                    cell = dataclasses.replace(group, records=tuple(np.array(group.records)[fits].tolist()))
                known[group.name, count] = len(self.cells)
                self.cells += (cell,)
            usable.append(known[group.name, count])
        if not usable:
            raise UserError(
                f"stages.{stage.name}: no training clip is as long as its window of {stage.latent_frames} latent "
                f"frames; add longer clips or shorten the window"
            )
        return usable

    def _check_table(self) -> None:
        if not self.stages:
            raise UserError("stages: the table is empty; give at least one stage")
        expected = 1
        for stage in self.stages:
            if stage.first_step != expected or stage.steps < 1:
                raise UserError(
                    f"stages.{stage.name}: starts at step {stage.first_step} with {stage.steps} steps; it must start "
                    f"at step {expected} with at least 1 step"
                )
            if stage.batch_size < 1:
                raise UserError(f"stages.{stage.name}: batch size {stage.batch_size} must be at least 1")
            expected += stage.steps

    def _add_stage(self, number: int, stage: Stage) -> None:
        cells, key = [self.cells[i] for i in self._usable[number]], self._keys[number]
        mix = mixture.plan_mixture(
            stage.name, stage.ratios, cells, stage.bucket_weights, self._source_weights(stage, cells)
        )
        streams = []
        for size, need_rates, cell_rates in zip(mix.buckets, mix.need_rates, mix.cell_rates, strict=True):
            splits = [
                _Split([rate for _, rate in rates], *key, size, need) if rates else None
                for need, rates in enumerate(cell_rates)
            ]
            leaves = [(need, self._usable[number][cell]) for need, rates in enumerate(cell_rates) for cell, _ in rates]
            streams.append(_Bucket(_Split(need_rates, *key, size), tuple(splits), tuple(leaves)))
        self._mixtures.append(mix)
        self._bucket_splits.append(_Split(mix.bucket_rates, *key))
        self._streams.append(streams)
        self._bases.append(self._draws(number, stage.steps))

    def _source_weights(self, stage: Stage, cells: Sequence[mixture.Cell]) -> dict[str, float] | None:
        """The stage's source weights without sources of weight 0 whose clips are all too short.

        Raises:
          UserError: such a source has a positive weight.
        """
        if stage.source_weights is None:
            return None
        missing = {group.source for group in self._groups} - {cell.source for cell in cells}
        for source in sorted(missing):
            if stage.source_weights.get(source, 0) > 0:
                raise UserError(
                    f"stages.{stage.name}: source {source!r} has a weight, but no clip as long as the window of "
                    f"{stage.latent_frames} latent frames; add longer clips, shorten the window or set the weight to 0"
                )
        return {source: weight for source, weight in stage.source_weights.items() if source not in missing}

    def _draws(self, number: int, steps: int) -> np.ndarray:
        """int64 [cells]: every cell's draws in all earlier stages and the first `steps` steps of stage `number`."""
        draws, size = self._bases[number].copy(), self.stages[number].batch_size
        for bucket, done in zip(self._streams[number], self._bucket_splits[number].counts(steps), strict=True):
            for (_, cell), count in zip(bucket.leaves, bucket.counts(done * size), strict=True):
                draws[cell] += count
        return draws

    @property
    def num_steps(self) -> int:
        """Total steps of all stages."""
        return self.stages[-1].last_step

    def stage_at(self, step: int) -> int:
        """Position in the stage table of a step (from 1).

        Raises:
          ValueError: the step is outside the table.
        """
        for number, stage in enumerate(self.stages):
            if stage.first_step <= step <= stage.last_step:
                return number
        raise ValueError(f"step {step} is outside the stage table, 1..{self.num_steps}")

    def _bucket_of(self, step: int) -> tuple[int, int, int]:
        """(stage, bucket, number of earlier steps of that bucket in the stage)."""
        number = self.stage_at(step)
        local = step - self.stages[number].first_step
        counts = self._bucket_splits[number].counts(np.array([local, local + 1]))
        bucket = int(np.argmax(counts[:, 1] - counts[:, 0]))
        return number, bucket, int(counts[bucket, 0])

    def select(self, step: int, rows: slice = slice(None)) -> Selection:
        """The selection of a step (from 1) for a slice of the global rows."""
        number, bucket, before = self._bucket_of(step)
        stream, size = self._streams[number][bucket], self.stages[number].batch_size
        counts = stream.counts(before * size + np.arange(size + 1))
        # Splits are regular, but rows should not be: shuffle the draws over the rows, within small groups so that a
        # span that ends within a step still meets the ratios.
        order = np.lexsort((hash64(make_key("order", self.seed), step, np.arange(size)), np.arange(size) // SHUFFLED))
        leaf = np.argmax(np.diff(counts, axis=1), axis=0)[order]  # of each row
        needs, cells = np.array(stream.leaves).T[:, leaf]
        position = np.empty(size, np.int64)
        draws = self._bases[number].copy()
        np.add.at(draws, [cell for _, cell in stream.leaves], counts[:, 0])  # a cell belongs to one bucket
        for cell in np.unique(cells):
            mine = cells == cell
            position[mine] = draws[cell] + np.arange(np.count_nonzero(mine))  # in row order, so that epochs are whole
        need = np.array(mixture.needs())[needs[rows]]
        row = np.arange(size)[rows]
        flags = dict(zip(conditions.selecting(), need.T, strict=True))
        names = conditions.names()
        scheduled = np.stack(
            [flags[name] if name in flags else self._flag(name, step, number, row) for name in names], axis=1
        )
        dropped = np.stack([self._uniform(f"drop {name}", step, row) for name in names], axis=1) < self._dropout
        return Selection(
            step=step,
            stage=number,
            bucket=self._mixtures[number].buckets[bucket],
            record=self._records(cells[rows], position[rows]),
            scheduled=scheduled,
            active=scheduled & ~dropped,
            start_draw=np.stack([self._uniform(f"start {i}", step, row) for i in range(2)], axis=1),
            reference_draw=self._uniform("reference", step, row),
        )

    def _records(self, cells: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """int64 [B]: data set index of each cell's draw at the given position."""
        records = np.empty(len(cells), np.int64)
        for cell in np.unique(cells):
            members, mine = self._members[cell], (cells == cell).nonzero()[0]
            epochs, places = np.divmod(positions[mine], len(members))
            for epoch in np.unique(epochs):
                order = permutation(self._cell_keys[cell], int(epoch), len(members))
                records[mine[epochs == epoch]] = members[order[places[epochs == epoch]]]
        return records

    def _flag(self, name: str, step: int, number: int, rows: np.ndarray) -> np.ndarray:
        """bool [rows]: whether text or reference is scheduled."""
        stage = self.stages[number]
        draw = (step - stage.first_step) * stage.batch_size + rows
        rate = round(mixture.UNIT * stage.ratios[name])
        block = draw // WINDOW
        result = np.empty(len(rows), bool)
        for b in np.unique(block):
            flags = _flag_block(make_key("flag", name, *self._keys[number]), int(b), rate)
            result[block == b] = flags[draw[block == b] % WINDOW]
        return result

    def _uniform(self, purpose: str, step: int, rows: np.ndarray) -> np.ndarray:
        return uniform(make_key(purpose, self.seed), step, rows)


@functools.lru_cache(maxsize=64)
def _flag_block(key: int, block: int, rate: int) -> np.ndarray:
    """bool [WINDOW]: a share rate/UNIT of True in random places, with every prefix within two of its share."""
    total, phase = WINDOW * rate, int(hash64(key)[0] % np.uint64(mixture.UNIT))
    ones = ((block + 1) * total + phase) // mixture.UNIT - (block * total + phase) // mixture.UNIT
    # The k-th of n equal flags falls uniformly into the k-th of n equal parts of the block; sorting merges both kinds.
    flags = np.arange(WINDOW) < ones
    rank = np.where(flags, np.arange(WINDOW), np.arange(WINDOW) - ones)
    size = np.where(flags, max(ones, 1), max(WINDOW - ones, 1))
    return flags[np.argsort((rank + uniform(key, block, np.arange(WINDOW))) / size, kind="stable")]
