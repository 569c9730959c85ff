"""Which arrays of a method's files are results, and the one table of those that are deliberately not compared.

Every other result must be compared with what the product computes, or the case fails.
"""

from __future__ import annotations

import re

# Of names of arrays, by method: those that are results. Methods that do not mark their results name their inputs.
RESULTS = {
    "unic": r"out\..*",
}
ANY_METHOD = r"(out|o|g|w|ema|final|grad|expected)([./_].*)?|ref_.+"

# Method -> pattern of names -> why these are not compared.
LEFT_OUT: dict[str, dict[str, str]] = {
    "unic": {
        r"in\.draws.*": "the draws of in.u once more, in the order in which the release's loop consumes them",
        r"in\.test_labels": "of images whose predictions are compared; no score of them is recorded",
        r"out\.final\.encoder\.mask_token": "in no student of the product: the release never uses nor moves it",
    },
}

# Methods whose tolerances are those of each number; in the others, of the largest number of an array.
EACH = {"unic"}


def is_result(method: str, name: str) -> bool:
    return bool(re.fullmatch(RESULTS.get(method, ANY_METHOD), name))


def left_out(method: str, name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in LEFT_OUT.get(method, {}))
