"""How fast the expert kernels are on one GPU, against the memory's bandwidth, bf16 in torch, and decoding first.

    python tools/bench_kernels.py -o RESULT [--shapes mixtral-8x7b,...] [--types Q4_K,mix,...] [--quick]
    python tools/bench_kernels.py --check [--types ...]

Every operation is first checked against its twin in plain torch, then each case on its own weights: what is wrong
gets no time, and the exit code is 1. Weights are random bytes with sane scales; the mix gives each expert a type of
its own, drawn so that they average 3.5 bits per weight where the rows allow it. A time is the median over replays of a
CUDA graph that holds one call for each of several input sets, divided by their number; the sets choose other experts,
so that the L2 cache does not hold their weights. Bandwidth is what copying 4 GiB reads and writes in the same run.
Cases are begun for `--minutes`, the ones with targets first. Writes RESULT.json and RESULT.md.
`--check` does the first part alone, without a GPU in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from alphaq_kernels import FORMATS, Activation, PackedExperts, dequantize, find_format
from alphaq_kernels.moe_decode import moe_decode
from alphaq_kernels.moe_prefill import moe_prefill
from results import describe_run, introduce, run, write_result
from torch.nn import functional

from alphaq_gguf.console import Console
from alphaq_gguf.errors import AlphaQError, UsageError
from alphaq_gguf.qtypes import QType, candidates, stock_substitute

Row = dict[str, Any]
Experts = tuple[PackedExperts, PackedExperts, PackedExperts]


@dataclass(frozen=True)
class Shape:
    hidden: int
    inner: int
    n_experts: int
    top_k: int


SHAPES = {
    "mixtral-8x7b": Shape(4096, 14336, 8, 2),
    "qwen1.5-moe-a2.7b": Shape(2048, 1408, 60, 4),
    "deepseek-v2-lite": Shape(2048, 1408, 64, 6),
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8),
    "deepseek-v3": Shape(7168, 2048, 256, 8),
}
TYPES = ("Q4_K", "Q8_0", "mix", "Q2_K", "Q3_K", "Q6_K", "Q5_K", "Q4_0", "Q5_0", "Q5_1", "IQ4_NL")
TOKENS = (1, 4, 16, 512)
MIX_BPW = 3.5
# More tokens go to moe_prefill.
MOST_DECODED = 16

# Least share of the copy bandwidth for one token on these shapes, and least speed-up of the mix over bf16.
BANDWIDTH_TARGETS = {"Q4_K": 0.7, "Q8_0": 0.7, "Q2_K": 0.55, "Q3_K": 0.55, "Q6_K": 0.55}
BANDWIDTH_SHAPES = ("mixtral-8x7b", "deepseek-v3")
MIX_TARGET = 3.0

# Where the halves lie in each block, from the structs of ggml-common.h, and a size that makes weights of some 0.02.
HALVES = {
    "Q4_0": ((0,), 4e-3),
    "Q5_0": ((0,), 2e-3),
    "Q5_1": ((0, 2), 1e-3),
    "Q8_0": ((0,), 3e-4),
    "Q2_K": ((80, 82), 1e-3),
    "Q3_K": ((108,), 5e-4),
    "Q4_K": ((0, 2), 6e-5),
    "Q5_K": ((0, 2), 3e-5),
    "Q6_K": ((208,), 2e-5),
    "IQ4_NL": ((0,), 3e-4),
}
# Relative error of a result; in the interpreter bfloat16 is truncated, not rounded.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def random_blocks(name: str, n_rows: int, n_cols: int, device: torch.device) -> torch.Tensor:
    """uint8 [n_rows, row_bytes]."""
    fmt = find_format(name)
    n_blocks = n_rows * n_cols // fmt.block_size
    blocks = torch.randint(0, 256, (n_blocks, fmt.type_size), dtype=torch.uint8, device=device)
    places, size = HALVES[name]
    for at in places:
        halves = torch.empty(n_blocks, 1, device=device).uniform_(-size, size).half()
        blocks[:, at : at + 2] = halves.view(torch.uint8)
    return blocks.view(n_rows, -1)


def draw_types(n_experts: int, n_cols: int, seed: int) -> list[str]:
    """A type for each expert: all begin at the smallest that fits, then experts drawn by seed go one type up."""
    types = candidates(n_cols)
    bits = [f.type_size * 8 / f.block_size for f in (find_format(t.name) for t in types)]
    draw, levels = random.Random(seed), [0] * n_experts
    open_experts = list(range(n_experts))
    while open_experts:
        xid = draw.choice(open_experts)
        raised = [*levels[:xid], levels[xid] + 1, *levels[xid + 1 :]]
        if raised[xid] == len(types) or sum(bits[level] for level in raised) > MIX_BPW * n_experts:
            open_experts.remove(xid)
        else:
            levels = raised
    return [types[level].name for level in levels]


def build_experts(kind: str, shape: Shape, seed: int, device: torch.device) -> Experts:
    """Gate, up and down of one type, as the format's stock substitute where rows do not fit it, or of the mix."""

    def build(n_rows: int, n_cols: int, seed: int) -> PackedExperts:
        if kind == "mix":
            names = draw_types(shape.n_experts, n_cols, seed)
            return PackedExperts.from_experts([(random_blocks(n, n_rows, n_cols, device), n) for n in names])
        name = stock_substitute(QType[kind], n_cols).name
        blocks = random_blocks(name, shape.n_experts * n_rows, n_cols, device)
        return PackedExperts.from_stack(blocks, name, shape.n_experts)

    gate, up = (build(shape.inner, shape.hidden, 3 * seed + i) for i in range(2))
    return gate, up, build(shape.hidden, shape.inner, 3 * seed + 2)


