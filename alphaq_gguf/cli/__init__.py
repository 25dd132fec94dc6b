"""The command line: one file a command, errors handled in `main`, nothing else."""

import os
import sys

from .main import INTERRUPTED, main

__all__ = ["entry", "main"]


def entry() -> None:
    """The console script."""
    code = main()
    if code == INTERRUPTED:
        # Python would wait for threads that may themselves be waiting for the network.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
