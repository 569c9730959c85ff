"""demo, doctor and bench: what concerns this machine alone."""

from __future__ import annotations

import importlib

from jobs.settings import Settings


def demo(settings: Settings) -> int:
    code: int = importlib.import_module("jobs.demo").main(settings)
    return code


def doctor(settings: Settings) -> int:
    code: int = importlib.import_module("jobs.doctor").main(settings)
    return code


def bench(settings: Settings) -> int:
    code: int = importlib.import_module("jobs.bench").main(settings)
    return code
