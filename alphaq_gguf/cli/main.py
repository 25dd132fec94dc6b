"""The Typer application and its one error handler."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from .. import __version__
from ..console import Console
from ..errors import AlphaQError, ConnectionLostError
from . import allocate, alphas, calibrate, compare, convert, inspect, paper, plan, plugin, run, serve, strategies, sweep

INTERRUPTED = 130
COMMANDS = (convert, plan, alphas, allocate, calibrate, strategies, paper, inspect, run, serve, compare, sweep)
GROUPS = (plugin,)

app = typer.Typer(
    name="alphaq-gguf",
    help="Mixed-precision GGUF files for Mixture-of-Experts models, without calibration data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"alphaq-gguf {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Mixed-precision GGUF files for Mixture-of-Experts models, without calibration data."""


for module in COMMANDS:
    app.command(module.NAME)(module.command)
for module in GROUPS:
    app.add_typer(module.app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 ok, 1 failure, 2 usage, 3 a bound was missed, 130 interrupted."""
    try:
        code = app(args=None if argv is None else list(argv), standalone_mode=False)
    except AlphaQError as error:
        if os.environ.get("ALPHAQ_TRACEBACK"):
            raise
        again = shlex.join(["alphaq-gguf", *(sys.argv[1:] if argv is None else argv)])
        resume = f"run it again to go on from there: {again}" if isinstance(error, ConnectionLostError) else ""
        Console().error(error.message, error.hint or resume)
        return error.exit_code
    except typer.TyperException as error:
        format_message = getattr(error, "format_message", None)
        Console().error(format_message() if format_message else str(error), "see alphaq-gguf COMMAND --help")
        return getattr(error, "exit_code", 2)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe went away, as in `alphaq-gguf inspect FILE | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    code = code if isinstance(code, int) else 0
    if code == INTERRUPTED:
        Console().error("interrupted", "run the same command again to go on from where it stopped")
    return code
