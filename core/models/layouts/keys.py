"""Renaming state dicts: every key is carried over, renamed, or dropped by a rule; what no rule knows is an error.

All functions take parts of a state dict as well (gradients, a selection of tensors).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

State = dict[str, Tensor]
# Where upstream projects put the weights, in order of preference: of a self-distilled pair the teacher is published.
NESTED = ("teacher", "state_dict", "model", "module", "model_state_dict")
MOST_KEYS, LONGEST_KEY = 10, 100  # of a message


class WeightsError(RuntimeError):
    """A weight file cannot be read or does not fit. The message names the file or the keys, and the fix."""


@dataclass(frozen=True)
class Layout:
    """One upstream naming of a network's weights, told from its keys once wrappers are off.

    nested: entries of the checkpoint that may hold the weights, the first that is there wins.
    """

    fits: Callable[[State], bool]
    to_timm: Callable[[State], State]
    nested: tuple[str, ...] = NESTED


def few(keys: Iterable[object], most: int = MOST_KEYS) -> str:
    """The first keys, and how many more there are."""
    keys = list(keys)
    shown = ", ".join(_shown(str(key)) for key in islice(keys, most))
    return f"{shown} and {len(keys) - most} more" if len(keys) > most else shown


def _shown(key: str) -> str:
    key = key if key.isprintable() else ascii(key)
    return key if len(key) <= LONGEST_KEY else f"{key[:LONGEST_KEY]}..."


def same(state: State) -> State:
    return dict(state)


def any_starts(*prefixes: str) -> Callable[[State], bool]:
    """Whether a state dict has a key with one of these beginnings."""
    return lambda state: any(key.startswith(prefixes) for key in state)


def has(*keys: str) -> Callable[[State], bool]:
    """Whether a state dict has all of these keys."""
    return lambda state: all(key in state for key in keys)


def below(prefix: str, state: State) -> State:
    """Entries under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def tower(prefix: str, state: State, beside: str) -> State:
    """Entries under a prefix, when all others match the pattern `beside` from their beginning on.

    Raises WeightsError with the keys that neither belong to the tower nor are known to be expendable.
    """
    rest = [key for key in state if not key.startswith(prefix) and not re.match(beside, key)]
    if rest:
        raise WeightsError(f"weights below {prefix!r} come with keys that are not known: {few(sorted(rest))}")
    return below(prefix, state)


def rename(state: State, rules: Sequence[tuple[str, str]]) -> State:
    """Every key after all the (pattern, replacement) rules, in order.  Raises WeightsError where two keys meet."""
    out: State = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if name in out:
            raise WeightsError(f"weights: two keys of the file become {name}, one of them {key}")
        out[name] = value
    return out


def without(state: State, pattern: str) -> State:
    """Entries whose keys the pattern does not match anywhere."""
    return {key: value for key, value in state.items() if not re.search(pattern, key)}
