"""What predicts how much a model suffers when one of its experts is quantised?

    python tools/study_sensitivity.py MODEL --text FILE -o RESULT [--qtype Q2_K] [--calibration FILE] [--experts N]

Quantises one expert at a time, all its projections, everything else float, and measures the mean KLD against the
float model in llama.cpp. Its rank correlation with everything a strategy can know of an expert says whether that
has the sign its paper claims on this model. Weights are decoded again, so that 8-bit activations of quantised products
play no part. Writes RESULT.json, RESULT.md and RESULT.svg; RESULT.csv holds the experts measured so far, and is used
again by later runs with the same model, type and text. The float copy lies in a temporary directory ($TMPDIR).
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from matplotlib.figure import Figure
from results import describe_run, introduce, run, write_result
from scipy.stats import rankdata
from study import Reference, digest_of, write_plot

from alphaq_gguf.calibration import Calibration
from alphaq_gguf.calibration.data import WHOLE
from alphaq_gguf.calibration.imatrix import is_draft
from alphaq_gguf.calibration.store import load_calibration
from alphaq_gguf.checkpoint import ExpertMatrix, Source
from alphaq_gguf.console import Console
from alphaq_gguf.encode import decode_rows, encode_rows, library_version
from alphaq_gguf.errors import AlphaQError, UsageError
from alphaq_gguf.gguf_file import read_header
from alphaq_gguf.ledger import Ledger
from alphaq_gguf.measure import measure
from alphaq_gguf.measurements import AlphaSettings, DistortionSettings, key_of
from alphaq_gguf.pipeline import open_source
from alphaq_gguf.qtypes import QType, parse_qtype, stock_substitute
from alphaq_gguf.reporter import Reporter
from alphaq_gguf.routing import read_routers, simulate
from alphaq_gguf.signals import router_norms

COLUMNS = ("layer", "expert", "kld", "kld_standard_error", "tokens")
SIGNIFICANT = 0.05
PERMUTATIONS = 9999

Expert = tuple[int, int]
"""(layer, expert)."""
Values = dict[Expert, float | None]

# What each signal is, the sign its source claims for its correlation with sensitivity, and that source.
SIGNALS = {
    "alpha": ("alpha, median of the matrices", -1, "AlphaQ, arXiv 2606.04980"),
    "squared_error": ("squared encoding error", +1, "control `mse`"),
    "router_norm": ("router norm", -1, "arXiv 2604.06515"),
    "row_variance": ("MaxVar, largest row variance", +1, "arXiv 2604.06515"),
    "simulated_count": ("simulated routing, count", +1, "`sim-routing`"),
    "simulated_gate2": ("simulated routing, mean squared gate", +1, "`sim-routing`"),
    "tokens_routed": ("tokens routed", +1, "PMQ"),
    "squared_gate": ("mean squared gate", +1, "this project"),
    "significance": ("significance", +1, "MoQa, arXiv 2503.21135"),
    "block_error": ("change of the block's output", +1, "PMQ"),
}


def experts_of(source: Source) -> dict[Expert, list[ExpertMatrix]]:
    """The matrices of every expert, by layer and expert; without layers that only draft tokens, which do not run."""
    found: dict[Expert, list[ExpertMatrix]] = {}
    for stack in source.stacks:
        if is_draft(source, stack.bid):
            continue
        for matrix in stack.matrices:
            found.setdefault((stack.bid, matrix.xid), []).append(matrix)
    return dict(sorted(found.items()))


@contextmanager
def encoded(path: Path, matrices: Sequence[ExpertMatrix], qtype: QType, threads: int = 1) -> Iterator[None]:
    """The F32 file at `path` with these matrices encoded as `qtype`, or what fits their rows, and decoded again.

    Only their bytes are touched, and put back on exit.
    """
    header = read_header(path)
    places = []
    for matrix in matrices:
        offset = header.data_offset + header.tensors[matrix.stack].offset + 4 * matrix.start * matrix.n_cols
        places.append(np.memmap(path, "<f4", "r+", offset, (matrix.n_rows, matrix.n_cols)))
    floats = [np.array(place) for place in places]
    try:
        for place, rows in zip(places, floats, strict=True):
            fitting = stock_substitute(qtype, rows.shape[1])
            place[:] = decode_rows(encode_rows(rows, fitting, threads), fitting, rows.shape[1], threads)
        yield
    finally:
        for place, rows in zip(places, floats, strict=True):
            place[:] = rows


def measure_sensitivity(
    source: Source, experts: dict[Expert, list[ExpertMatrix]], settings: argparse.Namespace, reporter: Reporter
) -> dict[Expert, dict[str, float]]:
    """KLD, its standard error and the tokens scored, for each expert; only what the ledger lacks is measured."""
    header = {
        "measured": "sensitivity of experts",
        "source": source.fingerprint,
        "qtype": settings.qtype.name,
        "text": digest_of(settings.text),
        "ctx": settings.ctx,
        "windows": settings.windows,
        "encoder": library_version(),
        "llama-cpp-python": version("llama-cpp-python"),
    }
    ledger = Ledger(settings.output.with_name(settings.output.name + ".csv"), header, COLUMNS)

    def parse(row: dict[str, str]) -> tuple[Expert, dict[str, float]]:
        values = {"kld": float(row["kld"]), "kld_standard_error": float(row["kld_standard_error"])}
        return (int(row["layer"]), int(row["expert"])), values | {"tokens": int(row["tokens"])}

    found = dict(ledger.parsed(parse))
    todo = {expert: matrices for expert, matrices in experts.items() if expert not in found}
    if todo:
        with tempfile.TemporaryDirectory() as scratch:
            reference = Reference(
                source,
                settings.text,
                n_ctx=settings.ctx,
                n_windows=settings.windows,
                scratch=Path(scratch),
                threads=settings.threads,
                reporter=reporter,
            )
            with reporter.task("Quantising one by one", len(todo), "experts") as advance:
                try:
                    for (bid, xid), matrices in todo.items():
                        with encoded(reference.path, matrices, settings.qtype, settings.threads):
                            scored = reference.compare(reference.path)
                        row = {"layer": bid, "expert": xid, "tokens": reference.n_tokens, **scored}
                        found |= [parse(ledger.append(row))]
                        advance(1)
                except BaseException:
                    ledger.close(complete=False)
                    raise
    ledger.close(complete=True)
    return {expert: found[expert] for expert in experts}


def weight_signals(
    source: Source, qtype: QType, cache_dir: Path, threads: int, reporter: Reporter
) -> tuple[dict[str, Values], dict[str, str]]:
    """What weights alone tell of every expert, and of signals that cannot be had, why."""
    measured = measure(
        source,
        alphas=AlphaSettings(),
        distortion=DistortionSettings(),
        qtypes={stack.name: (stock_substitute(qtype, stack.n_cols),) for stack in source.stacks},
        row_variances=True,
        cache_dir=cache_dir,
        threads=threads,
        reporter=reporter,
    )
    found: dict[str, Values] = {"alpha": {}, "squared_error": {}, "row_variance": {}}
    for expert, matrices in experts_of(source).items():
        keys = [(key_of(m), stock_substitute(qtype, m.n_cols)) for m in matrices]
        alphas = [alpha for key, _ in keys if (alpha := measured.alphas[key].alpha) is not None]
        found["alpha"][expert] = float(np.median(alphas)) if alphas else None
        found["squared_error"][expert] = sum(measured.distortions[key].squared_error for key in keys)
        found["row_variance"][expert] = next(v for key, _ in keys if (v := measured.row_variances.get(key)) is not None)
    try:
        masses = {bid: simulate(router, seed=bid) for bid, router in read_routers(source).items()}
    except AlphaQError as error:
        return found, dict.fromkeys(("router_norm", "simulated_count", "simulated_gate2"), error.message)
    found["router_norm"] = {**router_norms(source, None)}
    found["simulated_count"] = {(b, x): float(v) for b, mass in masses.items() for x, v in enumerate(mass.count)}
    found["simulated_gate2"] = {(b, x): float(v) for b, mass in masses.items() for x, v in enumerate(mass.gate2)}
    return found, {}


def calibrated_signals(
    calibration: Calibration, experts: Sequence[Expert], qtype: QType
) -> tuple[dict[str, Values], dict[str, str]]:
    """What text tells of these experts, and of signals that the calibration lacks, why."""
    tables = {
        "tokens_routed": calibration.frequency,
        "squared_gate": calibration.squared_gate,
        "significance": lambda bid: calibration.significance(bid).mean(axis=0),
    }
    found: dict[str, Values] = {}
    absent: dict[str, str] = {}
    for name, table in tables.items():
        try:
            found[name] = {(bid, xid): float(table(bid)[xid]) for bid, xid in experts}
        except AlphaQError as error:
            absent[name] = error.message
    errors: Values = {expert: calibration.block_errors.get((*expert, WHOLE, qtype)) for expert in experts}
    if any(error is not None for error in errors.values()):
        found["block_error"] = errors
    else:
        absent["block_error"] = f"{calibration.label}: no errors of whole experts as {qtype.name}"
    return found, absent


def rank_correlation(rows: Sequence[dict[str, Any]], name: str) -> tuple[float, float] | None:
    """Spearman's correlation of a signal with the KLD, and its p-value; None where there is nothing to rank.

    p is the share of seeded random permutations with a correlation as strong, exact enough for few experts too.
    """
    pairs = np.array([(row[name], row["kld"]) for row in rows if row[name] is not None])
    if len(pairs) < 3 or (pairs.max(axis=0) == pairs.min(axis=0)).any():
        return None
    ranks = rankdata(pairs, axis=0)
    x, y = ((ranks - ranks.mean(axis=0)) / ranks.std(axis=0)).T
    rho = float(x @ y) / len(x)
    shuffled = np.random.default_rng(0).permuted(np.tile(y, (PERMUTATIONS, 1)), axis=1) @ x / len(x)
    as_strong = int((np.abs(shuffled) > abs(rho) - 1e-9).sum())
    return rho, (1 + as_strong) / (1 + PERMUTATIONS)


def judge(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """A signal's correlation over all experts, the mean of those within layers, and whether its claim holds."""
    _, claim, source = SIGNALS[name]
    overall = rank_correlation(rows, name)
    layers = sorted({row["layer"] for row in rows})
    within = [rank_correlation([row for row in rows if row["layer"] == bid], name) for bid in layers]
    single = [correlation[0] for correlation in within if correlation is not None]
    rho, p = overall if overall is not None else (None, None)
    verdict = "undecided"
    if rho is not None and p is not None and p < SIGNIFICANT:
        verdict = "agrees" if rho * claim > 0 else "opposite"
    return {
        "signal": name,
        "claim": claim,
        "source": source,
        "experts": sum(row[name] is not None for row in rows),
        "spearman": rho,
        "p": p,
        "within_layers": float(np.mean(single)) if single else None,
        "verdict": verdict,
    }


