"""Turns one stage's ratios, bucket weights and source weights into rates of draws.

A cell is the set of records of one source, one bucket (latent H,W) and one eligibility. A draw needs any subset of the
conditions that select records (audio and pose; every record has text and reference). For each bucket the plan gives
the rate of each need and the cells that serve it, so that

1. the ratios hold exactly over all buckets (buckets without eligible records leave their quota to the others), and each
   bucket keeps its share of steps,
2. a record never serves a need for a condition that it lacks (principle 1: it serves the weaker draws),
3. within these limits sources keep their weights (with a warning if not) and all records of a source are used equally
   often.

2 and 3 are a transport problem, solved by iterative proportional fitting. Sums use `np.bincount`, which adds in order,
or `math.fsum`, which rounds once, so that all hosts get identical results.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging

from omnihuman_jax import conditions
from omnihuman_jax.errors import UserError, nearest

UNIT = 10_000_000  # rates are integers out of UNIT, so decimal ratios are exact and counts fit into 64 bits

Bucket = tuple[int, int]
Need = tuple[bool, ...]  # whether a draw needs each condition that selects records


def needs() -> tuple[Need, ...]:
    """All needs, ordered so that a balanced split decides the weakest condition first (audio, then pose)."""
    return tuple(itertools.product((True, False), repeat=len(conditions.selecting())))


@dataclasses.dataclass(frozen=True)
class Cell:
    """Records that the schedule treats alike."""

    source: str
    bucket: Bucket  # latent (H,W)
    has: Need  # which of the selecting conditions its records have
    records: tuple[int, ...]  # data set indices

    @property
    def name(self) -> tuple[str | Bucket | bool, ...]:
        """What its records have in common; part of the key of their permutations."""
        return (self.source, self.bucket, *self.has)

    def serves(self, need: Need) -> bool:
        """Whether its records have all needed conditions."""
        return all(has >= needed for has, needed in zip(self.has, need, strict=True))


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Integer rates of one stage; a cell is its position in the list passed to `plan_mixture`."""

    buckets: tuple[Bucket, ...]  # with a positive share of steps
    bucket_rates: tuple[int, ...]  # share of steps
    need_rates: tuple[tuple[int, ...], ...]  # [bucket][need], out of UNIT
    # [bucket][need]: ((cell, rate), ...), out of UNIT; empty where the need has rate 0
    cell_rates: tuple[tuple[tuple[tuple[int, int], ...], ...], ...]


def make_cells(index: Sequence[Mapping], records: Sequence[int]) -> tuple[Cell, ...]:
    """Groups records of a data set index (source, shape [Tclip,H,W], audio, pose, ...) into sorted cells."""
    groups: dict[tuple, list[int]] = {}
    selects = [conditions.index(name) for name in conditions.selecting()]
    for i in records:
        entry = index[i]
        bucket = (int(entry["shape"][1]), int(entry["shape"][2]))
        has = tuple(conditions.eligibility(entry)[selects].tolist())
        groups.setdefault((entry["source"], bucket, has), []).append(int(i))
    return tuple(Cell(*name, tuple(members)) for name, members in sorted(groups.items()))


def _group_sum(values: np.ndarray, groups: np.ndarray, size: int) -> np.ndarray:
    return np.bincount(groups, weights=values, minlength=size)


def _fit(
    x: np.ndarray, constraints: Sequence[tuple[np.ndarray, np.ndarray]], iterations: int, tolerance: float = 1e-12
) -> np.ndarray:
    """Scales x [n] >= 0 until the group sums of every constraint (groups [n], targets) equal its targets.

    Meets the last constraint exactly and, if they contradict each other, the earlier ones approximately. Contradictions
    shrink entries without end; a floor keeps them from 0, from which the last constraint could not raise them again.
    """
    floor = np.where(x > 0, 1e-100, 0.0)
    for _ in range(iterations):
        error = 0.0
        for groups, targets in constraints:
            sums = _group_sum(x, groups, len(targets))
            error = max(error, float(np.abs(sums - targets).max()))
            x = np.maximum(x * np.divide(targets, sums, out=np.zeros_like(sums), where=sums > 0)[groups], floor)
        if error < tolerance:
            break
    return x


