"""MATLAB files of level 4 and 5 (versions 4 to 7) taken apart: names, numeric arrays, texts, cells, structs.

Written out because the parsers at hand can be brought down by a damaged file, and a record must never take its worker
with it. Facts: The MathWorks, "MAT-File Format". Objects, functions and sparse matrices are passed over. Invariant: no
size is believed beyond the bytes that are there, and an array has exactly the elements that its dimensions promise.
"""

import math
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ecg_jax.records.record import Refused

INFLATION = 1100  # deflate makes at most 1032 bytes of one
DEPTH = 8  # of cells and structs in each other
MAX_TEXT = 10_000  # letters; what matters here is shorter
_LEVEL4 = ("f8", "f4", "i4", "i2", "u2", "u1")
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_MATRIX, _COMPRESSED = 14, 15
_CELL, _STRUCT, _CHAR = 1, 2, 4
_NUMERIC = range(6, 16)
_COMPLEX, _LOGICAL = 0x08, 0x02


def load_mat(content: bytes) -> dict[str, Any]:
    """Variables by name: a numeric array, a text (or an object array of lines), an object array of these for a cell, a
    dict for a struct of one element. Refuses with truncated, unreadable-signal; the detail lacks the file's name.
    """
    found: dict[str, Any] = {}
    level5 = 0 not in content[:4] and content[126:128] in (b"IM", b"MI")
    for name, value in _level5(content) if level5 else _level4(content):
        if name in found:
            raise Refused("unreadable-signal", f"variable {name!r} is there twice")
        if name and value is not None:
            found[name] = value
    return found


def _take(content: memoryview, at: int, size: int, what: str) -> memoryview:
    if size < 0 or at + size > len(content):
        raise Refused("truncated", f"{what} promises {size} bytes, {max(0, len(content) - at)} are there")
    return content[at : at + size]


# -------------------------------------------------------------------------------------------------------- level 4


def _level4(content: bytes) -> list[tuple[str, Any]]:
    view, at, found = memoryview(content), 0, []
    if not content:
        raise Refused("unreadable-signal", "the file is empty")
    while at < len(view):
        head = _take(view, at, 20, "a matrix header")
        order = "<" if 0 <= struct.unpack_from("<i", head)[0] < 5000 else ">"
        kind, rows, columns, imaginary, length = struct.unpack_from(f"{order}5i", head)
        machine, zero, precision, matrix = kind // 1000, kind // 100 % 10, kind // 10 % 10, kind % 10
        if not (0 <= kind < 2000 and zero == 0 and precision < 6 and matrix < 3 and imaginary in (0, 1)):
            raise Refused("unreadable-signal", "it is neither a MATLAB file of level 4 nor of level 5")
        if machine != (order == ">") or rows < 0 or columns < 0 or not 0 < length < 1000:
            raise Refused("unreadable-signal", "it is neither a MATLAB file of level 4 nor of level 5")
        name = bytes(_take(view, at + 20, length, "a name")).partition(b"\0")[0].decode("latin-1")
        at += 20 + length
        dtype = np.dtype(order + _LEVEL4[precision])
        size = rows * columns * dtype.itemsize
        data = np.frombuffer(_take(view, at, size, name), dtype).reshape(rows, columns, order="F")
        _take(view, at, size * (1 + imaginary), name)
        at += size * (1 + imaginary)
        if matrix == 1:
            found.append((name, _lines([chr(int(code) & 0xFFFF) for code in data.ravel(order="F")[:MAX_TEXT]], rows)))
        else:
            found.append((name, None if matrix == 2 or imaginary else data))
    return found


def _lines(letters: Sequence[str], rows: int) -> Any:
    """A text, or an array of texts for a matrix of letters, which lie column by column."""
    if rows < 2 or len(letters) % rows:
        return "".join(letters)
    return np.array(["".join(letters[row::rows]).strip() for row in range(rows)], object)


# -------------------------------------------------------------------------------------------------------- level 5


def _level5(content: bytes) -> list[tuple[str, Any]]:
    order = "<" if content[126:128] == b"IM" else ">"
    view, at, found = memoryview(content), 128, []
    while at < len(view):
        if len(view) - at < 8 and not any(view[at:]):
            break  # padding
        kind, data, after = _element(view, at, order, padded=False)
        if kind == _COMPRESSED:
            inflated = memoryview(_inflate(data))
            kind, data, end = _element(inflated, 0, order)
            if end < len(inflated):
                raise Refused("unreadable-signal", "a compressed variable holds more than one matrix")
        else:
            after = at + 8 + len(data) + -len(data) % 8
        if kind != _MATRIX:
            raise Refused("unreadable-signal", f"there is an element of type {kind} where a matrix should be")
        found.append(_matrix(data, order, 0))
        at = after
    return found


def _inflate(data: memoryview) -> bytes:
    decoder = zlib.decompressobj()
    try:
        inflated = decoder.decompress(data, INFLATION * len(data) + 1024)
    except zlib.error as error:
        raise Refused("unreadable-signal", f"a compressed variable is damaged ({error})") from None
    if not decoder.eof:
        raise Refused("truncated", "a compressed variable ends early")
    return inflated