def to_planar(experts: Experts) -> Experts:
    gate, up, down = experts
    return gate.to_planar(), up.to_planar(), down.to_planar()


@dataclass(frozen=True)
class Inputs:
    """What one call takes. `parts` tells the host, of each expert in use, its tokens [n] and their gates [n, 1]."""

    x: torch.Tensor
    chosen: torch.Tensor
    gates: torch.Tensor
    parts: dict[int, tuple[torch.Tensor, torch.Tensor]]


def build_inputs(
    shape: Shape, n_tokens: int, n_sets: int, dtype: torch.dtype, seed: int, device: torch.device
) -> list[Inputs]:
    """Input sets. One token takes the next hand of a shuffled deck of experts, more tokens a random hand each."""
    draw, deck, sets = random.Random(seed), [], []
    for _ in range(n_sets):
        if n_tokens == 1:
            if len(deck) < shape.top_k:
                deck = draw.sample(range(shape.n_experts), shape.n_experts)
            hands, deck = [deck[: shape.top_k]], deck[shape.top_k :]
        else:
            hands = [draw.sample(range(shape.n_experts), shape.top_k) for _ in range(n_tokens)]
        x = torch.randn(n_tokens, shape.hidden, device=device).to(dtype)
        gates = torch.rand(n_tokens, shape.top_k, device=device).softmax(1)
        chosen, parts = torch.tensor(hands, device=device), {}
        for xid in chosen.unique().tolist():
            tokens, place = (chosen == xid).nonzero(as_tuple=True)
            parts[xid] = tokens, gates[tokens, place, None].to(dtype)
        sets.append(Inputs(x, chosen, gates, parts))
    return sets


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """NaN where either is not finite."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def check_operations(types: Sequence[str], device: torch.device) -> list[str]:
    """What is wrong on small cases, each operation against its twin in plain torch."""
    wrong = []
    for fmt in FORMATS:
        if fmt.name in types:
            blocks = random_blocks(fmt.name, 5, 768, device)
            results = [dequantize(blocks, fmt.name, backend=backend) for backend in ("triton", "torch")]
            if not torch.equal(*results):
                wrong.append(f"dequantize {fmt.name}")
    for kind in types:
        large = kind == "mix" or find_format(kind).block_size == 256
        experts = build_experts(kind, shape := Shape(256, 256, 4, 2) if large else Shape(64, 96, 4, 2), 0, device)
        for layout, packed in (("", experts), (" planar", to_planar(experts))):
            for op, n_tokens in ((moe_decode, 1), (moe_prefill, 19)):
                inputs = build_inputs(shape, n_tokens, 1, torch.float32, 1, device)[0]
                call = partial(op, inputs.x, inputs.chosen, inputs.gates, *packed, Activation())
                error = relative_error(call(backend="triton"), call(backend="torch"))
                if not error < TOLERANCE[torch.float32]:
                    wrong.append(f"{op.__name__} {kind}{layout}: relative error {error:.1e}")
    return wrong


def time_us(calls: Sequence[Callable[[], Any]], budget_s: float) -> float:
    """Microseconds of one call: the median over replays of a graph of all of them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    began = time.monotonic()
    while len(times) < 5 or (len(times) < 100 and time.monotonic() - began < budget_s):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    # The first replays warm up.
    return median(times[2:])


