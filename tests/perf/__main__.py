"""`make bench METHOD=<name>`: a method's maths against a plain transcription of its formulas, on the same tensors.

tests/perf/plain_<name>.py holds the transcription: `pairs()` gives, by name, the product's forward and backward pass
and the plain one. Both take turns in this process; the ratio is the median over paired rounds.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch

ROUNDS, WARM = 15, 2
Pair = tuple[Callable[[], object], Callable[[], object]]


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(pair: Pair, rounds: int = ROUNDS) -> dict[str, float]:
    """Medians of both in seconds, and of plain / product: how many times faster the product is."""
    for call in pair * WARM:
        call()
    times = [(seconds(pair[0]), seconds(pair[1])) for _ in range(rounds)]
    product, plain = (statistics.median(column) for column in zip(*times, strict=True))
    return {"product_s": product, "plain_s": plain, "ratio": statistics.median(b / a for a, b in times)}


def main(arguments: list[str]) -> int:
    name = (arguments or [os.environ.get("METHOD", "")])[0]
    if importlib.util.find_spec(f"tests.perf.plain_{name}") is None:
        print(f"METHOD: no plain transcription of {name!r} in tests/perf (plain_<method>.py)", file=sys.stderr)
        return 2
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    pairs: dict[str, Pair] = importlib.import_module(f"tests.perf.plain_{name}").pairs()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    print(json.dumps({"method": name, "device": device, "torch": torch.__version__, "rounds": ROUNDS}))
    for what, pair in pairs.items():
        found = measure(pair)
        times = f"{found['plain_s']:.4f} s plain, {found['product_s']:.4f} s here"
        print(f"{what}: {times}, {found['ratio']:.2f} times as fast")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
