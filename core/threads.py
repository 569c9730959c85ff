"""Work shared out to a few threads that never hold up the end of a process."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(action: Callable[[Item], Result], items: Iterable[Item], threads: int) -> list[Result]:
    """Results of `action` in the order of `items`, by at most `threads` threads, the caller's being one.

    The first error ends all of them after what they are at, and is raised.  The others are daemons: unlike those of a
    ThreadPoolExecutor, they are not waited for when the process exits.
    """
    todo = deque(enumerate(items))
    done: dict[int, Result] = {}
    errors: list[BaseException] = []

    def work() -> None:
        while todo and not errors:
            try:
                number, item = todo.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                done[number] = action(item)
            except BaseException as error:
                errors.append(error)

    helpers = [threading.Thread(target=work, daemon=True) for _ in range(min(threads, len(todo)) - 1)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]
    return [done[number] for number in range(len(done))]