def _source_weights(weights: Mapping[str, float] | None, cells: Sequence[Cell]) -> dict[str, float]:
    """Normalised weight of each source; by default its share of the records."""
    sizes: dict[str, int] = {}
    for cell in cells:
        sizes[cell.source] = sizes.get(cell.source, 0) + len(cell.records)
    if weights is None:
        return {name: size / sum(sizes.values()) for name, size in sizes.items()}
    for name, weight in weights.items():
        if name not in sizes:
            raise UserError(f"data.source_weights.{name}: no training clips of that source{nearest(name, sizes)}")
        if not weight >= 0:
            raise UserError(f"data.source_weights.{name}={weight}: a weight must not be negative")
    missing = sorted(set(sizes) - set(weights))
    if missing or not sum(weights.values()) > 0:
        what = f"no weight for source {missing[0]!r}" if missing else "all weights are 0"
        raise UserError(f"data.source_weights: {what}; give every source ({', '.join(sorted(sizes))}) a weight")
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def _bucket_weights(
    by_bucket: Mapping[Bucket, float] | None, default: np.ndarray, buckets: Sequence[Bucket], where: str
) -> np.ndarray:
    """Normalised weights [b]."""
    if by_bucket is None:
        return default
    for bucket, weight in by_bucket.items():
        if bucket not in buckets:
            sizes = ", ".join(f"{h}x{w}" for h, w in buckets)
            raise UserError(f"{where}: no training clips of latent size {bucket[0]}x{bucket[1]}; there are {sizes}")
        if not weight >= 0:
            raise UserError(f"{where}: weight {weight} of latent size {bucket[0]}x{bucket[1]} must not be negative")
    weights = np.array([float(by_bucket.get(bucket, 0.0)) for bucket in buckets])
    if not math.fsum(weights) > 0:
        raise UserError(f"{where}: all bucket weights are 0; give one a positive weight")
    return weights / math.fsum(weights)


def _reach(weights: np.ndarray, can: np.ndarray, ratios: Sequence[float]) -> np.ndarray:
    """Raises the share of steps of buckets with eligible records as far as the ratios need it.

    Args:
      weights: [b], sums to 1.
      can: bool [c,b], bucket has records with the condition.
      ratios: [c].
    """
    for _ in range(20):
        for mask, ratio in zip(can, ratios, strict=True):
            share = math.fsum(weights[mask])
            if 0 < share < ratio:
                weights = np.where(mask, weights * ratio / share, weights * (1 - ratio) / (1 - share))
    return weights


def _check_reach(stage: str, ratios: Mapping[str, float], weights: np.ndarray, can: np.ndarray) -> None:
    """Raises UserError if a ratio exceeds the share of steps whose bucket has clips with the condition, `can` [c,b]."""
    for (name, ratio), mask in zip(ratios.items(), can, strict=True):
        reach = math.fsum(weights[mask])
        if ratio > reach + 1e-9:
            raise UserError(
                f"stages.{stage}.ratios.{name}={ratio:g}: the clips at hand reach at most {max(reach, 0.0):.4g} "
                f"(share of steps whose frame size has clips with {name}); lower it or add clips with {name}"
            )


def _shares_of_two(stage: str, ratios: Mapping[str, float], weights: np.ndarray, can: np.ndarray) -> np.ndarray:
    """Share of each need of two conditions over all draws, [4]; the conditions are independent if the data allow it.

    Args:
      can: bool [4,b], bucket b has records for need s.

    Raises:
      UserError: the ratios cannot be reached together.
    """
    share = [math.fsum(weights[mask]) for mask in can]  # of steps that could serve the need
    either = math.fsum(weights[can[1] | can[2]])
    (weak, first), (strong, second) = ratios.items()
    least, most = max(0.0, first + second - either), min(first, second, share[0])
    if least > most + 1e-9:
        raise UserError(
            f"stages.{stage}.ratios.{strong}={second:g}: with {weak}={first:g} the clips at hand reach at most "
            f"{either - first + min(first, share[0]):.4g} (too few have both {weak} and {strong}); lower a ratio or "
            f"add such clips"
        )
    both = min(max(first * second, least), most)
    return np.maximum([both, first - both, second - both, 1 - first - second + both], 0.0)


def _shares_of_many(stage: str, ratios: Mapping[str, float], weights: np.ndarray, can: np.ndarray) -> np.ndarray:
    """`_shares_of_two` for c conditions, [2**c]: fits the shares nearest to independence in relative entropy."""
    wanted = np.array(list(ratios.values()))
    needed = np.array(needs())
    independent = np.where(needed, wanted, 1 - wanted).prod(axis=1)
    need, bucket = (can & (weights > 0)).nonzero()
    marginals = [(needed[need, c].astype(int), np.array([1 - wanted[c], wanted[c]])) for c in range(len(wanted))]
    fitted = _fit(independent[need] * weights[bucket], [*marginals, (bucket, weights)], iterations=20_000)
    shares = _group_sum(fitted, need, len(needed))
    for c, name in enumerate(ratios):
        found = math.fsum(shares[needed[:, c]])
        if abs(found - wanted[c]) > 1e-3:
            raise UserError(
                f"stages.{stage}.ratios.{name}={wanted[c]:g}: with the other conditions the clips at hand reach "
                f"{found:.4g} (too few have several of {', '.join(ratios)}); change it or add such clips"
            )
    return shares


