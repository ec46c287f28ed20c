"""Random numbers as pure functions of a key and counters, identical on every machine and library version.

The generator is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
2014), applied once per counter: h <- mix(h + GOLDEN * (counter + 1)). It is a bijection of each counter, so numbers
that differ only in the last counter never collide. Unlike NumPy's generators it gives random access to any step.
"""

import functools
import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def make_key(*parts: object) -> int:
    """64-bit key from the `repr` of its parts (strings, integers, tuples of them)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(key: int, *counters: int | np.ndarray) -> np.ndarray:
    """uint64 [n] from a key and non-negative counters (integers or arrays [n])."""
    with np.errstate(over="ignore"):
        state = np.atleast_1d(np.uint64(key))
        for counter in counters:
            state = _mix(state + _GOLDEN * (np.atleast_1d(np.asarray(counter)).astype(np.uint64) + np.uint64(1)))
    return state


def uniform(key: int, *counters: int | np.ndarray) -> np.ndarray:
    """float64 [n] in [0, 1)."""
    return (hash64(key, *counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


@functools.lru_cache(maxsize=256)
def permutation(key: int, number: int, size: int) -> np.ndarray:
    """Permutation `number` of range(size), int64 [size], read-only."""
    order = np.argsort(hash64(key, number, np.arange(size)), kind="stable")
    order.flags.writeable = False
    return order
