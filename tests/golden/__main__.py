"""Run every golden case below the folders given; one line a case, `N passed, N failed` last."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from tests.golden.runner import find_cases, run_case


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="DIR", type=Path)
    torch.set_num_threads(1)
    passed = failed = 0
    for folder in parser.parse_args(arguments).folders:
        paths = find_cases(folder)
        if not paths:
            print(f"FAIL {folder}  no such folder, or no cases in it")
            failed += 1
        for path in paths:
            result = run_case(path)
            print(result.line, flush=True)
            passed, failed = passed + result.ok, failed + (not result.ok)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
