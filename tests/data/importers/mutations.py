"""Seeded corruptions of annotation files: a few bytes or one value at a time."""

import copy
import json
import math
import random
from typing import Any

__all__ = ["ODD", "mutated", "spoil_image"]

ODD: list[Any] = [
    None, True, False, "", " ", "x", "nan", 0, -1, 1, 2, 0.5, 1e300, -1e300, 5e-324, 10**9, 2**63, -(2**63), 10**40,
    math.nan, math.inf, -math.inf, [], {}, [[]], [[0, 1]], [None], {"a": 1}, "\u202e\u0000\U0001d518", "\ud800x", "a\nb\r",
    "../../x", "x" * 5000, "img0.png#99999999999999999999999+5", "img0.png#3+5;base64", "\u2028", [1, 2, 3], [1, 2, 3, 4, 5],
    ["1", "2", "3", "4"], [5, 5, 5, 5], [-9, -9, 5, 5], [3, 3, 2**70, 5], [3, 3, math.nan, 5], [1e308, 1e308, 1e308, 1e308],
]  # fmt: skip
"""Values that are invalid or unusual in annotations."""

CELLS = [
    b"", b" ", b"x", b"nan", b"-inf", b"0", b"-1", b"1e400", b"99999999999999999999999", b"\xff\xfe\xc0", b"\x00",
    "\u202e\U0001d518\u2028".encode(), b'"', b"'", b"<", b"&", b"&x;", b"]]>", b"\t", b"\n", b",", b"[", b"]", b"{", b"#",
    b"9" * 5000, b"x" * 140_000, b"null", b"[[]]", b"/m/0", b"http://x/[y", b"true", b"1.5", b"\xef\xbb\xbf", b"\r",
]  # fmt: skip

_BREAKS = b"\t\n\r ,<>\"'/=:[]{}#"


def mutated(data: bytes, kind: str, rng: random.Random) -> tuple[bytes, str]:
    """Corrupted bytes, and a description. `kind`: json, jsonl, text (tables, XML, lists, yaml) or bytes (tar, gzip)."""
    if kind == "json" and rng.random() < 0.75:
        return _json(data, rng)
    if kind == "jsonl" and rng.random() < 0.75:
        lines = data.splitlines()
        at = rng.randrange(len(lines))
        lines[at], done = _json(lines[at], rng)
        return b"\n".join(lines), f"line {at}, {done}"
    if kind == "text" and rng.random() < 0.7:
        return _cell(data, rng)
    return _bytes(data, rng)


def _json(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Changes one value of the JSON."""
    value = copy.deepcopy(json.loads(data))
    paths = list(_paths(value))
    path = rng.choice(paths)
    if not path:
        value, done = rng.choice(ODD), "the whole"
    else:
        place = value
        for key in path[:-1]:
            place = place[key]
        key, old = path[-1], place[path[-1]]
        match rng.randrange(6):
            case 0:
                del place[key]
                done = "removed"
            case 1 if isinstance(place, list):
                place.insert(key, copy.deepcopy(old))
                done = "twice"
            case 2 if isinstance(old, int | float):
                place[key] = old + rng.choice([-1, 1, 0.5, 1000, -1000])
                done = f"now {place[key]}"
            case 3 if isinstance(old, int | float):
                place[key] = str(old)
                done = "as text"
            case _:
                place[key] = rng.choice(ODD)
                done = f"now {place[key]!r:.40}"
        done = f"{'.'.join(map(str, path))} {done}"
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    return text.encode(errors="surrogatepass"), done


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Any:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _paths(inner, (*path, key))


def _cell(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Replaces, removes or duplicates a line or the bytes between two separators."""
    if rng.random() < 0.3:
        lines = data.splitlines(keepends=True) or [b""]
        at = rng.randrange(len(lines))
        old = lines[at]
        lines[at : at + 1] = rng.choice([[], [old, old], [rng.choice(CELLS) + b"\n"], [old.strip() + b"\n\n"]])
        return b"".join(lines), f"line {at} {old[:20]!r}"
    starts = [i + 1 for i, byte in enumerate(data[:-1]) if byte in _BREAKS and data[i + 1] not in _BREAKS] or [0]
    begin = rng.choice(starts)
    end = next((i for i in range(begin, len(data)) if data[i] in _BREAKS), len(data))
    new = rng.choice(CELLS)
    return data[:begin] + new + data[end:], f"{data[begin:end][:20]!r} at {begin} now {new[:20]!r}"


def _bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Truncates or empties the file, or changes, inserts or removes some bytes."""
    at = rng.randrange(len(data)) if data else 0
    match rng.randrange(7):
        case 0:
            return data[:at], f"cut at {at}"
        case 1:
            return b"", "emptied"
        case 2:
            return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :], f"byte {at}"
        case 3:
            return data[:at] + rng.randbytes(rng.randrange(1, 40)) + data[at:], f"noise at {at}"
        case 4:
            return data[:at] + data[at + rng.randrange(1, 30) :], f"gap at {at}"
        case 5:
            return data + rng.choice([b"x", data, b"\x00" * 10, b"\xef\xbb\xbf"]), "more at the end"
        case _:
            return rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", b"[" * 300]) + data, "another beginning"


def spoil_image(data: bytes, rng: random.Random) -> tuple[bytes | None, str]:
    """Corrupted bytes of an image; None: no file."""
    match rng.randrange(6):
        case 0:
            return None, "missing"
        case 1:
            return b"", "emptied"
        case 2:
            return data[: rng.randrange(len(data))], "cut"
        case 3:
            return b"GIF89a" + rng.randbytes(30), "no JPEG"
        case 4:
            return rng.randbytes(200), "noise"
        case _:
            at = rng.randrange(len(data))
            return data[:at] + rng.randbytes(3) + data[at + 3 :], f"three bytes at {at}"
