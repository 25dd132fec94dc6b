"""One run at a time in a directory of the cache."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .reporter import Reporter

_PAUSE_S = 0.5


@contextmanager
def alone(directory: Path, reporter: Reporter) -> Iterator[None]:
    """Wait until no other process is in this block with `directory`; the system lets go of those that were killed."""
    directory.mkdir(parents=True, exist_ok=True)
    with directory.with_name(f"lock-{directory.name}").open("w") as file:
        if not _lock(file):
            reporter.note(f"Waiting for another run, which is at work in {directory}")
            while not _lock(file):
                time.sleep(_PAUSE_S)
        yield


def _lock(file: IO[str]) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
