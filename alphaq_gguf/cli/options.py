"""Options that commands share: the checkpoint, the machine, what is printed; and how they become parameters."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import platformdirs
import typer

from ..checkpoint import Source, open_source
from ..console import Console
from ..encode import ENCODERS, Encoder, find_encoder
from ..errors import UsageError
from ..qtypes import QType, parse_qtype

_OUTPUT, _MACHINE = "Output", "Machine"

EncoderName: Any = StrEnum("EncoderName", [(name, name) for name in ENCODERS])
CONTEXT_HELP = "tokens of context the model is to run with."


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Let Typer see the fields of every parameter that is a dataclass as options of the command itself."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type[Any]] = {}
    flat: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if not is_dataclass(kind):
            flat.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        assert isinstance(kind, type)
        groups[parameter.name] = kind
        annotations = get_type_hints(kind, include_extras=True)
        for option in fields(kind):
            default = inspect.Parameter.empty if option.default is MISSING else option.default
            flat.append(
                inspect.Parameter(
                    option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotations[option.name]
                )
            )

    @wraps(command)
    def call(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{option.name: values.pop(option.name) for option in fields(kind)})
        command(**values)

    call.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return call


@dataclass(frozen=True)
class CheckpointOptions:
    """The checkpoint, and how to read it."""

    source: Annotated[
        str,
        typer.Argument(
            help="Hugging Face checkpoint directory, F32/F16/BF16 GGUF file, or OWNER/NAME on the Hub.",
            show_default=False,
        ),
    ]
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a repository on the Hub.", show_default=False)
    ] = None
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Read a repository's weights from the Hub piece by piece, keeping none on disk."),
    ] = False
    pre_tokenizer: Annotated[
        str | None,
        typer.Option(help="llama.cpp's pre-tokenizer id, where the tokenizer's regex is unknown.", show_default=False),
    ] = None

    def open(self, console: Console) -> Source:
        """The source, with a warning for each way in which llama.cpp is known to compute otherwise."""
        return self._open(console, allow_requantize=True)

    def _open(self, console: Console, *, allow_requantize: bool) -> Source:
        source = open_source(
            self.source,
            allow_requantize=allow_requantize,
            pre_tokenizer=self.pre_tokenizer,
            revision=self.revision,
            stream=self.stream,
            reporter=console,
        )
        for remark in source.remarks:
            console.warn(remark)
        return source


@dataclass(frozen=True)
class SourceOptions(CheckpointOptions):
    """The checkpoint to convert, which should not be quantised."""

    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Accept a GGUF whose experts are already quantised.")
    ] = False

    def open(self, console: Console) -> Source:
        return self._open(console, allow_requantize=self.allow_requantize)


@dataclass(frozen=True)
class MachineOptions:
    """What to compute with, and where measurements are kept."""

    device: Annotated[
        str,
        typer.Option(
            help="Where spectra and layers are computed, and what torch encodes: cpu, cuda, cuda:1, ...",
            rich_help_panel=_MACHINE,
        ),
    ] = "cpu"
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads. (default: all cores)", min=1, rich_help_panel=_MACHINE, show_default=False),
    ] = None
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where measurements are kept. (default: the user's cache directory)",
            rich_help_panel=_MACHINE,
            show_default=False,
        ),
    ] = None

    @property
    def n_threads(self) -> int:
        return self.threads or os.cpu_count() or 1

    @property
    def cache_path(self) -> Path:
        """Where measurements are kept, which is made if need be; UsageError where it cannot be."""
        path = self.cache_dir or Path(platformdirs.user_cache_dir("alphaq-gguf"))
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"--cache-dir {path}: cannot be made: {error.strerror}", "name another directory"
            ) from None
        return path

    def measuring(self) -> dict[str, Any]:
        """The arguments of the pipeline's measuring stages; UsageError when torch lacks the device or its float64."""
        self.check_device()
        return {"device": self.device, "threads": self.n_threads, "cache_dir": self.cache_path}

    def check_device(self) -> None:
        """UsageError when torch lacks the device or its float64."""
        import torch

        try:
            torch.empty(1, device=self.device, dtype=torch.float64)
        except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"--device {self.device}: not available: {reason}", "use --device cpu") from None


@dataclass(frozen=True)
class EncodingOptions(MachineOptions):
    """As MachineOptions, and what encodes weights."""

    encoder: Annotated[
        EncoderName,  # pyright: ignore[reportInvalidTypeForm]
        typer.Option(
            help="What encodes weights: libggml writes llama.cpp's own bytes; torch computes on --device, with less "
            "squared error.",
            rich_help_panel=_MACHINE,
        ),
    ] = EncoderName.libggml

    def measuring(self) -> dict[str, Any]:
        return {**super().measuring(), "encoder": self.open_encoder()}

    def open_encoder(self) -> Encoder:
        """The encoder; UsageError when torch lacks the device."""
        self.check_device()
        return find_encoder(self.encoder.value, self.device)


@dataclass(frozen=True)
class OutputOptions:
    """What may be replaced, and what is printed."""

    force: Annotated[bool, typer.Option("--force", help="Replace existing files.", rich_help_panel=_OUTPUT)] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors.", rich_help_panel=_OUTPUT)] = (
        False
    )
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=_OUTPUT)] = False

    def console(self) -> Console:
        return Console(quiet=self.quiet, as_json=self.json)


def parse_types(text: str | None) -> tuple[QType, ...] | None:
    """`Q2_K,Q4_K` -> types; UsageError for an unknown one."""
    if text is None:
        return None
    try:
        return tuple(parse_qtype(name) for name in text.split(",") if name.strip())
    except ValueError as error:
        raise UsageError(f"--types {text!r}: {error}") from None
