"""`make bench DATA=1`: augmentation, streaming and sample order, each in its own process; what is printed is kept."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

PARTS = ("augment", "stream", "order")
RESULTS = Path("tests") / "perf" / "results"


def main() -> int:
    said = [f"torch {torch.__version__}, {os.cpu_count()} cores {platform.machine()}"]
    for part in PARTS:
        done = subprocess.run([sys.executable, "-m", f"tests.perf.{part}"], stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        if done.returncode:
            return done.returncode
        said.append(f"# {part}\n\n{done.stdout}")
    path = RESULTS / f"data-cpu-{platform.machine().replace('_', '-')}-{os.cpu_count()}-cores.txt"
    path.write_text("\n".join(said))
    print(f"kept in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
