"""How fast do experts with types of their own run in llama.cpp, beside types by stack of the same bytes?

    python tools/bench_plugin.py -o RESULT [--models qwen1.5-moe-a2.7b,qwen3-30b-a3b] [--threads 2] [--scratch DIR]

For each model, two layers of its real shape with random weights and a small vocabulary: one file in which the stacks
take turns with the types, for llama.cpp alone, and one in which the experts of each stack do, for the plug-in: the same
types, the same bytes. First both are held against PyTorch with the same blocks; where the plug-in's logits are not as
near to it as llama.cpp's own, the script ends. Then both are timed in turns, each time in a process of its own:
prefill, decode, and loading a file that is in memory. Mapped is held against llama.cpp with weights as stored, repacked
against llama.cpp with the experts in its repacking buffers. A ratio is the median of those of the rounds. Writes
RESULT.json and RESULT.md.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import copy
from typing import Any

import numpy as np
from results import describe_run, introduce, run, write_result

from alphaq_gguf.checkpoint import ExpertStack, Source, open_source
from alphaq_gguf.checkpoint.gguf import GGUFSource
from alphaq_gguf.console import Console
from alphaq_gguf.conversion import convert
from alphaq_gguf.encode import library_version
from alphaq_gguf.errors import AlphaQError, UsageError
from alphaq_gguf.evaluate.isolated import run_isolated
from alphaq_gguf.evaluate.llama import LlamaModel, changed_defaults
from alphaq_gguf.evaluate.speed import time_llama
from alphaq_gguf.gguf_file import TensorInfo
from alphaq_gguf.plugin import prepare
from alphaq_gguf.plugin.load import BufferTypeOverride
from alphaq_gguf.qtypes import QType, fits, row_bytes
from alphaq_gguf.recipe import Recipe, RecipeUnit
from alphaq_gguf.reporter import Reporter
from alphaq_gguf.tensor_types import choose_types

TOKENIZER = Path(__file__).parents[1] / "tests/models/stdlib-qwen2moe-4m"
SHAPES: dict[str, dict[str, Any]] = {
    "qwen1.5-moe-a2.7b": {
        "model_type": "qwen2_moe",
        "hidden_size": 2048,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "intermediate_size": 5632,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
}
K_TYPES, OTHER_TYPES = (QType.Q2_K, QType.Q3_K, QType.Q4_K, QType.Q5_K), (QType.Q4_0, QType.Q5_0)
# How much farther from PyTorch's logits the plug-in's may be than llama.cpp's: neither sums up in PyTorch's order.
MOST_DISTANCE, CHECKED_TOKENS = 1.5, 32
N_PREFILL, N_DECODE, N_RUNS = 512, 64, 3
# (what is timed, what it is held against): file and way to load it.
PAIRS = (("mapped", "as stored"), ("repacked", "repacked by llama.cpp"))
WANTED = {"prefill": 0.85, "decode": 0.95, "load": 1.2}


@dataclass(frozen=True)
class Timing:
    """Tokens per second, and seconds to load the file."""

    prefill: float
    decode: float
    load: float


def make_checkpoint(shape: dict[str, Any], directory: Path) -> None:
    """A random checkpoint in bfloat16 with two layers of this shape."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    for name in ("tokenizer.json", "tokenizer_config.json"):
        copy(TOKENIZER / name, directory / name)
    common = {
        "num_hidden_layers": 2,
        "vocab_size": AutoConfig.from_pretrained(TOKENIZER).vocab_size,
        "max_position_embeddings": 4096,
        "initializer_range": 0.05,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape, **common)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)


def types_of(stack: ExpertStack) -> Sequence[QType]:
    """The types that take turns in stacks like this one."""
    pool = K_TYPES if fits(QType.Q4_K, stack.n_cols) else OTHER_TYPES
    return pool[1:3] if stack.proj == "down" and pool == K_TYPES else pool


def make_recipe(source: Source, granularity: str) -> Recipe:
    """Types by turns: of the stacks alike, or of the experts in each stack."""
    units, turn = [], dict.fromkeys(("down", "other"), 0)
    for stack in source.stacks:
        types = types_of(stack)
        kind = "down" if stack.proj == "down" else "other"
        height = stack.n_rows
        for xid in range(stack.n_experts):
            # Turned from stack to stack, so that experts which a random router prefers have all types.
            qtype = types[(turn[kind] + (0 if granularity == "stack" else xid)) % len(types)]
            n_bytes = height * row_bytes(qtype, stack.n_cols)
            units.append(
                RecipeUnit(stack.name, stack.bid, stack.proj, height * stack.n_cols, qtype, n_bytes, expert=xid)
            )
        turn[kind] += 1
    return Recipe(
        "bench_plugin",
        source.fingerprint,
        source.architecture,
        {"strategy": "turns"},
        {},
        tuple(units),
        choose_types(source, ())[0],
        granularity="expert",
    )


