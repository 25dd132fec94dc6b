"""llama.cpp's own presets: what its quantiser makes of a model, with the types that it chooses."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..calibration.imatrix import open_importance
from ..checkpoint import Source
from ..checkpoint.gguf import GGUFSource
from ..checkpoint.huggingface import CONFIG_KEY
from ..encode import encode_rows, row_spans
from ..errors import AlphaQError, OutputError, SourceError, UsageError
from ..evaluate.isolated import run_isolated
from ..gguf_file import TensorInfo, build_header, read_header
from ..layout import alignment_of
from ..prefetch import prefetch
from ..qtypes import FLOAT_TYPES, QType
from ..reporter import Reporter, Silent
from ..tensor_types import Override, choose_types
from ..writer import check_output, replacing, write_gguf

PRESETS = (
    "Q2_K",
    "Q2_K_S",
    "Q3_K_S",
    "Q3_K_M",
    "Q3_K_L",
    "Q4_0",
    "Q4_K_S",
    "Q4_K_M",
    "Q5_K_S",
    "Q5_K_M",
    "Q6_K",
    "Q8_0",
)
"""Under the names that llama-quantize has for them."""

_LOG_LEVEL_ERROR = 4
_FULL = "is the disk full?"
_FAILED = "failed to quantize: "
# The line that llama.cpp logs as it begins with a tensor.
_TENSOR = re.compile(rb"\[ *\d+/ *\d+\] ")
# Weights read at once: 16 MiB of float32.
_CHUNK_WEIGHTS = 1 << 22
# The longest text that llama.cpp takes for a metadata value.
_LONGEST_VALUE = 127


def check_presets(names: Sequence[str]) -> None:
    """UsageError for a name that is none of PRESETS."""
    for name in names:
        if name not in PRESETS:
            raise UsageError(f"preset {name!r}: unknown", f"one of {', '.join(PRESETS)}")


def write_preset(
    gguf: Path,
    preset: str,
    out: Path,
    *,
    threads: int = 1,
    overrides: Sequence[Override] = (),
    imatrix: Path | None = None,
    force: bool = False,
    reporter: Reporter | None = None,
) -> None:
    """Write to `out`, atomically, what llama-quantize makes of the float file `gguf` with `preset`, one of PRESETS.

    `overrides` set the types of single tensors, as they do everywhere else in this package; `imatrix` weighs rounding.
    AlphaQError with llama.cpp's reason when it fails, OutputError when `out` cannot be written.
    """
    check_presets([preset])
    source = GGUFSource(gguf)
    types = _chosen_types(source, overrides)
    check_output(out, force=force, inputs=source.files)
    reporter = reporter or Silent()
    with replacing(out) as temporary:
        label = f"llama.cpp's quantiser, {preset}"
        run_isolated(_quantize, gguf, temporary, preset, threads, types, imatrix, label=label, reporter=reporter)
        try:
            read_header(temporary)
        except SourceError as error:
            # llama.cpp does not look whether what it wrote last is on the disk.
            raise OutputError(
                f"{out}: llama.cpp could not write all of it: {error.message}", "is the disk full?"
            ) from None


def _chosen_types(source: Source, overrides: Sequence[Override]) -> dict[str, QType]:
    """The types that the user chose, by tensor; UsageError as `choose_types` says."""
    others, stacks = choose_types(source, overrides)
    chosen = {**others, **stacks}
    return {name: chosen[name] for name in source.tensors if any(re.search(pattern, name) for pattern, _ in overrides)}


def _quantize(
    gguf: Path,
    out: Path,
    preset: str,
    threads: int,
    types: Mapping[str, QType],
    imatrix: Path | None,
    reporter: Reporter,
) -> None:
    """Run llama.cpp's quantiser in this process, whose log it takes over."""
    import llama_cpp

    params: Any = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{preset}")
    # These arrays end at an entry without a name.
    overrides = (llama_cpp.llama_model_tensor_override * (len(types) + 1))()
    for entry, (name, qtype) in zip(overrides, types.items(), strict=False):
        entry.pattern, entry.type = f"^{name.replace('.', '[.]')}$".encode(), int(qtype)
    params.tt_overrides = overrides
    source = GGUFSource(gguf)
    # llama.cpp has the bare pointers of these.
    kept = None if imatrix is None else _add_importance(params, source, imatrix)
    reasons: list[str] = []
    with reporter.task(f"Quantising to {preset}", len(source.tensors), "tensors") as advance:

        @llama_cpp.llama_log_callback
        def listen(level: int, text: bytes, _: ctypes.c_void_p) -> None:
            if _TENSOR.match(text):
                advance(1)
            elif level == _LOG_LEVEL_ERROR and text.strip():
                reasons.append(text.decode("utf-8", "replace").strip())

        llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
        failed = llama_cpp.llama_model_quantize(bytes(gguf), bytes(out), ctypes.pointer(params))
    del kept
    if failed:
        reason = (reasons or ["for no reason it gives"])[-1].rpartition(_FAILED)[2]
        if "iostream" in reason:
            raise OutputError(f"{out}: llama.cpp cannot write it: {reason}", _FULL)
        hint = "--imatrix FILE, or another preset" if "matrix" in reason else ""
        raise AlphaQError(f"{gguf}: llama.cpp cannot quantise it to {preset}: {reason}", hint)


