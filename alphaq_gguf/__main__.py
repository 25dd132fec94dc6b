"""The console script, also as `python -m alphaq_gguf`."""

import sys


def entry() -> None:
    """Run the command line."""
    # Its imports take a second or two, in which one may press Ctrl-C as well.
    try:
        from .cli import entry as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    entry()
