"""Threads for NumPy work, which releases the interpreter while it computes."""

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any


def share_out(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Apply ``function`` to every item, on as many threads as there are cores."""
    items = list(items)
    shares = [items[start :: num_threads()] for start in range(min(num_threads(), len(items)))]
    if len(shares) < 2:
        return [function(item) for item in items]

    def work(share: list[Any]) -> list[Any]:
        return [function(item) for item in share]

    try:
        others = [_thread_pool().submit(work, share) for share in shares[1:]]
    except RuntimeError:  # no new threads: the main one has ended, or the system has no more to give
        return [function(item) for item in items]
    done = [work(shares[0])]  # this thread takes the first share, and every other that nobody has begun:
    for share, other in zip(shares[1:], others, strict=True):  # the pool may be busy, even with our own caller
        done.append(work(share) if other.cancel() else other.result())
    return [done[i % len(shares)][i // len(shares)] for i in range(len(items))]


@functools.cache
def num_threads() -> int:
    """Threads for NumPy work: the cores this process may use, or the environment variable KVLIB_NUM_THREADS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("KVLIB_NUM_THREADS") or cores
    try:
        return max(1, int(given))
    except ValueError:
        raise ValueError(f"the environment variable KVLIB_NUM_THREADS must be an integer, got {given!r}") from None


@functools.cache
def _thread_pool() -> Any:
    from concurrent.futures import ThreadPoolExecutor  # imported late: `import kvlib` stays as light as NumPy

    return ThreadPoolExecutor(num_threads() - 1, thread_name_prefix="kvlib")


if hasattr(os, "register_at_fork"):  # a forked process has none of its parent's threads, so it starts its own
    os.register_at_fork(after_in_child=_thread_pool.cache_clear)
