"""Counter-based random numbers: a pure function of (key, stream, index, column).

What it does: turns 64-bit keys and record numbers into uniform and normal draws by hashing (the splitmix64
finaliser), all records of a request in one vectorised call. What it does not: hold a state. Invariant: the
draws of index i do not depend on which other indexes are asked for in the same call, nor on their order.
"""

import zlib

import numpy as np
from scipy.special import ndtri

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)


def mix(value: np.ndarray) -> np.ndarray:
    """uint64 [...] -> uint64 [...]: the splitmix64 finaliser, a bijection whose every output bit depends on
    every input bit."""
    value = (value ^ (value >> np.uint64(30))) * MIX_1
    value = (value ^ (value >> np.uint64(27))) * MIX_2
    return value ^ (value >> np.uint64(31))


def key(*parts: int | str) -> np.ndarray:
    """uint64 [1], the key that the parts (integers, or names) stand for, in their order."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        number = zlib.crc32(part.encode()) + (1 << 40) if isinstance(part, str) else part
        state = mix(mix(state + GOLDEN) ^ np.array([number % 2**64], np.uint64))
    return state


def words(stream: np.ndarray, index: np.ndarray, columns: int) -> np.ndarray:
    """uint64 [n, columns] for the keys `stream` [1] and the counters `index` [n] (non-negative integers)."""
    row = mix((index.astype(np.uint64) + np.uint64(1)) * GOLDEN ^ stream)
    return mix(row[:, None] + np.arange(1, columns + 1, dtype=np.uint64) * GOLDEN)


def uniforms(stream: np.ndarray, index: np.ndarray, columns: int) -> np.ndarray:
    """float64 [n, columns], uniform in the open interval (0, 1)."""
    return ((words(stream, index, columns) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def normals(stream: np.ndarray, index: np.ndarray, columns: int) -> np.ndarray:
    """float64 [n, columns], standard normal."""
    return ndtri(uniforms(stream, index, columns))


def generator(stream: np.ndarray, index: int) -> np.random.Generator:
    """NumPy's Philox generator at the counter of record `index`: for the many draws of a record's noise."""
    counter = np.array([0, 0, index, 0], np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([stream[0], 0], np.uint64), counter=counter))
