"""How the stages report progress, without knowing who shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Reporter(Protocol):
    """`task` opens a progress bar and yields the function that advances it; `note` and `warn` say one line."""

    def task(self, label: str, total: int, unit: str) -> AbstractContextManager[Callable[[int], None]]: ...

    def note(self, message: str) -> None: ...

    def warn(self, message: str) -> None: ...


class Silent:
    """Reports nothing; the default of the Python API."""

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        yield lambda amount: None

    def note(self, message: str) -> None:
        pass

    def warn(self, message: str) -> None:
        pass
