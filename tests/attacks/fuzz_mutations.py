"""Mutations of JSON that stay JSON: a byte changed at random mostly ends at the parser."""

import json
import random
from typing import Any

from attacks.fuzz_targets import SEPARATOR

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 64, 64.0, 128, 2**31, 2**63, 10**39, -0.0, 0.5, 1e300, "", "\x1b[2J", "\ud800"),
    *("../x", "nf4", "fp8", "F32", "U8", "quantize", "keep", "0" * 64, [], {}, [[]], [0], [0, 0], {"": 0}, "a" * 2000),
)


def mutated(target: str, data: bytes, seed: int) -> bytes | None:
    """The input with one value of its JSON changed; None where there is none to change."""
    rng = random.Random(seed)
    if target == "yaml":
        return None
    if target == "artifact":
        files = data.split(SEPARATOR, 3)
        place = rng.randrange(len(files[:3]))
        files[place] = _text(files[place], rng)
        return SEPARATOR.join(files)
    return data[:1] + _text(data[1:], rng) if target == "header" else _text(data, rng)


def _text(data: bytes, rng: random.Random) -> bytes:
    try:
        return json.dumps(_changed(json.loads(data), rng)).encode()
    except (ValueError, RecursionError):
        return data


def _changed(value: Any, rng: random.Random) -> Any:
    """One value of a JSON value replaced, removed, renamed or copied elsewhere."""
    nodes = list(_nodes(value))
    if not nodes:
        return rng.choice(ODD)
    parent, key = rng.choice(nodes)
    what = rng.randrange(4)
    if what == 0:
        del parent[key]
    elif what == 1:
        other, its_key = rng.choice(nodes)
        parent[key] = json.loads(json.dumps(other[its_key])) if its_key in _keys(other) else None
    elif what == 2 and isinstance(parent, dict):
        parent[rng.choice([str(odd) for odd in ODD if isinstance(odd, str)])] = parent[key]
    else:
        parent[key] = rng.choice(ODD)
    return value


def _nodes(value: Any) -> Any:
    if isinstance(value, dict | list):
        for key in _keys(value):
            yield value, key
            yield from _nodes(value[key])


def _keys(value: Any) -> Any:
    return list(value) if isinstance(value, dict) else range(len(value))
