"""What to say of weights that do not fit a network: one short message with the way to mend the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from core.models.layouts.keys import MOST_KEYS, State, WeightsError, few

Try = tuple[str, State | WeightsError]  # a layout, and what a file is as such, or why it cannot be read so


def mismatches(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> int:
    """Names that only one side has, and shapes that differ."""
    return len(own.keys() ^ given.keys()) + len(_other_shapes(own, given))


def describe(model: nn.Module, own: Mapping[str, Tensor], tensors: State, tries: Iterable[Try]) -> str:
    """The message.

    own: the network's state.  tensors: the file's, under its own names.  tries: the file as each layout reads it, the
    one that it seems to have first.
    """
    layout, found = _nearest(own, list(tries))
    heading = f"weights (read as layout {layout}) do not fit {type(model).__name__}"
    problems = [str(found)] if isinstance(found, WeightsError) else problems_of(own, found)
    return "\n  ".join([heading, *problems, *_prefix(own, tensors)])


def problems_of(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """A line for each kind of misfit, with so many keys in all as a message may have."""
    missing, unexpected = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    shapes = _other_shapes(own, given)
    some, others, shaped = _shares([len(missing), len(unexpected), len(shapes)])
    problems = [f"missing: {few(missing, some)}"] if missing else []
    problems += [f"unexpected: {few(unexpected, others)}"] if unexpected else []
    problems += [f"{few([k])}: file {tuple(given[k].shape)}, model {tuple(own[k].shape)}" for k in shapes[:shaped]]
    return problems + ([f"and {len(shapes) - shaped} more of other shapes"] if len(shapes) > shaped else [])


def _nearest(own: Mapping[str, Tensor], tries: list[Try]) -> Try:
    """The layout that leaves the fewest misfits; what cannot be read as the layout that it seems to have is told so."""

    def misfits(tried: Try) -> float:
        return float("inf") if isinstance(tried[1], WeightsError) else mismatches(own, tried[1])

    return tries[0] if isinstance(tries[0][1], WeightsError) else min(tries, key=misfits)


def _other_shapes(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    return [key for key in sorted(own.keys() & given.keys()) if own[key].shape != given[key].shape]


def _shares(counts: Sequence[int]) -> list[int]:
    """So many of each that there are MOST_KEYS in all, or all of them."""
    shares = [0] * len(counts)
    while sum(shares) < min(MOST_KEYS, sum(counts)):
        for i, count in enumerate(counts):
            shares[i] += shares[i] < count and sum(shares) < MOST_KEYS
    return shares


def _prefix(own: Mapping[str, Tensor], tensors: State) -> list[str]:
    """A line on the prefix below which the network's names lie in the file, or the one that all keys have."""
    at_prefix: Counter[str] = Counter()
    for key in tensors:
        ends = [0, *(i + 1 for i, letter in enumerate(key) if letter == ".")]
        at_prefix.update(key[:end] for end in ends if key[end:] in own)
    prefix, count = max(at_prefix.items(), key=lambda item: (item[1], -len(item[0])), default=("", 0))
    if prefix and 2 * count > len(own):
        keep = f"save what is below {few([prefix])!r} alone, without the prefix"
        return [f"{count} of the network's {len(own)} names lie below {few([prefix])!r}: {keep}"]
    first = next(iter(tensors), "").split(".")[0] + "."
    return [f"all its keys begin with {few([first])!r}"] if all(key.startswith(first) for key in tensors) else []
