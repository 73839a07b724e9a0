"""A progress bar on standard error, for what moves many bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock

__all__ = ["bar"]


@contextmanager
def bar(total: int, what: str, *, shown: bool, done: int = 0) -> Iterator[Callable[[int], object]]:
    """Show how many of `total` bytes are done.

    Args:
        total: Bytes in all.
        what: What is done with them.
        shown: Whether to show anything.
        done: Bytes that are done already.

    Yields:
        What to call with each part's bytes.
    """
    if not shown:
        yield lambda _: None
        return
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
        # No thread, and below a lock of its own. Forks share tqdm's: if another thread of the
        # process that was forked held it at that moment, all of them would wait for ever.
        monitor_interval = 0

    Bar.set_lock(RLock())
    with Bar(total=total, initial=done, desc=what, unit="B", unit_scale=True) as shown_bar:
        yield shown_bar.update
