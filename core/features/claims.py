"""Work shared out among processes that have nothing but the store in common."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from core.storage import MissingObject, Store, StoreError

BEAT_S, LEASE_S = 10.0, 90.0
POLL_S = 3.0


class Claims:
    """A folder in which workers write what they have taken, and now and then that they are still there.

    Clocks of other machines are not believed: a worker is dead when what it writes has not changed for `lease_s` of
    our own time.  A wrong guess costs work done twice, never a wrong result.
    """

    def __init__(self, store: Store, beat_s: float = BEAT_S, lease_s: float = LEASE_S) -> None:
        self._store, self._beat_s, self.lease_s = store, beat_s, lease_s
        self.owner = uuid.uuid4().hex
        self._seen: dict[str, tuple[bytes, float]] = {}  # of other workers: what they wrote, and since when
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)

    def __enter__(self) -> Claims:
        self._store.put(f"beats/{self.owner}", b"0")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(StoreError):
            self._store.delete(f"beats/{self.owner}")

    def take(self, item: str) -> bool:
        """Whether this worker is to do it.  Raises StoreError."""
        return self._store.put_if_absent(f"claims/{item}/000", self.owner.encode())

    def take_over(self, item: str) -> bool:
        """Whether this worker is to do what a dead one had taken.  Raises StoreError."""
        number, owner = self._last(item)
        if owner and owner != self.owner and self._alive(owner):  # what is our own and not done has been dropped
            return False
        return self._store.put_if_absent(f"claims/{item}/{number + 1:03d}", self.owner.encode())

    def _last(self, item: str) -> tuple[int, str]:
        keys = [entry.key for entry in self._store.list(f"claims/{item}/")]
        return (int(keys[-1][-3:]), self._store.get(keys[-1]).decode()) if keys else (-1, "")

    def _alive(self, owner: str) -> bool:
        try:
            now = self._store.get(f"beats/{owner}")
        except MissingObject:
            return False
        before, since = self._seen.get(owner, (b"", 0.0))
        if now != before:
            self._seen[owner] = now, time.monotonic()
            return True
        return time.monotonic() - since < self.lease_s

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(self._beat_s):
            count += 1
            with suppress(StoreError):  # a store that is down for long makes the work itself fail
                self._store.put(f"beats/{self.owner}", str(count).encode())


def shared(
    items: Sequence[str], claims: Claims, done: Callable[[], set[str]], is_done: Callable[[str], bool],
    waiting: Callable[[], None] = lambda: None,
) -> Iterator[Iterator[str]]:  # fmt: skip
    """Rounds of items for this worker: first what nobody has taken, then, as long as some are not done, what dead
    workers had.  Every round must be worked off before the next; each worker begins at another place.

    done: all finished items, which is slow to ask; is_done: whether one is.
    """
    start = int(claims.owner, 16) % max(len(items), 1)
    finished = done()
    # Looked at again once taken: whoever is through with everything removes all claims, also those of finished items.
    yield (i for i in [*items[start:], *items[:start]] if i not in finished and claims.take(i) and not is_done(i))
    while left := set(items) - done():
        taken = [item for item in items if item in left and claims.take_over(item) and not is_done(item)]
        if taken:
            yield iter(taken)
        else:
            waiting()
            time.sleep(min(POLL_S, claims.lease_s / 2))