def measure_copy(device: torch.device) -> float:
    """Bytes read and written a second by copying 4 GiB."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / time_us([lambda: target.copy_(source)], 0.5) * 1e6


def run_one_by_one(inputs: Inputs, matrices: Callable[[int], Sequence[torch.Tensor]]) -> torch.Tensor:
    """The layer with three products for each expert in use, of its gate, up and down matrices."""
    out = torch.zeros_like(inputs.x)
    for xid, (tokens, gates) in inputs.parts.items():
        gate, up, down = matrices(xid)
        x = inputs.x[tokens]
        hidden = functional.silu(functional.linear(x, gate)) * functional.linear(x, up)
        out.index_add_(0, tokens, functional.linear(hidden, down) * gates)
    return out


class Floats:
    """The layer in bf16, in the ways that torch and transformers offer."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        sizes = ((shape.n_experts, 2 * shape.inner, shape.hidden), (shape.n_experts, shape.hidden, shape.inner))
        self.gate_up, self.down = (
            torch.empty(size, dtype=torch.bfloat16, device=device).normal_(std=0.02) for size in sizes
        )

    def loop(self, inputs: Inputs) -> torch.Tensor:
        return run_one_by_one(inputs, lambda xid: (*self.gate_up[xid].chunk(2), self.down[xid]))

    def gathered(self, inputs: Inputs) -> torch.Tensor:
        xids = inputs.chosen.flatten()
        x = inputs.x.repeat_interleave(self.shape.top_k, 0).unsqueeze(-1)
        gate, up = torch.bmm(self.gate_up[xids], x).chunk(2, 1)
        y = torch.bmm(self.down[xids], functional.silu(gate) * up).view(*inputs.chosen.shape, -1)
        return (y * inputs.gates.unsqueeze(-1)).sum(1).to(x.dtype)

    def grouped(self, inputs: Inputs) -> torch.Tensor:
        multiply = getattr(functional, "grouped_mm", None) or torch.__dict__["_grouped_mm"]
        xids, order = inputs.chosen.flatten().sort()
        ends = torch.searchsorted(xids, torch.arange(1, self.shape.n_experts + 1, device=xids.device), out_int32=True)
        gate, up = multiply(inputs.x[order // self.shape.top_k], self.gate_up.transpose(1, 2), offs=ends).chunk(2, 1)
        y = multiply(functional.silu(gate) * up, self.down.transpose(1, 2), offs=ends)
        y = y[order.argsort()].view(*inputs.chosen.shape, -1)
        return (y * inputs.gates.unsqueeze(-1)).sum(1).to(inputs.x.dtype)

    def transformers(self) -> Callable[[Inputs], torch.Tensor]:
        """The experts' forward of transformers with the implementation that its models take by default."""
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        config = MixtralConfig(
            hidden_size=self.shape.hidden,
            intermediate_size=self.shape.inner,
            num_local_experts=self.shape.n_experts,
            num_experts_per_tok=self.shape.top_k,
        )
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            module = MixtralExperts(config)
        module.gate_up_proj = torch.nn.Parameter(self.gate_up, requires_grad=False)
        module.down_proj = torch.nn.Parameter(self.down, requires_grad=False)
        return lambda inputs: module(inputs.x, inputs.chosen, inputs.gates.to(inputs.x.dtype))

    def ways(self, n_tokens: int) -> dict[str, Callable[[Inputs], torch.Tensor]]:
        """All that is there; of many tokens, gathered experts would be copies beyond all memory."""
        ways: dict[str, Callable[[Inputs], torch.Tensor]] = {"loop": self.loop, "grouped_mm": self.grouped}
        if n_tokens <= MOST_DECODED:
            ways["gathered bmm"] = self.gathered
        with suppress(ImportError):
            ways["transformers"] = self.transformers()
        return ways


def measure_case(row: Row, gguf: Experts, planar: Experts, sets: Sequence[Inputs], budget_s: float) -> Row:
    """The row with error, microseconds and bytes, or with the error alone where that is too large."""
    op = moe_decode if row["tokens"] <= MOST_DECODED else moe_prefill
    row = {**row, "op": op.__name__}

    def ours(inputs: Inputs) -> torch.Tensor:
        return op(inputs.x, inputs.chosen, inputs.gates, *planar, Activation(), backend="triton")

    def decoded_first(inputs: Inputs) -> torch.Tensor:
        return run_one_by_one(inputs, lambda xid: [e.dequantize(xid, inputs.x.dtype, backend="triton") for e in gguf])

    first = sets[0]
    want = moe_prefill(first.x.float(), first.chosen, first.gates, *gguf, Activation(), backend="torch")
    row["error"] = relative_error(ours(first), want)
    if not row["error"] < TOLERANCE[torch.bfloat16]:
        return row
    used = sum(expert_bytes(experts, inputs.parts) for experts in gguf for inputs in sets)
    return {
        **row,
        "us": time_us([partial(ours, inputs) for inputs in sets], budget_s),
        "bytes": used / len(sets),
        "decoded_first_us": time_us([partial(decoded_first, inputs) for inputs in sets[:4]], budget_s),
    }


def expert_bytes(experts: PackedExperts, ids: Iterable[int]) -> int:
    formats = [experts.table[xid][1] for xid in ids]
    return sum(experts.n_rows * experts.n_cols // f.block_size * f.type_size for f in formats)


def measure(arguments: argparse.Namespace, device: torch.device, console: Console) -> tuple[float, list[Row], int]:
    """The copy bandwidth, a row for each case, and how many cases there was no time for."""
    deadline = time.monotonic() + 60 * arguments.minutes
    budget_s = 0.05 if arguments.quick else 0.2
    bandwidth = measure_copy(device)
    cases = [(n, s, t) for n in arguments.tokens for t in arguments.types for s in arguments.shapes]
    cases.sort(key=lambda case: not (case[0] == 1 and (case[1] in BANDWIDTH_SHAPES or case[2] == "mix")))
    rows, floats, bf16, left = [], {}, {}, 0
    with console.task("Benchmark", len(cases), "cases") as advance:
        for n_tokens, name, kind in cases:
            advance(1)
            if time.monotonic() > deadline:
                left += 1
                continue
            shape = SHAPES[name]
            n_sets = 3 if n_tokens > MOST_DECODED else min(16, max(4, shape.n_experts // shape.top_k))
            sets = build_inputs(shape, n_tokens, n_sets, torch.bfloat16, 0, device)
            if (name, n_tokens) not in bf16:
                if name not in floats:
                    # One layer in bf16 at a time: the largest takes 22 GiB.
                    floats = {name: Floats(shape, device)}
                ways = floats[name].ways(n_tokens).items()
                bf16[name, n_tokens] = {way: time_us([partial(f, i) for i in sets], budget_s) for way, f in ways}
            gguf = build_experts(kind, shape, 0, device)
            planar = to_planar(gguf)
            weights = 3 * shape.n_experts * shape.hidden * shape.inner
            row = {"shape": name, "type": kind, "tokens": n_tokens}
            row["bpw"] = sum(experts.n_bytes for experts in gguf) * 8 / weights
            row = measure_case(row, gguf, planar, sets, budget_s)
            if "us" in row:
                row["copy_share"] = row["bytes"] / row["us"] * 1e6 / bandwidth
                row["bf16_us"] = bf16[name, n_tokens]
                torch_us = [us for way, us in row["bf16_us"].items() if way != "transformers"]
                row["over_bf16"] = min(torch_us) / row["us"]
                row["over_decoded_first"] = row["decoded_first_us"] / row["us"]
                if "transformers" in row["bf16_us"]:
                    row["over_transformers"] = row["bf16_us"]["transformers"] / row["us"]
            rows.append(row)
            del gguf, planar
    return bandwidth, rows, left


def judge(rows: Sequence[Row]) -> list[Row]:
    """Each target that the rows can tell of, with the least figure found."""
    timed = [row for row in rows if "us" in row]
    targets: list[Row] = []

    def add(target: str, least: float, figure: str, chosen: list[Row]) -> None:
        if chosen:
            found = min(row[figure] for row in chosen)
            targets.append({"target": target, "least": least, "found": found, "met": found >= least})

    for kind, least in BANDWIDTH_TARGETS.items():
        for name in BANDWIDTH_SHAPES:
            chosen = [r for r in timed if (r["shape"], r["type"], r["tokens"]) == (name, kind, 1)]
            add(f"{name}, {kind}, 1 token: share of the copy bandwidth", least, "copy_share", chosen)
    mixes = [row for row in timed if row["type"] == "mix" and row["tokens"] <= MOST_DECODED]
    for n_tokens in sorted({row["tokens"] for row in mixes}):
        chosen = [row for row in mixes if row["tokens"] == n_tokens]
        add(f"mix, tokens: {n_tokens}, every shape: times bf16", MIX_TARGET, "over_bf16", chosen)
    add("everywhere: times dequantise-then-matmul", 1.0, "over_decoded_first", timed)
    return targets


def find_driver() -> str:
    """The version of the GPU's driver."""
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(driver, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def report(result: Row) -> list[str]:
    """The lines of RESULT.md."""
    lines = [
        f"# Expert kernels on {result['gpu']}",
        "",
        f"{introduce(result)}, driver {result['driver']}. "
        f"Copying moves {result['copy_bytes_per_s'] / 1e12:.2f} TB/s, read and written.",
        "",
        "| target | least | found | |",
        "| --- | --- | --- | --- |",
    ]
    for target in result["targets"]:
        verdict = "met" if target["met"] else "missed"
        lines.append(f"| {target['target']} | {target['least']:g} | {target['found']:.2f} | {verdict} |")
    for n_tokens in dict.fromkeys(row["tokens"] for row in result["rows"]):
        lines += [
            "",
            f"## Tokens: {n_tokens}",
            "",
            "bf16 is the fastest of torch's ways; the last three columns tell how many times faster the kernels are.",
            "",
            "| shape | type | bpw | µs | of copy bandwidth | bf16 µs | bf16 | transformers | dequantise first |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in result["rows"]:
            if row["tokens"] != n_tokens:
                continue
            place = f"| {row['shape']} | {row['type']} | {row['bpw']:.2f} |"
            if "us" not in row:
                lines.append(f"{place} wrong: error {row['error']:.1e} | | | | | |")
                continue
            best = row["over_bf16"] * row["us"]
            default = f"{row['over_transformers']:.2f}" if "over_transformers" in row else "-"
            lines.append(
                f"{place} {row['us']:.1f} | {row['copy_share']:.0%} | {best:.1f} | {row['over_bf16']:.2f} | {default} "
                f"| {row['over_decoded_first']:.2f} |"
            )
    lines += ["", *(f"- {note}" for note in result["notes"])]
    return lines


def collect_notes(result: Row, left: int) -> list[str]:
    notes = ["Not compared: llama.cpp's mul_mat_id, which needs llama.cpp built with CUDA on this machine."]
    if result["transformers"] is None:
        notes.append("transformers is not installed, so its default is not compared.")
    if left:
        notes.append(f"Not measured for want of time: {left} cases; --minutes gives more.")
    return notes


def choose(text: str, known: Sequence[str], option: str) -> list[str]:
    chosen = text.split(",")
    for name in chosen:
        if name not in known:
            raise UsageError(f"{option} {name}: expected some of {', '.join(known)}")
    return chosen


def main(words: Sequence[str], console: Console) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only whether results are right")
    parser.add_argument("--quick", action="store_true", help="1 and 512 tokens, and fewer replays")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args(words)
    arguments.shapes = choose(arguments.shapes, list(SHAPES), "--shapes")
    arguments.types = choose(arguments.types, TYPES, "--types")
    arguments.tokens = (1, 512) if arguments.quick else TOKENS
    if not torch.cuda.is_available():
        if not arguments.check:
            raise AlphaQError("there is no CUDA GPU to measure", "--check tells here whether the kernels are right")
        # Read when triton is first imported, which the kernels put off.
        os.environ["TRITON_INTERPRET"] = "1"
    if not arguments.check and arguments.output is None:
        raise UsageError("-o RESULT is missing", "it names RESULT.json and RESULT.md")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    wrong = check_operations(arguments.types, device)
    for what in wrong:
        console.error(f"wrong: {what}")
    if wrong or arguments.check:
        console.note(f"{len(wrong)} of the checked operations are wrong")
        return int(bool(wrong))
    bandwidth, rows, left = measure(arguments, device, console)
    libraries = "alphaq-gguf", "torch", "triton", "transformers", "llama-cpp-python"
    result = {
        **describe_run("bench_kernels.py", words, *libraries),
        "gpu": torch.cuda.get_device_name(device),
        "driver": find_driver(),
        "copy_bytes_per_s": bandwidth,
        "targets": judge(rows),
        "rows": rows,
    }
    result["notes"] = collect_notes(result, left)
    lines = report(result)
    write_result(arguments.output, result, lines)
    for line in lines:
        console.result(line)
    return int(any("us" not in row for row in rows))


if __name__ == "__main__":
    run(main)
