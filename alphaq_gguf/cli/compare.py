"""`alphaq-gguf compare`: how near files are to the model they were made from, and how fast."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from ..checkpoint import open_source
from ..compare.data import Comparison, to_plain
from ..compare.reference import read_reference
from ..compare.run import Judge, about_context, alphas_of, check_files, compare
from ..compare.settings import TaskSettings
from ..errors import AlphaQError, ThresholdError, UsageError
from ..qtypes import FLOAT_TYPES
from ..tasks import TASKS, check_tasks
from ..writer import check_output, check_space, replacing
from .compare_options import JudgeOptions, ReportOptions, TextOptions, command_line
from .options import OutputOptions, grouped
from .show_files import show_files

NAME = "compare"
_REFERENCE, _BOUNDS, _TASKS = "Reference", "Bounds, for scripts", "Tasks"


@grouped
def command(
    texts: TextOptions,
    machine: JudgeOptions,
    report: ReportOptions,
    shown: OutputOptions,
    files: Annotated[
        list[Path],
        typer.Argument(help="GGUF files, or recipes with a type per expert (in PyTorch).", show_default=False),
    ],
    reference: Annotated[
        str | None,
        typer.Option(
            help="The full-precision model: Hugging Face directory, float GGUF, or OWNER/NAME on the Hub.",
            rich_help_panel=_REFERENCE,
            show_default=False,
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(
            help="Branch, tag or commit of a reference on the Hub.", rich_help_panel=_REFERENCE, show_default=False
        ),
    ] = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream", help="Read the reference's weights from the Hub, keeping none.", rich_help_panel=_REFERENCE
        ),
    ] = False,
    pre_tokenizer: Annotated[
        str | None,
        typer.Option(
            help="llama.cpp's pre-tokenizer id, if the file was converted with one.",
            rich_help_panel=_REFERENCE,
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="Log-probabilities of the reference, from `llama-perplexity --kl-divergence-base`, in place of "
            "--reference and --text.",
            rich_help_panel=_REFERENCE,
            show_default=False,
        ),
    ] = None,
    save_base: Annotated[
        Path | None,
        typer.Option(
            help="Write the reference's log-probabilities for `llama-perplexity --kl-divergence`.",
            rich_help_panel=_REFERENCE,
            show_default=False,
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(help="Importance matrix that a recipe was allocated with.", show_default=False),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help=f"Zero-shot tasks, comma-separated: {', '.join(TASKS)}, and whatever else lm-evaluation-harness "
            "knows.",
            rich_help_panel=_TASKS,
            show_default=False,
        ),
    ] = None,
    task_limit: Annotated[
        int | None,
        typer.Option(min=2, help="Examples of each task. (default: all)", rich_help_panel=_TASKS, show_default=False),
    ] = None,
    task_ctx: Annotated[
        int | None,
        typer.Option(
            min=16,
            help="Tokens of context in tasks. (default: what the model was trained for, 2048 at most)",
            rich_help_panel=_TASKS,
            show_default=False,
        ),
    ] = None,
    task_dir: Annotated[
        Path | None,
        typer.Option(help="Directory with tasks of your own.", rich_help_panel=_TASKS, show_default=False),
    ] = None,
    max_kld: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Exit with code 3 if the mean KLD of any file is above.",
            rich_help_panel=_BOUNDS,
            show_default=False,
        ),
    ] = None,
    min_top1: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Exit with code 3 if any file's likeliest token is the reference's less often.",
            rich_help_panel=_BOUNDS,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Hold files against the full-precision model: perplexity, KLD, routers, speed and memory, engine by engine.

    All see the same windows of text, cut and scored as llama-perplexity does. The reference runs once and is kept.
    """
    console = shown.console()
    if (reference is None) == (base is None):
        raise UsageError("the reference is given as a model or as a base file", "--reference SOURCE, or --base FILE")
    if base is not None and (texts.text or save_base is not None):
        raise UsageError("--base holds the text already", "leave out --text and --save-base")
    report.check(force=shown.force, inputs=files)
    settings = machine.settings()
    asked = None
    if tasks is not None:
        asked = TaskSettings(tuple(name.strip() for name in tasks.split(",")), task_limit, task_dir, task_ctx)
        check_tasks(asked.names, task_dir)
    source = None
    notes: list[str] = []
    if reference is None:
        assert base is not None
        found = read_reference(base)
    else:
        read = texts.texts
        source = open_source(
            reference,
            allow_requantize=True,
            pre_tokenizer=pre_tokenizer,
            revision=revision,
            stream=stream,
            reporter=console,
        )
        for remark in source.remarks:
            console.warn(remark)
        texts_read = [text for text in read if isinstance(text, Path)]
        report.check(force=shown.force, inputs=[*files, *source.files, *texts_read])
        if save_base is not None:
            check_output(save_base, force=shown.force, inputs=[*files, *source.files, *texts_read])
        quantised = {info.qtype for info in source.tensors.values()} - set(FLOAT_TYPES)
        if quantised:
            names = ", ".join(sorted(qtype.name for qtype in quantised))
            notes.append(f"{reference} is quantised itself ({names}): what it lost does not show in any figure")
        notes += [] if (note := about_context(source, texts.ctx)) is None else [note]
        for note in notes:
            console.warn(note)
        check_files(files, source)
        found = machine.open_reference(source, texts, console)
    judge = Judge(found, source, settings, cache_dir=machine.cache_path, imatrix=imatrix, reporter=console)
    judge.notes += notes
    alphas = ()
    if report.output is not None and source is not None:
        alphas = alphas_of(source, reporter=console, **machine.measuring())
    result = compare(files, judge, command=command_line(), alphas=alphas, tasks=asked)
    show_files(console, result)
    console.json(to_plain(result))
    if save_base is not None:
        _save_base(found.base.path, save_base)
        console.result(f"Wrote {save_base}")
    report.write(console, result, force=shown.force)
    if report.output is not None:
        console.result(f"Report: {report.output}")
    # An engine that was not asked for may be lacking; a file, its tasks, and an engine by its name may not.
    failed = [name for name in result.failures or {} if machine.engine is not None or " in " not in name]
    if failed:
        raise AlphaQError(f"{', '.join(failed)}: could not be judged", "see the warnings above")
    check_bounds(result, max_kld, min_top1)


def check_bounds(comparison: Comparison, max_kld: float | None, min_top1: float | None) -> None:
    """ThresholdError that names the first file that misses a bound, and how many do."""
    missed = []
    for e in comparison.evaluations:
        kld, top1 = e.divergence.kld.value, e.divergence.top1.value
        if max_kld is not None and not kld <= max_kld:
            missed.append(f"{e.file} in {e.engine}: mean KLD {kld:.5g}, allowed {max_kld:g}")
        if min_top1 is not None and not top1 >= min_top1:
            missed.append(f"{e.file} in {e.engine}: top-1 agreement {top1:.4g}, wanted {min_top1:g}")
    if missed:
        more = f"; {len(missed) - 1} more" if len(missed) > 1 else ""
        raise ThresholdError(missed[0] + more)


def _save_base(kept: Path, out: Path) -> None:
    check_space(out, kept.stat().st_size)
    with replacing(out) as temporary:
        shutil.copyfile(kept, temporary)