def _needs_by_bucket(shares: np.ndarray, weights: np.ndarray, can: np.ndarray) -> np.ndarray:
    """Share of every (need, bucket) over all draws, [s,b]; sums to `shares` over buckets, to `weights` over needs."""
    allowed = can & (weights > 0) & (shares[:, None] > 0)
    for size in range(1, len(shares)):
        for group in itertools.combinations(range(len(shares)), size):
            served_by = can[list(group)].any(axis=0)
            if math.fsum(weights[served_by]) - math.fsum(shares[list(group)]) < 1e-9:
                # These buckets only just suffice for these needs, so they serve nothing else. Fitting alone would
                # converge to that very slowly.
                others = [s for s in range(len(shares)) if s not in group]
                allowed[np.ix_(others, served_by.nonzero()[0])] = False
    need, bucket = allowed.nonzero()
    fitted = _fit(shares[need] * weights[bucket], [(need, shares), (bucket, weights)], iterations=20_000)
    result = np.zeros(can.shape)
    result[need, bucket] = fitted
    return result


def _warn_of_missed(stage: str, shares: np.ndarray, targets: np.ndarray, sources: Sequence[str]) -> None:
    for name, share, target in zip(sources, shares.tolist(), targets.tolist(), strict=True):
        if abs(share - target) > 0.01:
            logging.warning(
                f"stages.{stage}: source {name} gets {share:.3g} of the samples, not its weight of {target:.3g}; the "
                f"ratios and frame sizes take precedence"
            )


def plan_mixture(
    stage: str,
    ratios: Mapping[str, float],
    cells: Sequence[Cell],
    bucket_weights: Mapping[Bucket, float] | None = None,
    source_weights: Mapping[str, float] | None = None,
) -> Mixture:
    """Rates of buckets, needs and cells for one stage; see the module docstring.

    Args:
      stage: name for messages.
      ratios: condition name -> share of the draws, 0..1.
      bucket_weights: latent (H,W) -> weight of the steps; 0 for missing sizes. Default: the share of the records
        (weighted by source), raised for sizes with eligible records if the ratios need it.
      source_weights: source -> weight of the draws. Default: number of records.

    Raises:
      UserError: unknown source or size, or ratios that these records cannot reach.
    """
    conditions.check_ratios(ratios, where=f"stages.{stage}.ratios", allow_inverted=True)
    source_share = _source_weights(source_weights, cells)
    used = [i for i, cell in enumerate(cells) if source_share[cell.source] > 0]
    sources = sorted({cells[i].source for i in used})
    buckets = sorted({cells[i].bucket for i in used})
    source_of = np.array([sources.index(cells[i].source) for i in used])
    bucket_of = np.array([buckets.index(cells[i].bucket) for i in used])
    source_target = np.array([source_share[name] for name in sources])
    sizes = np.array([float(len(cells[i].records)) for i in used])
    wanted = sizes * (source_target / _group_sum(sizes, source_of, len(sources)))[source_of]

    selected = {name: float(ratios[name]) for name in conditions.selecting()}
    all_needs = needs()
    serves = np.array([[cells[i].serves(need) for i in used] for need in all_needs])
    can = np.array([np.bincount(bucket_of, weights=row, minlength=len(buckets)) > 0 for row in serves])
    alone = can[[all_needs.index(tuple(name == other for other in selected)) for name in selected]]
    by_data = _reach(_group_sum(wanted, bucket_of, len(buckets)), alone, tuple(selected.values()))
    weights = _bucket_weights(bucket_weights, by_data, buckets, f"stages.{stage}.bucket_weights")
    _check_reach(stage, selected, weights, alone)
    shares = (_shares_of_two if len(selected) == 2 else _shares_of_many)(stage, selected, weights, can)
    by_bucket = _needs_by_bucket(shares, weights, can)

    # Fit the cells to their wanted shares as far as the needs allow, then correct the sources' totals.
    wanted = _fit(wanted, [(source_of, source_target), (bucket_of, weights)], iterations=500)
    need, cell = (serves & (by_bucket[:, bucket_of] > 0)).nonzero()
    rows = (need * len(buckets) + bucket_of[cell], by_bucket.reshape(-1))
    x = _fit(by_bucket[need, bucket_of[cell]] * wanted[cell], [(cell, wanted), rows], iterations=2000, tolerance=1e-9)
    x = _fit(x, [(source_of[cell], source_target), rows], iterations=500, tolerance=1e-9)
    if source_weights is not None:
        _warn_of_missed(stage, _group_sum(x, source_of[cell], len(sources)), source_target, sources)

    rates, need_rates, cell_rates = [], [], []
    served = [b for b in range(len(buckets)) if round(UNIT * float(weights[b])) > 0]
    for b in served:
        rates.append(round(UNIT * float(weights[b])))
        need_rates.append(tuple(round(UNIT * by_bucket[s, b] / weights[b]) for s in range(len(all_needs))))
        by_need = []
        for s, need_rate in enumerate(need_rates[-1]):
            members = ((need == s) & (bucket_of[cell] == b)).nonzero()[0] if need_rate else ()
            pairs = [(used[cell[e]], round(UNIT * x[e] / by_bucket[s, b])) for e in members]
            by_need.append(tuple((c, rate) for c, rate in pairs if rate > 0))
        cell_rates.append(tuple(by_need))
    return Mixture(tuple(buckets[b] for b in served), tuple(rates), tuple(need_rates), tuple(cell_rates))
