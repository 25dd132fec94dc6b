"""What each strategy's allocation costs a model: perplexity and KLD in llama.cpp, per stack and per expert.

    python tools/study_strategies.py MODEL --text FILE -o RESULT [--bpw 3,3.5,4.5] [--strategy mse,mse+gate2,...]

Only experts are quantised, and only their own bytes count: the containers in which a GGUF holds types per expert take
some more. So that the 8-bit activations of llama.cpp's quantised products blur nothing, every file is a twin: the
weights of the allocation, dequantised to F32. A strategy named `mse+gate2` has its errors weighted by that routing
mass. KLD is KL(reference || twin) per token, the reference being the unquantised model. Writes RESULT.json, RESULT.md
and RESULT.svg. Rows of an earlier or interrupted run with the same model, text and calibration are kept where they are
asked for again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from matplotlib.figure import Figure
from results import describe_run, introduce, run, write_result
from study import Reference, digest_of, write_plot

from alphaq_gguf.budget import ROUTING_MASSES
from alphaq_gguf.calibration.imatrix import ImportanceMatrix, open_importance
from alphaq_gguf.checkpoint import Source
from alphaq_gguf.console import Console
from alphaq_gguf.encode import decode_rows, encode_rows, library_version
from alphaq_gguf.errors import AlphaQError, UsageError
from alphaq_gguf.gguf_file import Field
from alphaq_gguf.pipeline import AllocationSettings, allocate, convert, open_source
from alphaq_gguf.recipe import Recipe
from alphaq_gguf.strategies import STRATEGIES

Row = dict[str, Any]


class Twin(Source):
    """`source` with its experts encoded as a recipe says, rounding weighed by `imatrix`, and decoded again."""

    def __init__(
        self, source: Source, recipe: Recipe, imatrix: ImportanceMatrix | None = None, threads: int = 1
    ) -> None:
        super().__init__(source.path, label=source.label, name=source.name)
        self.inner = source
        self.threads = threads
        self.architecture = source.architecture
        self.tensors = source.tensors
        self.types = {(unit.tensor, unit.expert): unit.qtype for unit in recipe.units}
        # The rows of a stack come one after another, and all of its importance is read at once.
        self.weights = None if imatrix is None else lru_cache(maxsize=1)(imatrix.weights)

    @property
    def fields(self) -> list[Field]:
        return self.inner.fields

    @property
    def files(self) -> list[Path]:
        return self.inner.files

    @property
    def fingerprint(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.fingerprint

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        raise NotImplementedError("a twin is written in floats only")

    def _load_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        rows = self.inner.read_rows(name, start, stop)
        shape = self.tensors[name].shape
        if len(shape) == 3:
            weights = None if self.weights is None else self.weights(name)
            for xid in range(start // shape[1], -(-stop // shape[1])):
                qtype = self.types.get((name, None), self.types.get((name, xid)))
                if qtype is not None:
                    part = rows[max(xid * shape[1] - start, 0) : (xid + 1) * shape[1] - start]
                    importance = None if weights is None else weights[xid]
                    part[:] = decode_rows(
                        encode_rows(part, qtype, self.threads, importance), qtype, shape[2], self.threads
                    )
        return rows


def key_of(row: Row) -> tuple[Any, ...]:
    return row.get("granularity"), row.get("budget"), row["strategy"]


def measure_row(
    source: Source, reference: Reference, asked: Row, arguments: argparse.Namespace, console: Console
) -> Row:
    """The allocation of one strategy, scored, or the reason why there is none."""
    name, _, mass = asked["strategy"].partition("+")
    settings = AllocationSettings(
        bpw=asked["budget"],
        strategy=name,
        granularity=asked["granularity"],
        containers=False,
        routing_mass=mass or None,
        calibration=arguments.calibration,
        imatrix=arguments.imatrix,
    )
    try:
        recipe = allocate(source, settings, cache_dir=arguments.cache_dir, threads=arguments.threads, reporter=console)
    except AlphaQError as error:
        return {**asked, "error": error.message}
    out = reference.path.with_name("twin.gguf")
    imatrix = None if arguments.imatrix is None else open_importance(arguments.imatrix, source)
    twin = Twin(source, recipe, imatrix, arguments.threads)
    convert(twin, reference.recipe, out, force=True, threads=arguments.threads)
    return {**asked, "bpw": recipe.expert_bpw, "gamma": recipe.result.get("gamma"), **reference.compare(out)}


def read_rows(path: Path, settings: dict[str, Any]) -> dict[tuple[Any, ...], Row]:
    """Finished rows of an earlier result under the same settings."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        rows = earlier["rows"] if earlier["settings"] == settings else []
        return {key_of(row): row for row in rows if "error" not in row}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def report(result: dict[str, Any]) -> list[str]:
    """The lines of RESULT.md."""
    lines = [
        f"# {result['model']}: perplexity and KLD in llama.cpp by strategy",
        "",
        f"{introduce(result)}; {result['rows'][0]['tokens']} tokens scored (second halves of windows of "
        f"{result['settings']['ctx']}); experts quantised, then decoded.",
        "",
        "| types per | budget | strategy | expert bpw | PPL | mean KLD | top-1 agreement |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    reasons: dict[str, list[str]] = {}
    for row in result["rows"]:
        if "error" in row:
            place = f"{row['strategy']} per {row['granularity']} at {row['budget']:g}"
            reasons.setdefault(row["error"], []).append(place)
            continue
        kld = f"{row['kld']:.5f} ± {row['kld_standard_error']:.5f} | {row['top1']:.4f}" if "kld" in row else "- | -"
        place = f"{row.get('granularity', '-')} | {row.get('budget', '-')} | {row['strategy']}"
        lines.append(f"| {place} | {row['bpw']:.4g} | {row['ppl']:.4f} | {kld} |")
    if reasons:
        lines += ["", "Could not run:", ""]
        lines += [f"- {', '.join(places)}: {reason}" for reason, places in reasons.items()]
    return lines + gains(result["rows"])


def gains(rows: Sequence[Row]) -> list[str]:
    """A table of what a type per expert changes in the KLD of one per stack, for each strategy and budget with both."""
    judged = {key_of(row): row for row in rows if "kld" in row}
    places = [place for granularity, *place in judged if granularity == "stack" and ("expert", *place) in judged]
    if not places:
        return []
    lines = [
        "",
        "## A type per expert against one per stack",
        "",
        "At equal budgets. Stacks are few, so that some of the budget is left, which experts can spend.",
        "",
        "| budget | strategy | KLD per stack | of bpw | KLD per expert | of bpw | change |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for budget, strategy in places:
        stack, expert = (judged[granularity, budget, strategy] for granularity in ("stack", "expert"))
        figures = " | ".join(f"{row['kld']:.5f} | {row['bpw']:.4g}" for row in (stack, expert))
        lines.append(f"| {budget} | {strategy} | {figures} | {100 * (expert['kld'] / stack['kld'] - 1):+.0f} % |")
    return lines


def plot(result: dict[str, Any]) -> Figure:
    """KLD over the bits that the experts really take, a panel per granularity and a line per strategy."""
    rows = [row for row in result["rows"] if "kld" in row]
    granularities = list(dict.fromkeys(row["granularity"] for row in rows))
    figure = Figure(figsize=(5.5 * max(1, len(granularities)), 4.5), layout="constrained")
    figure.suptitle(f"{result['model']}: mean KLD by strategy")
    strategies = list(dict.fromkeys(row["strategy"] for row in rows))
    panels = figure.subplots(1, max(1, len(granularities)), sharey=True, squeeze=False)[0]
    for panel, granularity in zip(panels, granularities, strict=False):
        for j, strategy in enumerate(strategies):
            line = [row for row in rows if row["granularity"] == granularity and row["strategy"] == strategy]
            line.sort(key=lambda row: row["bpw"])
            # Ten colours, then again with other lines; 7 markers share no divisor with them.
            style = {"color": f"C{j % 10}", "marker": "osv^DPX"[j % 7], "linestyle": ("-", "--", ":")[j // 10 % 3]}
            if line:
                values = [row["bpw"] for row in line], [row["kld"] for row in line]
                panel.plot(*values, **style, markersize=4, linewidth=1, label=strategy)
        panel.set_yscale("log")
        panel.set_title(f"one type per {granularity}", fontsize="medium")
        panel.set_xlabel("bits per expert weight")
        panel.legend(fontsize="small")
    return figure


def main(words: Sequence[str], console: Console) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bpw", default="3,3.5,4.5")
    parser.add_argument("--strategy", default=",".join(STRATEGIES))
    parser.add_argument("--granularity", default="stack,expert")
    parser.add_argument("--calibration", type=Path, help="of `alphaq-gguf calibrate`")
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cache-dir", type=Path, default=Path(platformdirs.user_cache_dir("alphaq-gguf")))
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args(words)
    strategies = arguments.strategy.split(",")
    for strategy in strategies:
        name, _, mass = strategy.partition("+")
        if name not in STRATEGIES or mass not in ("", *ROUTING_MASSES):
            known, masses = ", ".join(STRATEGIES), ", ".join(ROUTING_MASSES)
            raise UsageError(f"--strategy {strategy}: expected {known}, with + and {masses} after it or not")
    source = open_source(arguments.model)
    settings = {
        "source": source.fingerprint,
        "text": digest_of(arguments.text),
        "ctx": arguments.ctx,
        "windows": arguments.windows,
        "calibration": digest_of(arguments.calibration),
        "imatrix": digest_of(arguments.imatrix),
        "encoder": library_version(),
        "llama-cpp-python": version("llama-cpp-python"),
    }
    asked: list[Row] = [
        {"strategy": strategy, "granularity": granularity, "budget": budget}
        for granularity, budget, strategy in product(
            arguments.granularity.split(","), map(float, arguments.bpw.split(",")), strategies
        )
    ]
    known = read_rows(arguments.output.with_name(arguments.output.name + ".json"), settings)
    made = describe_run("study_strategies.py", words, "alphaq-gguf", "llama-cpp-python")
    result = {**made, "model": source.name, "settings": settings, "rows": []}
    floats: Row = {"strategy": "f32", "bpw": 32.0}
    done = {key_of(row): known[key_of(row)] for row in (floats, *asked) if key_of(row) in known}
    with tempfile.TemporaryDirectory() as scratch:
        reference = None
        with console.task("Strategies", len(asked), "allocations") as advance:
            for row in asked:
                if key_of(row) not in done:
                    if reference is None:
                        reference = Reference(
                            source,
                            arguments.text,
                            n_ctx=arguments.ctx,
                            n_windows=arguments.windows,
                            scratch=Path(scratch),
                            threads=arguments.threads,
                            reporter=console,
                        )
                        done[key_of(floats)] = {**floats, "tokens": reference.n_tokens, "ppl": reference.ppl}
                    done[key_of(row)] = measure_row(source, reference, row, arguments, console)
                    result["rows"] = [done[key_of(row)] for row in (floats, *asked) if key_of(row) in done]
                    write_result(arguments.output, result, report(result))
                advance(1)
    result["rows"] = [done[key_of(row)] for row in (floats, *asked)]
    lines = report(result)
    write_result(arguments.output, result, lines)
    write_plot(arguments.output, plot(result))
    for line in lines:
        console.result(line)


if __name__ == "__main__":
    run(main)
