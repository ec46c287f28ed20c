"""How much of each batch comes from where: one stage's ratios, frame sizes and sources turned into rates of draws.

Records fall into cells: same source, same bucket (latent H,W), same eligibility. A draw needs nothing, audio, pose or
both (text and reference are possible with every record). The plan gives, per bucket, how often each need occurs and
from which cells it is served, so that

1. the audio and pose ratios of the stage hold exactly over all buckets (buckets without eligible records leave their
   quota to the others), each bucket keeping its share of steps,
2. records that lack a needed condition never serve it (principle 1: they serve the weaker draws),
3. as far as 1 and 2 allow, sources keep their weights (a warning says which do not) and all records of a source are
   used equally often.

2 and 3 are a transport problem, solved by iterative proportional fitting. Sums go through `np.bincount`, which adds in
order, or `math.fsum`, which rounds once, so that every host gets the same bits.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging

from omnihuman_jax import conditions
from omnihuman_jax.errors import UserError, nearest

UNIT = 10_000_000  # rates are integers out of UNIT: decimal ratios are exact, and counts stay in 64 bits
# Needs of a draw as (audio, pose), in the order that makes a balanced split decide audio first, then pose.
NEEDS = ((True, True), (True, False), (False, True), (False, False))

Bucket = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Cell:
    """Records that are interchangeable for the schedule."""

    source: str
    bucket: Bucket  # latent (H,W)
    audio: bool
    pose: bool
    records: tuple[int, ...]  # data set indices

    @property
    def name(self) -> tuple[str, Bucket, bool, bool]:
        return (self.source, self.bucket, self.audio, self.pose)

    def serves(self, need: tuple[bool, bool]) -> bool:
        """Whether its records can take a draw with this need (audio, pose)."""
        return self.audio >= need[0] and self.pose >= need[1]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Integer rates of one stage. `cells` are positions in the cell list given to `plan_mixture`."""

    buckets: tuple[Bucket, ...]  # those that get steps
    bucket_rates: tuple[int, ...]  # share of steps
    need_rates: tuple[tuple[int, ...], ...]  # [bucket][need], out of UNIT
    # [bucket][need]: ((cell, rate), ...), out of UNIT; empty where the need has rate 0
    cell_rates: tuple[tuple[tuple[tuple[int, int], ...], ...], ...]


def make_cells(index: Sequence[Mapping], records: Sequence[int]) -> tuple[Cell, ...]:
    """Groups the given records of a data set index ({source, shape [Tclip,H,W], audio, pose}) into cells, sorted."""
    groups: dict[tuple, list[int]] = {}
    for i in records:
        entry = index[i]
        bucket = (int(entry["shape"][1]), int(entry["shape"][2]))
        groups.setdefault((entry["source"], bucket, bool(entry["audio"]), bool(entry["pose"])), []).append(int(i))
    return tuple(Cell(*name, tuple(members)) for name, members in sorted(groups.items()))


def _group_sum(values: np.ndarray, groups: np.ndarray, size: int) -> np.ndarray:
    return np.bincount(groups, weights=values, minlength=size)


def _fit(
    x: np.ndarray, constraints: Sequence[tuple[np.ndarray, np.ndarray]], iterations: int, tolerance: float = 1e-12
) -> np.ndarray:
    """Scales x [n] >= 0 until, for each (groups [n], targets), the sums of its groups equal the targets.

    The last constraint is met exactly; where they contradict each other, the earlier ones only nearly.
    """
    for _ in range(iterations):
        error = 0.0
        for groups, targets in constraints:
            sums = _group_sum(x, groups, len(targets))
            error = max(error, float(np.abs(sums - targets).max()))
            x = x * np.divide(targets, sums, out=np.zeros_like(sums), where=sums > 0)[groups]
        if error < tolerance:
            break
    return x


def _source_weights(given: Mapping[str, float] | None, cells: Sequence[Cell]) -> dict[str, float]:
    """Normalised weight of each source; by default its share of the records."""
    sizes: dict[str, int] = {}
    for cell in cells:
        sizes[cell.source] = sizes.get(cell.source, 0) + len(cell.records)
    if given is None:
        return {name: size / sum(sizes.values()) for name, size in sizes.items()}
    for name, weight in given.items():
        if name not in sizes:
            raise UserError(f"data.source_weights.{name}: no training clips of that source{nearest(name, sizes)}")
        if not weight >= 0:
            raise UserError(f"data.source_weights.{name}={weight}: a weight must not be negative")
    missing = sorted(set(sizes) - set(given))
    if missing or not sum(given.values()) > 0:
        what = f"no weight for source {missing[0]!r}" if missing else "all weights are 0"
        raise UserError(f"data.source_weights: {what}; give every source ({', '.join(sorted(sizes))}) a weight")
    return {name: weight / sum(given.values()) for name, weight in given.items()}


def _bucket_weights(
    given: Mapping[Bucket, float] | None, by_data: np.ndarray, buckets: Sequence[Bucket], where: str
) -> np.ndarray:
    if given is None:
        return by_data
    for bucket, weight in given.items():
        if bucket not in buckets:
            sizes = ", ".join(f"{h}x{w}" for h, w in buckets)
            raise UserError(f"{where}: no training clips of latent size {bucket[0]}x{bucket[1]}; there are {sizes}")
        if not weight >= 0:
            raise UserError(f"{where}: weight {weight} of latent size {bucket[0]}x{bucket[1]} must not be negative")
    weights = np.array([float(given.get(bucket, 0.0)) for bucket in buckets])
    if not math.fsum(weights) > 0:
        raise UserError(f"{where}: all bucket weights are 0; give one a positive weight")
    return weights / math.fsum(weights)


