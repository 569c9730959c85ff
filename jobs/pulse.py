"""Whether a run still shows signs of life, by times that the clocks of several machines have written."""

from __future__ import annotations

import time
from collections.abc import Mapping

from core.storage import Store

HEARTBEAT_LIMIT_S = 60.0
CLOCKS_S = 60.0  # by which the clocks of two machines may differ; what is dated further ahead proves nothing
END_OF_TIME = 1e11  # seconds since the epoch, which calendars still have a date for


def is_time(value: object) -> bool:
    """Whether this is a time that something may have been written at."""
    return type(value) in (int, float) and 0 <= value < END_OF_TIME  # type: ignore[operator]


def silent(run: Store, said: Mapping[str, float]) -> str:
    """Why there is no pulse; "" where there is one.  said: by object of the run, when it was written by its own words.

    A time that lies ahead of this machine's clock proves nothing, else one beat could hide for years that the run has
    died. Then the store's own clock decides, by when it took the object.  Raises StoreError.
    """
    limit = time.time() + CLOCKS_S
    kept = {e.key: e.modified for key, when in said.items() if when > limit for e in run.list(key)}
    past = [when for when in ({**said, **kept}).values() if when <= limit]
    if not past:
        ahead_s = max(said.values()) - time.time()
        return f"its last sign of life lies {ahead_s:.0f} s ahead of this machine's clock: is one of them wrong?"
    silent_s = time.time() - max(past)
    return f"no heartbeat for {silent_s:.0f} s" if silent_s > HEARTBEAT_LIMIT_S else ""
