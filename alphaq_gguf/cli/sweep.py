"""`alphaq-gguf sweep`: strategies and llama.cpp's presets at many sizes, held against the full-precision model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..compare.data import Comparison, to_plain
from ..compare.presets import PRESETS
from ..compare.run import Judge
from ..compare.sweep import check_kept, sweep
from ..compare.sweep_files import SweepSettings, plan_rows
from ..console import Console
from ..encode import find_encoder
from ..errors import AlphaQError, UsageError
from ..pipeline import AllocationSettings
from ..report.summary import chosen, pareto
from ..tensor_types import parse_overrides
from .compare_options import JudgeOptions, ReportOptions, TextOptions, command_line
from .options import EncoderName, OutputOptions, SourceOptions, grouped, parse_types
from .show_files import mebibytes, shorten, show_conclusion

NAME = "sweep"
_MADE = "What is made"
_NAME_WIDTH = 26
_DEFAULT_STRATEGY = "alphaq"


@grouped
def command(
    checkpoint: SourceOptions,
    texts: TextOptions,
    machine: JudgeOptions,
    report: ReportOptions,
    shown: OutputOptions,
    bpw: Annotated[
        str | None,
        typer.Option(help="Bits per expert weight, comma-separated.", rich_help_panel=_MADE, show_default=False),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="What spends each budget, comma-separated; see `alphaq-gguf strategies`. "
            f"(default: {_DEFAULT_STRATEGY})",
            rich_help_panel=_MADE,
            show_default=False,
        ),
    ] = None,
    presets: Annotated[
        str | None,
        typer.Option(
            help=f"What llama.cpp's quantiser makes, comma-separated: {', '.join(PRESETS)}.",
            rich_help_panel=_MADE,
            show_default=False,
        ),
    ] = None,
    sizes_of_presets: Annotated[
        bool,
        typer.Option(
            "--sizes-of-presets",
            help="Let each strategy also spend as many bytes as the file of each preset takes.",
            rich_help_panel=_MADE,
        ),
    ] = False,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            help="REGEX=TYPE: the type, also in presets, of every tensor whose name the regular expression finds; "
            "repeatable. '^(?!.*_exps)=Q8_0' leaves the experts as the only difference.",
            rich_help_panel=_MADE,
            show_default=False,
        ),
    ] = None,
    types: Annotated[
        str | None,
        typer.Option(
            help="Types that strategies may give expert stacks, comma-separated. (default: as in convert)",
            rich_help_panel=_MADE,
            show_default=False,
        ),
    ] = None,
    granularity: Annotated[
        str,
        typer.Option(
            help="What strategies give a type of its own, comma-separated: stack, each expert of it (expert), or each "
            "expert with all its projections (expert-shared).",
            rich_help_panel=_MADE,
        ),
    ] = "stack",
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="How text uses the experts, for moqa, pmq and self.", rich_help_panel=_MADE, show_default=False
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            help="Importance matrix that weighs rounding, also in presets.", rich_help_panel=_MADE, show_default=False
        ),
    ] = None,
    encoder: Annotated[
        EncoderName,  # pyright: ignore[reportInvalidTypeForm]
        typer.Option(help="What encodes weights, but for presets.", rich_help_panel=_MADE),
    ] = EncoderName.libggml,
    keep: Annotated[
        Path | None,
        typer.Option(
            help="Directory for the files; otherwise each is deleted when it is judged.",
            rich_help_panel="Output",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Convert a model many times over, hold every file against it, and show what quality each size buys.

    What is known is not made again: the same command goes on after an interruption, and a longer one adds to it.
    """
    console = shown.console()
    budgets = _split(bpw)
    if strategy is not None and not budgets and not sizes_of_presets:
        raise UsageError(
            "--strategy: there is no budget to spend", "--bpw 3,3.5,4, or --presets with --sizes-of-presets"
        )
    settings = SweepSettings(
        strategies=_split(strategy or _DEFAULT_STRATEGY),
        granularities=_split(granularity),
        bpws=tuple(_parse_bpw(text) for text in budgets),
        presets=tuple(name.upper() for name in _split(presets)),
        sizes_of_presets=sizes_of_presets,
        allocation=AllocationSettings(
            calibration=calibration,
            imatrix=imatrix,
            types=parse_types(types),
            overrides=tuple(parse_overrides(tensor_type or [])),
        ),
    )
    report.check(force=shown.force, inputs=[text for text in texts.texts if isinstance(text, Path)])
    judging = machine.settings()
    source = checkpoint.open(console)
    settings.check(source)
    for line in settings.remarks(source):
        console.warn(line)
    if keep is not None:
        check_kept(source, settings, keep, cache_dir=machine.cache_path, force=shown.force)
    reference = machine.open_reference(source, texts, console)
    judge = Judge(reference, source, judging, cache_dir=machine.cache_path, imatrix=imatrix, reporter=console)
    result = sweep(
        source,
        judge,
        settings,
        command=command_line(),
        keep=keep,
        force=shown.force,
        encoder=find_encoder(encoder.value, machine.torch_device),
        reporter=console,
        **machine.measuring(),
    )
    report.write(console, result, force=shown.force)
    _show(console, result)
    if report.output is not None:
        console.result(f"Report: {report.output}")
    console.json(to_plain(result))
    # Of a file that was made, only an engine that was asked for by its name has to run it.
    parts = [name.partition(" in ") for name in result.failures or {}]
    failed = {name for name, engine, _ in parts if not engine or machine.engine is not None}
    if failed:
        n_files = len(plan_rows(settings))
        raise AlphaQError(f"{len(failed)} of {n_files} files could not be made or judged", "see the reasons above")


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _parse_bpw(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--bpw {text!r} is not a number", "for example --bpw 2.6,3,3.5,4") from None


def _show(console: Console, result: Comparison) -> None:
    """A table by size, the files marked that no other beats in size and KLD at once, failures, and the verdict."""
    found, front = chosen(result), pareto(result)
    rows = []
    for candidate in sorted(result.candidates, key=lambda candidate: candidate.n_bytes):
        if (e := found.get(candidate.name)) is None:
            continue
        rows.append(
            [
                shorten(candidate.name, _NAME_WIDTH) + (" *" if candidate.name in front else ""),
                mebibytes(candidate.n_bytes),
                f"{candidate.expert_bpw:.3f}",
                f"{e.perplexity.value:.3f}",
                f"{e.divergence.kld.value:.5f}",
                f"{e.divergence.kld.standard_error:.5f}",
                f"{100 * e.divergence.top1.value:.1f}%",
            ]
        )
    engines = " and ".join(dict.fromkeys(f"{e.engine} on {e.device}" for e in found.values()))
    columns = ["file", "MiB", "expert bpw", "PPL", "KLD", "+-", "top-1"]
    console.table(f"{engines} (* none is both smaller and nearer)", columns, rows)
    for name, reason in (result.failures or {}).items():
        console.result(f"{name}: {reason}")
    show_conclusion(console, result)