def _element(view: memoryview, at: int, order: str, padded: bool = True) -> tuple[int, memoryview, int]:
    """(type, data, where the next one begins) of the data element at `at`."""
    first, size = struct.unpack_from(f"{order}2I", _take(view, at, 8, "a tag"))
    if first >> 16:  # up to four bytes within the tag itself
        kind, size = first & 0xFFFF, first >> 16
        if size > 4:
            raise Refused("unreadable-signal", f"a small element promises {size} bytes")
        return kind, view[at + 4 : at + 4 + size], at + 8
    data = _take(view, at + 8, size, f"an element of type {first}")
    after = at + 8 + size
    return first, data, min(after + (-size % 8 if padded else 0), len(view))


def _numbers(kind: int, data: memoryview, order: str) -> np.ndarray:
    if kind not in _NUMBERS:
        raise Refused("unreadable-signal", f"there is an element of type {kind} where numbers should be")
    dtype = np.dtype(order + _NUMBERS[kind])
    if len(data) % dtype.itemsize:
        raise Refused("unreadable-signal", f"{len(data)} bytes are no whole count of {dtype.name}")
    return np.frombuffer(data, dtype)


def _matrix(view: memoryview, order: str, depth: int) -> tuple[str, Any]:
    """(name, value) of a matrix element; the value is None for what is passed over."""
    if depth > DEPTH:
        raise Refused("unreadable-signal", "cells and structs lie too deep in each other")
    if not len(view):
        return "", None  # an empty cell
    kind, data, at = _element(view, 0, order)
    flags = _numbers(kind, data, order)
    if kind != 6 or len(flags) != 2:
        raise Refused("unreadable-signal", "a matrix has no flags")
    array, bits = int(flags[0]) & 0xFF, int(flags[0]) >> 8 & 0xFF
    if array not in (_CELL, _STRUCT, _CHAR, *_NUMERIC):
        return "", None
    kind, data, at = _element(view, at, order)
    shape = tuple(_numbers(kind, data, order).tolist())
    if kind != 5 or not 2 <= len(shape) <= 32 or min(shape) < 0:
        raise Refused("unreadable-signal", f"a matrix has dimensions {shape[:4]}")
    kind, data, at = _element(view, at, order)
    name = bytes(data).partition(b"\0")[0].decode("latin-1")
    count = math.prod(shape)
    if array == _CELL:
        return name, _cells(view, at, order, shape, count, depth)
    if array == _STRUCT:
        return name, _struct(view, at, order, count, depth)
    if count == 0 and at == len(view):
        return name, np.empty(shape)
    kind, data, at = _element(view, at, order)
    if array == _CHAR:
        return name, _lines(_text(kind, data, order), shape[0])
    values = _numbers(kind, data, order)
    if len(values) != count:
        raise Refused("unreadable-signal", f"{name or 'a matrix'} of {shape} holds {len(values)} numbers")
    if bits & _COMPLEX:
        return name, None
    values = values.reshape(shape, order="F")
    return name, values.astype(bool) if bits & _LOGICAL else values


def _text(kind: int, data: memoryview, order: str) -> str:
    encoding = _TEXTS.get(kind)
    if encoding is None:
        raise Refused("unreadable-signal", f"there is an element of type {kind} where a text should be")
    end = {"<": "-le", ">": "-be"}[order] if encoding in ("utf-16", "utf-32") else ""
    return bytes(data).decode(encoding + end, "replace")[:MAX_TEXT]


def _cells(view: memoryview, at: int, order: str, shape: tuple[int, ...], count: int, depth: int) -> np.ndarray:
    if count > (len(view) - at) // 8:  # each has a tag
        raise Refused("truncated", f"a cell array promises {count} cells in {len(view) - at} bytes")
    cells = np.empty(count, object)
    for i in range(count):
        kind, data, at = _element(view, at, order)
        if kind != _MATRIX:
            raise Refused("unreadable-signal", f"there is an element of type {kind} where a cell should be")
        cells[i] = _matrix(data, order, depth + 1)[1]
    return cells.reshape(shape, order="F")


def _struct(view: memoryview, at: int, order: str, count: int, depth: int) -> dict[str, Any] | None:
    kind, data, at = _element(view, at, order)
    (length,) = _numbers(kind, data, order)[:1].tolist() or (0,)
    _, data, at = _element(view, at, order)
    if count != 1:
        return None  # an array of structs: which one is meant, it does not say
    if not isinstance(length, int) or length < 1 or len(data) % length:
        raise Refused("unreadable-signal", f"a struct has field names of {length} letters in {len(data)} bytes")
    fields = [bytes(data[i : i + length]).partition(b"\0")[0].decode("latin-1") for i in range(0, len(data), length)]
    if len(set(fields)) != len(fields):
        raise Refused("unreadable-signal", "a struct has two fields of one name")
    found = {}
    for field in fields:
        kind, inner, at = _element(view, at, order)
        if kind != _MATRIX:
            raise Refused("unreadable-signal", f"there is an element of type {kind} where field {field} should be")
        value = _matrix(inner, order, depth + 1)[1]
        if value is not None:
            found[field] = value
    return found