def _reach(weights: np.ndarray, can: np.ndarray, ratios: Sequence[float]) -> np.ndarray:
    """Moves share of steps to buckets with eligible records where the ratios need more than they have.

    Args:
      weights: [b], sums to 1. can: bool [2,b], bucket has audio-, pose-eligible records. ratios: of audio and pose.
    """
    for _ in range(20):
        for mask, ratio in zip(can, ratios, strict=True):
            share = math.fsum(weights[mask])
            if 0 < share < ratio:
                weights = np.where(mask, weights * ratio / share, weights * (1 - ratio) / (1 - share))
    return weights


def _need_shares(stage: str, ratios: tuple[float, float], weights: np.ndarray, can: np.ndarray) -> np.ndarray:
    """Share of each of NEEDS over all draws, [4]: audio and pose independent of each other where the data allow.

    Args:
      can: bool [4,b], bucket b has records for need s.

    Raises:
      UserError: the ratios cannot be reached, with the one that can.
    """
    share = [math.fsum(weights[mask]) for mask in can]  # of steps that could serve the need
    either = math.fsum(weights[can[1] | can[2]])
    for name, ratio, reach in (("audio", ratios[0], share[1]), ("pose", ratios[1], share[2])):
        if ratio > reach + 1e-9:
            raise UserError(
                f"stages.{stage}.ratios.{name}={ratio:g}: the clips at hand reach at most {max(reach, 0.0):.4g} "
                f"(share of steps whose frame size has clips with {name}); lower it or add clips with {name}"
            )
    audio, pose = ratios
    least, most = max(0.0, audio + pose - either), min(audio, pose, share[0])
    if least > most + 1e-9:
        raise UserError(
            f"stages.{stage}.ratios.pose={pose:g}: beside audio={audio:g} the clips at hand reach at most "
            f"{either - audio + min(audio, share[0]):.4g} (too few have both audio and pose); lower one of them or add "
            f"such clips"
        )
    both = min(max(audio * pose, least), most)
    return np.maximum([both, audio - both, pose - both, 1 - audio - pose + both], 0.0)


def _needs_by_bucket(shares: np.ndarray, weights: np.ndarray, can: np.ndarray) -> np.ndarray:
    """Share of (need, bucket) over all draws, [4,b], with sums `shares` over buckets and `weights` over needs."""
    allowed = can & (weights > 0) & (shares[:, None] > 0)
    for size in range(1, len(NEEDS)):
        for group in itertools.combinations(range(len(NEEDS)), size):
            served_by = can[list(group)].any(axis=0)
            if math.fsum(weights[served_by]) - math.fsum(shares[list(group)]) < 1e-9:
                # These buckets just suffice for these needs, so they serve nothing else. Fitting alone would only
                # approach that, at a rate of one over the iterations.
                others = [s for s in range(len(NEEDS)) if s not in group]
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
                "stages.%s: source %s gives %.3g of the samples, not its weight of %.3g: the ratios and the frame "
                "sizes come first, and leave its clips no other share",
                stage,
                name,
                share,
                target,
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
      stage: its name, for messages.
      ratios: condition name -> share of the draws, 0..1.
      bucket_weights: latent (H,W) -> share of the steps; sizes not named get none. Default: by the share of the
        records (weighted by source), raised for sizes with eligible records where the ratios need it.
      source_weights: source -> share of the draws. Default: by size.

    Raises:
      UserError: unknown source or size, or ratios that these records cannot give.
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

    serves = np.array([[cells[i].serves(need) for i in used] for need in NEEDS])
    can = np.array([np.bincount(bucket_of, weights=row, minlength=len(buckets)) > 0 for row in serves])
    pair = (float(ratios["audio"]), float(ratios["pose"]))
    by_data = _reach(_group_sum(wanted, bucket_of, len(buckets)), can[1:3], pair)
    weights = _bucket_weights(bucket_weights, by_data, buckets, f"stages.{stage}.bucket_weights")
    shares = _need_shares(stage, pair, weights, can)
    needs = _needs_by_bucket(shares, weights, can)

    # Cells: first as near to their wanted share as the needs allow, then the sources' totals are put right.
    wanted = _fit(wanted, [(source_of, source_target), (bucket_of, weights)], iterations=500)
    need, cell = (serves & (needs[:, bucket_of] > 0)).nonzero()
    rows = (need * len(buckets) + bucket_of[cell], needs.reshape(-1))
    x = _fit(needs[need, bucket_of[cell]] * wanted[cell], [(cell, wanted), rows], iterations=2000, tolerance=1e-9)
    x = _fit(x, [(source_of[cell], source_target), rows], iterations=500, tolerance=1e-9)
    if source_weights is not None:
        _warn_of_missed(stage, _group_sum(x, source_of[cell], len(sources)), source_target, sources)

    rates, need_rates, cell_rates = [], [], []
    served = [b for b in range(len(buckets)) if round(UNIT * float(weights[b])) > 0]
    for b in served:
        rates.append(round(UNIT * float(weights[b])))
        need_rates.append(tuple(round(UNIT * needs[s, b] / weights[b]) for s in range(len(NEEDS))))
        by_need = []
        for s, need_rate in enumerate(need_rates[-1]):
            members = ((need == s) & (bucket_of[cell] == b)).nonzero()[0] if need_rate else ()
            pairs = [(used[cell[e]], round(UNIT * x[e] / needs[s, b])) for e in members]
            by_need.append(tuple((c, rate) for c, rate in pairs if rate > 0))
        cell_rates.append(tuple(by_need))
    return Mixture(tuple(buckets[b] for b in served), tuple(rates), tuple(need_rates), tuple(cell_rates))
