"""Several pieces of work that run programs, at once, with a clean end when one fails and on Ctrl-C."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from ggufrq.base import proc

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(work: Callable[[Item], Result], items: Sequence[Item], jobs: int) -> Iterator[tuple[Item, Result]]:
    """``work`` done on every item, ``jobs`` at a time: each item with its result, as they are finished.

    When one fails, on a signal, or when the caller stops asking, the programs that the others run are ended
    and no more are begun; the first failure is raised.
    """
    stop = threading.Event()

    def one(item: Item) -> Result:
        with proc.stoppable(stop):
            return work(item)

    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(one, item): item for item in items}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
