"""The command line: one file a command, errors handled in `main`, nothing else."""

import sys

from .main import main

__all__ = ["entry", "main"]


def entry() -> None:
    """The console script."""
    sys.exit(main())