def make_files(name: str, scratch: Path, threads: int, console: Console) -> dict[str, Path]:
    """The files of a model, by granularity, as left by an earlier run with the same encoder or made now."""
    files = {
        kind: scratch / f"{name}-{kind}-{library_version().replace(' ', '-')}.gguf" for kind in ("stack", "expert")
    }
    if all(file.is_file() for file in files.values()):
        return files
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        make_checkpoint(SHAPES[name], Path(directory))
        source = open_source(directory)
        for kind, file in files.items():
            convert(source, make_recipe(source, kind), file, threads=threads, force=True, reporter=console)
    return files


def distance(path: Path, threads: int) -> float:
    """How far llama.cpp's logits are from PyTorch's with the same blocks: median over tokens, of the logits' range."""
    from alphaq_gguf.evaluate.blocks import FileBlocks
    from alphaq_gguf.evaluate.torch_model import TorchModel

    with TorchModel(FileBlocks(path), n_ctx=CHECKED_TOKENS, threads=threads, round_activations=True) as model:
        tokens = np.random.default_rng(0).integers(model.n_vocab, size=CHECKED_TOKENS).tolist()
        expected = model.logits(tokens)
    with LlamaModel(path, n_ctx=CHECKED_TOKENS, threads=threads, exact=True) as model:
        found = model.logits(tokens)
    return float(np.median(np.abs(found - expected).max(axis=1) / np.ptp(expected, axis=1)))


def check(files: dict[str, Path], threads: int) -> dict[str, float]:
    """The distances of both files; AlphaQError when the plug-in's is too large."""
    found = {kind: distance(file, threads) for kind, file in files.items()}
    if not found["expert"] <= MOST_DISTANCE * found["stack"]:
        raise AlphaQError(
            f"{files['expert']}: {found['expert']:.2g} of their range away from PyTorch's logits, llama.cpp's own file "
            f"{found['stack']:.2g}, so nothing is timed"
        )
    return found


@contextmanager
def loading(path: Path, way: str) -> Iterator[bool]:
    """How the file at `path` is loaded when it is opened in the block; whether `repack` is to be asked for.

    All weights but the experts are as stored, so that only the experts make the difference.
    """
    values: dict[str, Any] = {"use_extra_bufts": False}
    if way == "repacked by llama.cpp":
        buffers = RepackingBuffers()
        source = GGUFSource(path, allow_requantize=True)
        names = [stack.name for stack in source.stacks if buffers.take(source.tensors[stack.name])]
        pattern = "|".join(map(re.escape, names)).encode()
        overrides = (BufferTypeOverride * 2)(BufferTypeOverride(pattern, buffers.handle))
        values["tensor_buft_overrides"] = ctypes.addressof(overrides)
    with changed_defaults("llama_model_default_params", **values):
        yield "repacked" in way


