"""Argument checks of every public entry point: one sentence each (argument, what is required, what was given)."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any


def integer(name: str, value: object, low: int | None = None, high: int | None = None) -> int:
    """Return `value` as an int inside [low, high], or raise TypeError / ValueError naming the argument."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    return int(_inside(name, int(value), low, high))


def number(name: str, value: object, low: float | None = None, high: float | None = None) -> float:
    """Return `value` as a float inside [low, high], or raise TypeError / ValueError naming the argument."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    return float(_inside(name, float(value), low, high))


def boolean(name: str, value: object) -> bool:
    """Return `value` if it is True or False, or raise TypeError naming the argument."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")
    return value


def one_of(name: str, value: object, allowed: Iterable[str]) -> str:
    """Return `value` if it is one of the strings in `allowed`, or raise naming the nearest ones."""
    choices = list(allowed)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, one of {', '.join(choices)}, got {value!r} ({type(value).__name__})")
    if value in choices:
        return value
    near = difflib.get_close_matches(value, choices, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(choices)}"
    raise ValueError(f"{name} {value!r} is unknown; {hint}")


def file_path(name: str, path: str | os.PathLike[str]) -> Path:
    """Return `path` as a Path, or raise TypeError naming the argument."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{name} must be a path, got {path!r} ({type(path).__name__})")
    return Path(path)


def output_folder(name: str, path: str | os.PathLike[str]) -> Path:
    """Return `path` as a Path where a folder lies there or could be made, without making it.

    Raises:
        ValueError: a file lies there or on the way, or nothing may be written there.
    """
    path = Path(path)
    there = next(part for part in (path, *path.parents) if part.exists())
    if not there.is_dir():
        raise ValueError(f"{name} must lead to a folder, got {path}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{name} must lead to a folder that can be written, got {path}: {there} can not")
    return path


def output_file(name: str, path: str | os.PathLike[str]) -> Path:
    """Return `path` as a Path, with its folder made: called before the work whose result is to be written there.

    Raises:
        ValueError: a folder lies there, a file lies where its folder should, or nothing may be written there.
        OSError: the folder cannot be made.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{name} must be a file, got the folder {path}")
    output_folder(name, path.parent).mkdir(parents=True, exist_ok=True)
    return path


def _inside(name: str, value: float, low: float | None, high: float | None) -> float:
    inside = (low is None or value >= low) and (high is None or value <= high)  # False for NaN with any bound
    if inside:
        return value
    if high is None:
        required = f"at least {low}"
    elif low is None:
        required = f"at most {high}"
    else:
        required = f"from {low} to {high}"
    raise ValueError(f"{name} must be {required}, got {value}")


def key_values(texts: Iterable[str], required: str, given: str | None = None) -> dict[str, Any]:
    """["threshold=4", "above=harmonic"] -> {"threshold": 4, "above": "harmonic"}; values are JSON where they parse.

    Raises:
        ValueError: a text is no KEY=VALUE: `required`, got `given`, which is that text by default.
    """
    pairs: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise ValueError(f"{required}, got {given or text!r}")
        try:
            pairs[key] = json.loads(value)
        except json.JSONDecodeError:
            pairs[key] = value
    return pairs