def report(result: dict[str, Any]) -> list[str]:
    """The lines of RESULT.md."""
    rows = result["rows"]
    lines = [
        f"# {result['model']}: what predicts how sensitive an expert is",
        "",
        f"{introduce(result)}; {rows[0]['tokens']} tokens scored (second halves of windows of {result['ctx']}).",
        "",
        f"Sensitivity is the mean KLD against the float model when one expert alone is {result['qtype']} (decoded "
        f"again), for {len(rows)} of {result['n_experts']} experts. Spearman's rank correlation with it is over all "
        f"of them, and the mean of those within a layer; a claim is decided where p < {SIGNIFICANT}.",
        "",
        "| signal | claimed sign | Spearman | p | within layers | this model |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for found in result["signals"]:
        label, claim, source = SIGNALS[found["signal"]]
        numbers = [format_optional(found[key], spec) for key, spec in (("spearman", "+.2f"), ("p", ".2g"))]
        numbers.append(format_optional(found["within_layers"], "+.2f"))
        sign = "positive" if claim > 0 else "negative"
        lines.append(f"| {label} | {sign} ({source}) | {' | '.join(numbers)} | {found['verdict']} |")
    lines += [f"\nNot known: {SIGNALS[name][0]}: {reason}." for name, reason in result["absent"].items()]
    return lines


def format_optional(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def plot(result: dict[str, Any]) -> Figure:
    """KLD over each signal, experts coloured by layer."""
    rows, signals = result["rows"], result["signals"]
    n_columns = min(4, len(signals))
    n_lines = -(-len(signals) // n_columns)
    figure = Figure(figsize=(3.2 * n_columns, 2.8 * n_lines), layout="constrained")
    figure.suptitle(f"{result['model']}: one expert {result['qtype']}, mean KLD; colours are layers")
    for i, found in enumerate(signals):
        panel = figure.add_subplot(n_lines, n_columns, i + 1)
        known = [row for row in rows if row[found["signal"]] is not None]
        panel.scatter(
            [row[found["signal"]] for row in known],
            [row["kld"] for row in known],
            c=[row["layer"] for row in known],
            cmap="viridis",
            s=12,
        )
        # Experts that no token reaches have no divergence; they lie on the lower edge.
        panel.set_yscale("log", nonpositive="clip")
        panel.minorticks_off()
        panel.locator_params(axis="x", nbins=4)
        panel.set_title(f"Spearman {format_optional(found['spearman'], '+.2f')}", fontsize="medium")
        panel.set_xlabel(SIGNALS[found["signal"]][0])
    return figure


def main(words: Sequence[str], console: Console) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--qtype", type=parse_qtype, default=QType.Q2_K)
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--windows", type=int, default=50)
    parser.add_argument("--calibration", type=Path, help="of `alphaq-gguf calibrate`, or an imatrix.gguf")
    parser.add_argument("--experts", type=int, help="measure only so many experts, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="of that choice")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cache-dir", type=Path, default=Path(platformdirs.user_cache_dir("alphaq-gguf")))
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args(words)
    source = open_source(arguments.model)
    source.require_experts()
    experts = experts_of(source)
    n_experts = len(experts)
    if arguments.experts is not None:
        if not 3 <= arguments.experts <= n_experts:
            raise UsageError(f"--experts {arguments.experts}: expected 3 to {n_experts}")
        chosen = np.random.default_rng(arguments.seed).permutation(n_experts)[: arguments.experts]
        experts = {expert: experts[expert] for i, expert in enumerate(list(experts)) if i in chosen}
    signals, absent = weight_signals(source, arguments.qtype, arguments.cache_dir, arguments.threads, console)
    if arguments.calibration is not None:
        calibration = load_calibration(arguments.calibration, source)
        for remark in calibration.remarks:
            console.warn(remark)
        more, lacking = calibrated_signals(calibration, list(experts), arguments.qtype)
        signals, absent = signals | more, absent | lacking
    sensitivity = measure_sensitivity(source, experts, arguments, console)
    rows = [
        {"layer": bid, "expert": xid, **found, **{name: values[bid, xid] for name, values in signals.items()}}
        for (bid, xid), found in sensitivity.items()
    ]
    result = {
        **describe_run("study_sensitivity.py", words, "alphaq-gguf", "llama-cpp-python"),
        "model": source.name,
        "qtype": arguments.qtype.name,
        "ctx": arguments.ctx,
        "n_experts": n_experts,
        "absent": absent,
        "signals": [judge(rows, name) for name in SIGNALS if name in signals],
        "rows": rows,
    }
    lines = report(result)
    write_result(arguments.output, result, lines)
    write_plot(arguments.output, plot(result))
    for line in lines:
        console.result(line)


if __name__ == "__main__":
    run(main)