def _add_importance(params: Any, source: Source, path: Path) -> list[Any]:
    """Have `params` say how strongly columns are driven, and where that was learned; what must outlive them."""
    import llama_cpp

    imatrix = open_importance(path, source)
    weights = {name: imatrix.weights(name) for name in source.tensors}
    known = {name: np.ascontiguousarray(found) for name, found in weights.items() if found is not None}
    entries = (llama_cpp.llama_model_imatrix_data * (len(known) + 1))()
    for entry, (name, found) in zip(entries, known.items(), strict=False):
        entry.name, entry.size = name.encode(), found.size
        entry.data = found.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params.imatrix = entries
    told = {"quantize.imatrix.file": path.name, "quantize.imatrix.dataset": ", ".join(imatrix.datasets)}
    pairs = (llama_cpp.llama_model_kv_override * (len(told) + 1))()
    for pair, (key, value) in zip(pairs, told.items(), strict=False):
        pair.tag, pair.key = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, key.encode()
        pair.value.val_str = value.encode()[:_LONGEST_VALUE]
    params.kv_overrides = pairs
    return [known, entries, pairs]


def float_file(source: Source, directory: Path, reporter: Reporter) -> Path:
    """A float GGUF of `source`: itself if it is one, else one of the same values in `directory`, unless it is there."""
    if isinstance(source, GGUFSource) and all(info.qtype in FLOAT_TYPES for info in source.tensors.values()):
        return source.files[0]
    path = directory / f"floats-{source.fingerprint[:24]}.gguf"
    if not path.exists():
        reporter.note(f"Writing a temporary float GGUF, for llama.cpp's quantiser: {path}")
        _write_floats(source, path, reporter)
    return path


def _write_floats(source: Source, out: Path, reporter: Reporter) -> None:
    """Every tensor in the float type it is stored in, or as F32 where it has another or llama.cpp wants that."""
    others, _ = choose_types(source, ())
    infos = []
    for info in source.tensors.values():
        keep = info.qtype in FLOAT_TYPES and others.get(info.name) != QType.F32
        infos.append(TensorInfo(info.name, info.shape, info.qtype if keep else QType.F32))
    # What says how another file was made would be copied into every preset.
    fields = [field for field in source.fields if field.key == CONFIG_KEY or not field.key.startswith("alphaq.")]
    header, placed, size = build_header(fields, infos, alignment_of(source))

    def produce(info: TensorInfo) -> Iterator[np.ndarray]:
        spans = row_spans(info.n_rows, max(1, _CHUNK_WEIGHTS // max(info.n_cols, 1)))
        for rows in prefetch(lambda span=span: source.read_rows(info.name, *span) for span in spans):
            yield encode_rows(rows, info.qtype)

    write_gguf(out, header, placed, size, produce, reporter)
