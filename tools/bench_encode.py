"""How fast and how well does the torch encoder encode, beside libggml's?

    python tools/bench_encode.py -o RESULT [--device cuda] [--threads 16] [--types Q4_K,Q6_K] [--importance]

First the squared error of both on the same rows, Gaussian and heavy-tailed, with and without importance: where torch's
is more than 0.1 % above libggml's, the script ends there. Then weights per second: of the encoder alone, with the rows
and blocks in the device's memory, and of all that `convert --encoder torch` does between float rows and blocks in the
computer's. Writes RESULT.json and RESULT.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from alphaq_kernels.quantize import quantize
from results import describe_run, introduce, run, write_result

from alphaq_gguf.console import Console
from alphaq_gguf.encode import Encoder, decode_rows, find_encoder
from alphaq_gguf.errors import AlphaQError, UsageError
from alphaq_gguf.qtypes import EXPERT_TYPES, QType

N_COLS = 4096
CHECKED_ROWS = 256
MOST_ERROR = 1.001
# Weights timed at once: more than a GPU's caches hold, or little enough for a CPU.
GPU_WEIGHTS, CPU_WEIGHTS = 1 << 26, 1 << 20
REPEATS = 5


def error_ratios(encoder: Encoder, reference: Encoder, qtype: QType, threads: int) -> dict[str, float]:
    """By kind of row, the encoder's squared error over the reference's, weighed as the encoding was."""
    rng = np.random.default_rng(0)
    kinds = {"Gaussian": rng.standard_normal, "Student t, 3": lambda shape: rng.standard_t(3, shape)}
    found = {}
    for kind, draw in kinds.items():
        rows = draw((CHECKED_ROWS, N_COLS)).astype(np.float32)
        for label, importance in (("", None), (", importance", rng.gamma(0.3, size=N_COLS).astype(np.float32))):
            errors = []
            for each in (encoder, reference):
                decoded = decode_rows(each.encode(rows, qtype, threads, importance), qtype, N_COLS, threads)
                squares = np.square(rows - decoded, dtype=np.float64).sum(axis=0)
                errors.append(float(squares.sum() if importance is None else squares @ importance))
            found[kind + label] = errors[0] / errors[1]
    return found


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The median of a few runs, after one that compiles and warms up."""
    work()
    times = []
    for _ in range(REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure_speed(
    encoder: Encoder, reference: Encoder, qtype: QType, device: torch.device, threads: int, weighed: bool
) -> dict[str, float]:
    """Weights per second: libggml on `threads` threads, torch with rows on the device and with rows beside it."""
    rng = np.random.default_rng(0)
    n_rows = (GPU_WEIGHTS if device.type == "cuda" else CPU_WEIGHTS) // N_COLS
    rows = rng.standard_normal((n_rows, N_COLS), dtype=np.float32)
    importance = rng.gamma(0.3, size=N_COLS).astype(np.float32) if weighed else None
    there = torch.from_numpy(rows).to(device)
    known = None if importance is None else torch.from_numpy(importance).to(device)
    # As much as keeps all threads busy for a while.
    few = rows[: max(64, min(n_rows, threads * 256))]
    return {
        "libggml": few.size / seconds(lambda: reference.encode(few, qtype, threads, importance), torch.device("cpu")),
        "torch": rows.size / seconds(lambda: quantize(there, int(qtype), known), device),
        "torch_with_transfers": rows.size / seconds(lambda: encoder.encode(rows, qtype, threads, importance), device),
    }


def report(result: dict[str, Any]) -> list[str]:
    """The lines of RESULT.md."""
    kinds = list(result["rows"][0]["error_ratio"])
    lines = [
        f"# Encoding on {result['device']} beside libggml on {result['threads']} threads",
        "",
        introduce(result),
        "",
        f"Million weights per second, rows of {N_COLS}{', with importance' if result['importance'] else ''}: the "
        "encoder alone, and from float rows to blocks in the computer's memory. Beside them the speed over libggml's.",
        "",
        "| type | libggml | torch | | with transfers | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        base = row["weights_per_s"]["libggml"]
        cells = [f"{base / 1e6:.4g}"]
        for name in ("torch", "torch_with_transfers"):
            speed = row["weights_per_s"][name]
            cells += [f"{speed / 1e6:.4g}", f"{speed / base:.3g}x"]
        lines.append(f"| {row['type']} | {' | '.join(cells)} |")
    lines += ["", f"Squared error over libggml's, on {CHECKED_ROWS} rows:", ""]
    lines += [f"| type | {' | '.join(kinds)} |", f"| --- | {' | '.join('---' for _ in kinds)} |"]
    lines += [
        f"| {row['type']} | {' | '.join(format(row['error_ratio'][kind], '.4f') for kind in kinds)} |"
        for row in result["rows"]
    ]
    return lines


def main(words: Sequence[str], console: Console) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of libggml, and of torch on the CPU")
    parser.add_argument("--types", help="comma-separated; all unless given")
    parser.add_argument("--importance", action="store_true", help="time encoding with importance")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args(words)
    known = {qtype.name: qtype for qtype in EXPERT_TYPES}
    names = arguments.types.upper().split(",") if arguments.types else list(known)
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"--types: no {unknown[0]}", f"choose from {','.join(known)}")
    types = [known[name] for name in names]
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU", "use --device cpu")
    threads = arguments.threads
    torch.set_num_threads(threads)
    encoder, reference = find_encoder("torch", arguments.device), find_encoder()
    ratios = {}
    with console.task("Checking errors", len(types), "types") as advance:
        for qtype in types:
            ratios[qtype] = error_ratios(encoder, reference, qtype, threads)
            advance(1)
    worse = [
        f"{q.name} on {k}: {r:.4f}" for q, found in ratios.items() for k, r in found.items() if not r <= MOST_ERROR
    ]
    if worse:
        raise AlphaQError(f"squared error above libggml's, so nothing is timed: {'; '.join(worse)}")
    rows = []
    with console.task("Timing", len(types), "types") as advance:
        for qtype in types:
            speed = measure_speed(encoder, reference, qtype, device, threads, arguments.importance)
            rows.append({"type": qtype.name, "error_ratio": ratios[qtype], "weights_per_s": speed})
            advance(1)
    result = {
        **describe_run("bench_encode.py", words, "alphaq-gguf", "llama-cpp-python", "torch"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU",
        "threads": threads,
        "importance": arguments.importance,
        "rows": rows,
    }
    lines = report(result)
    write_result(arguments.output, result, lines)
    for line in lines:
        console.result(line)


if __name__ == "__main__":
    run(main)
