"""Options of the commands that judge files: the text, the engines, and the report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..calibration.own_text import OWN
from ..checkpoint import Source
from ..compare.data import Comparison
from ..compare.reference import Reference, make_reference
from ..compare.settings import ENGINES, JudgeSettings
from ..console import Console
from ..errors import UsageError
from ..writer import check_output
from .options import MachineOptions

_TEXT, _MEASURED, _MACHINE = "Text", "What is measured", "Machine"


@dataclass(frozen=True)
class TextOptions:
    """The text that files are judged on, cut as llama-perplexity does."""

    text: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Text file (UTF-8) to judge on; repeatable. `{OWN}`: text that the reference writes itself.",
            rich_help_panel=_TEXT,
            show_default=False,
        ),
    ] = None
    ctx: Annotated[
        int,
        typer.Option(min=8, help="Tokens in a window, of which the second half is scored.", rich_help_panel=_TEXT),
    ] = 512
    max_windows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Windows at most. (default: all; of the model's own text 16)",
            rich_help_panel=_TEXT,
            show_default=False,
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of the model's own text.", rich_help_panel=_TEXT)] = 0

    @property
    def texts(self) -> list[Path | str]:
        """What to read; UsageError when no text is named."""
        if not self.text:
            raise UsageError("no text to judge on", f"--text FILE, or --text {OWN} if there is none at hand")
        for entry in self.text:
            if self.text.count(entry) > 1:
                raise UsageError(f"--text {entry} is named twice", "its tokens would count twice: name it once")
        return [entry if entry == OWN else Path(entry) for entry in self.text]


@dataclass(frozen=True)
class ReportOptions:
    """The report of a comparison."""

    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Report to write, REPORT.html; REPORT.json and the figures are put beside it.",
            show_default=False,
        ),
    ] = None

    def check(self, *, force: bool, inputs: Sequence[Path] = ()) -> None:
        """UsageError or OutputError for what would be refused after the long work."""
        if self.output is None:
            return
        from ..report import check_report

        check_report(self.output, force=force)
        for path in (self.output, self.output.with_suffix(".json")):
            check_output(path, force=force, inputs=list(inputs))

    def write(self, console: Console, comparison: Comparison, *, force: bool) -> None:
        """The report, if one is asked for."""
        if self.output is None:
            return
        from ..report import write_report

        for path in write_report(self.output, comparison, force=force):
            console.note(f"Wrote {path}")


def command_line() -> str:
    """The line that was typed."""
    return shlex.join(["alphaq-gguf", *sys.argv[1:]])


@dataclass(frozen=True)
class JudgeOptions(MachineOptions):
    """What runs the files, and what is measured while it does."""

    device: Annotated[  # pyright: ignore[reportIncompatibleVariableOverride]
        str | None,
        typer.Option(
            help="Where PyTorch runs: cpu, cuda, cuda:1, ... (default: cuda where there is one)",
            rich_help_panel=_MACHINE,
            show_default=False,
        ),
    ] = None
    engine: Annotated[
        str | None,
        typer.Option(
            help=f"What runs the files, comma-separated: {', '.join(ENGINES)}. (default: llama, and triton on a GPU, "
            "else torch)",
            rich_help_panel=_MEASURED,
            show_default=False,
        ),
    ] = None
    speed: Annotated[bool, typer.Option(help="Measure how fast files run as well.", rich_help_panel=_MEASURED)] = True
    runs: Annotated[int, typer.Option(min=1, help="Runs of which speed is the median.", rich_help_panel=_MEASURED)] = 5
    gpu_layers: Annotated[
        int, typer.Option(help="Layers that llama.cpp puts on a GPU, -1 for all.", rich_help_panel=_MACHINE)
    ] = 0
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="Let llama.cpp keep its KV cache in float32 and do without flash attention, for comparing engines; "
            "llama-perplexity's `-fa off -ctk f32 -ctv f32`.",
            rich_help_panel=_MEASURED,
        ),
    ] = False
    batch: Annotated[
        int,
        typer.Option(min=1, help="Windows that go through a layer of the reference at once.", rich_help_panel=_MACHINE),
    ] = 8
    again: Annotated[
        bool, typer.Option("--again", help="Measure anew what is known already.", rich_help_panel=_MEASURED)
    ] = False

    @property
    def torch_device(self) -> str:
        """The device that was named, else a GPU if there is one; UsageError when torch lacks it."""
        import torch

        if self.device is None:
            return "cuda" if torch.cuda.is_available() else "cpu"
        self.check_device()
        return self.device

    def measuring(self) -> dict[str, Any]:
        return {"device": self.torch_device, "threads": self.n_threads, "cache_dir": self.cache_path}

    def open_reference(self, source: Source, texts: TextOptions, console: Console) -> Reference:
        """What `source` says of the texts, from an earlier run where there was one."""
        return make_reference(
            source,
            texts.texts,
            n_ctx=texts.ctx,
            max_windows=texts.max_windows,
            seed=texts.seed,
            gpu_layers=self.gpu_layers,
            exact=self.exact,
            batch=self.batch,
            reporter=console,
            **self.measuring(),
        )

    def settings(self) -> JudgeSettings:
        """What these ask for; UsageError for an engine or a device that is none."""
        names = None if self.engine is None else tuple(name.strip() for name in self.engine.split(","))
        for name in names or ():
            if name not in ENGINES:
                raise UsageError(f"--engine {name}: unknown", f"one or more of {', '.join(ENGINES)}")
        return JudgeSettings(
            engines=names,
            device=self.torch_device,
            threads=self.n_threads,
            gpu_layers=self.gpu_layers,
            exact=self.exact,
            speed_runs=self.runs if self.speed else 0,
            again=self.again,
        )