class RepackingBuffers:
    """The buffer type in which llama.cpp's CPU backend repacks experts; AlphaQError where it has none."""

    def __init__(self) -> None:
        import llama_cpp.llama_cpp

        self._library: Any = llama_cpp.llama_cpp._lib
        self._device = self._call("ggml_backend_dev_by_name", b"CPU")
        registry = self._call("ggml_backend_dev_backend_reg", self._device)
        address = self._call("ggml_backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts")
        handle = ctypes.c_void_p
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(handle), handle)(address)(self._device)
        found = next((h for h in iter(iter(listed).__next__, None) if self._name(h) == b"CPU_REPACK"), None)
        if found is None:
            raise AlphaQError("llama.cpp repacks no experts for this processor")
        self.handle = found

    def take(self, info: TensorInfo) -> bool:
        """Whether experts of this type and shape are repacked, asked as llama.cpp does: with an empty buffer."""

        class Params(ctypes.Structure):
            """`struct ggml_init_params`."""

            _fields_ = [("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]

        context = self._call("ggml_init", Params(1 << 16, None, True))
        n_experts, n_rows, n_cols = info.shape
        experts = self._call("ggml_new_tensor_3d", context, int(info.qtype), n_cols, n_rows, n_experts)
        rows = self._call("ggml_new_tensor_3d", context, int(QType.F32), n_cols, 1, 1)
        ids = self._call("ggml_new_tensor_2d", context, int(QType.I32), 1, 1)
        product = self._call("ggml_mul_mat_id", context, experts, rows, ids)
        # The field after the type.
        buffer = ctypes.c_void_p.from_address(experts + 8)
        buffer.value = self._call("ggml_backend_buft_alloc_buffer", self.handle, 0)
        taken = bool(self._call("ggml_backend_dev_supports_op", self._device, product) & 1)
        self._call("ggml_backend_buffer_free", buffer.value)
        self._call("ggml_free", context)
        return taken

    def _name(self, handle: int) -> bytes | None:
        return ctypes.cast(self._call("ggml_backend_buft_name", handle), ctypes.c_char_p).value

    def _call(self, name: str, *values: Any) -> Any:
        function = getattr(self._library, name)
        kinds = {bytes: ctypes.c_char_p, int: ctypes.c_void_p}
        function.argtypes = [kinds.get(type(value), type(value)) for value in values]
        function.restype = ctypes.c_void_p
        return function(*values) or 0


def time_file(path: Path, way: str, threads: int, reporter: Reporter) -> Timing:
    """One file in this process; loading is timed the second time, with the file in memory and libraries loaded."""
    load = 0.0
    with loading(path, way) as repack:
        for _ in range(2):
            start = time.perf_counter()
            with LlamaModel(path, n_ctx=N_PREFILL, threads=threads, all_logits=False, repack=repack):
                load = time.perf_counter() - start
        speed = time_llama(path, threads, 0, repack, N_PREFILL, N_DECODE, N_RUNS, reporter)
    return Timing(speed.prefill.median, speed.decode.median, load)


def compare(files: dict[str, Path], threads: int, n_rounds: int, console: Console, label: str) -> list[dict[str, Any]]:
    """A row for each way to run the experts' file: its timings, those it is held against, and the ratios."""
    # Pickled functions are found by their module's name, which is not this one when it runs as a script.
    from bench_plugin import time_file

    rows = []
    with console.task(f"Timing {label}", n_rounds * 2 * len(PAIRS), "runs") as advance:
        for ways in PAIRS:
            rounds: list[tuple[Timing, Timing]] = []
            for _ in range(n_rounds):
                found = []
                for kind, way in zip(("expert", "stack"), ways, strict=True):
                    found.append(
                        run_isolated(time_file, files[kind], way, threads, label=str(files[kind]), reporter=console)[0]
                    )
                    advance(1)
                rounds.append((found[0], found[1]))
            ratios = {
                name: statistics.median(getattr(ours, name) / getattr(stock, name) for ours, stock in rounds)
                for name in WANTED
            }
            rows.append(
                {
                    "model": label,
                    "way": ways[0],
                    "against": ways[1],
                    "ratios": ratios,
                    "rounds": [[asdict(timing) for timing in pair] for pair in rounds],
                }
            )
    return rows


def report(result: dict[str, Any]) -> list[str]:
    """The lines of RESULT.md."""
    lines = [
        "# Experts with types of their own in llama.cpp, beside types by stack of the same bytes",
        "",
        f"{introduce(result)}; {result['threads']} threads, {N_PREFILL} tokens read at once, {N_DECODE} written one by "
        f"one, medians of {result['n_rounds']} rounds in turns.",
        "",
        "| two layers of | experts | against | prefill, tokens/s | decode, tokens/s | load, ms | ratios: prefill | "
        "decode | load |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        cells = []
        for name, unit, form in (("prefill", 1, ".0f"), ("decode", 1, ".1f"), ("load", 1e3, ".0f")):
            sides = [statistics.median(pair[side][name] for pair in row["rounds"]) * unit for side in (0, 1)]
            cells.append(" against ".join(format(value, form) for value in sides))
        cells += [f"{row['ratios'][name]:.3f}x" for name in WANTED]
        lines.append(f"| {row['model']} | {row['way']} | {row['against']} | {' | '.join(cells)} |")
    lines += ["", "Spread of the ratios, round by round:", "", "| model | experts | prefill | decode | load |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for row in result["rows"]:
        cells = []
        for name in WANTED:
            found = [pair[0][name] / pair[1][name] for pair in row["rounds"]]
            cells.append(f"{min(found):.3f} to {max(found):.3f}")
        lines.append(f"| {row['model']} | {row['way']} | {' | '.join(cells)} |")
    checked = ", ".join(
        f"{found['expert']:.2g} against {found['stack']:.2g} for {name}" for name, found in result["checked"].items()
    )
    lines += ["", f"Distance from PyTorch's logits before timing, of their range, median over tokens: {checked}."]
    return lines


def main(words: Sequence[str], console: Console) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="where the files are kept for the next run; else they are not")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args(words)
    names = arguments.models.split(",")
    if unknown := [name for name in names if name not in SHAPES]:
        raise UsageError(f"--models {unknown[0]}: expected {', '.join(SHAPES)}")
    rows, checked = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = arguments.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        for name in names:
            files = make_files(name, scratch, arguments.threads, console)
            prepare(files["expert"], console)
            checked[name] = check(files, arguments.threads)
            rows += compare(files, arguments.threads, arguments.rounds, console, name)
    result = {
        **describe_run("bench_plugin.py", words, "alphaq-gguf", "llama-cpp-python", "torch"),
        "threads": arguments.threads,
        "n_rounds": arguments.rounds,
        "checked": checked,
        "rows": rows,
    }
    lines = report(result)
    write_result(arguments.output, result, lines)
    for line in lines:
        console.result(line)


if __name__ == "__main__":
    run(main)
