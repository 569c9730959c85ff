"""demo, doctor and bench: what concerns this machine alone."""

from __future__ import annotations

import importlib
import importlib.util

from jobs.errors import UserError
from jobs.settings import Settings


def demo(settings: Settings) -> int:
    code: int = importlib.import_module("jobs.demo").main(settings.fresh)
    return code


def doctor(settings: Settings) -> int:
    code: int = importlib.import_module("jobs.doctor").main(settings)
    return code


def bench(settings: Settings) -> int:
    if importlib.util.find_spec("jobs.bench") is None:
        raise UserError("bench is not built yet")
    code: int = importlib.import_module("jobs.bench").main()
    return code
