"""Convert a model at several budgets with several strategies and measure perplexity and KLD in llama.cpp.

    python tools/study_budgets.py MODEL --text FILE --bpw 3,3.5,4.5 --strategy alphaq,mse,uniform -o RESULT

Only expert stacks are quantised (all other tensors F32), so that differences are the allocation's.
KLD is KL(reference || file) per token, the reference being the same model as an F32 GGUF. Writes
RESULT.json and RESULT.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np

from alphaq_gguf.console import Console
from alphaq_gguf.evaluate.llama import LlamaModel
from alphaq_gguf.pipeline import AllocationSettings, allocate, convert, open_source
from alphaq_gguf.qtypes import QType


def score(path: Path, windows: list[list[int]], reference: Path | None, scratch: Path) -> dict[str, float]:
    """Perplexity over the second halves of `windows`; KLD against the reference's stored log-probabilities.

    Without `reference` the file's own log-probabilities are stored in `scratch` for later calls.
    """
    losses, divergences, same = [], [], []
    with LlamaModel(path, n_ctx=len(windows[0]), threads=os.cpu_count()) as model:
        for i, window in enumerate(windows):
            logp, loss = model.score(window)
            losses.append(loss)
            stored = scratch / f"{i}.npy"
            if reference is None:
                np.save(stored, logp.astype(np.float32))
            else:
                base = np.load(stored).astype(np.float64)
                divergences.append((np.exp(base) * (base - logp)).sum(axis=1))
                same.append(base.argmax(axis=1) == logp.argmax(axis=1))
    found = {"ppl": float(np.exp(np.concatenate(losses).mean()))}
    if reference is not None:
        kld = np.concatenate(divergences)
        found |= {
            "kld": float(kld.mean()),
            "kld_standard_error": float(kld.std() / np.sqrt(len(kld))),
            "top1": float(np.concatenate(same).mean()),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bpw", default="3,3.5,4.5")
    parser.add_argument("--strategy", default="alphaq,mse,uniform")
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    console = Console()
    source = open_source(arguments.model)
    rows = []
    floats = ((r"\.weight$", QType.F32),)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        cache = scratch / "cache"
        reference = scratch / "f32.gguf"
        convert(source, allocate(source, AllocationSettings(bpw=32, overrides=floats), cache_dir=cache), reference)
        with LlamaModel(reference, n_ctx=arguments.ctx) as model:
            text = arguments.text.read_text(encoding="utf-8")
            windows = model.windows(text, arguments.ctx)[: arguments.windows]
        rows.append({"strategy": "f32", "bpw": 32.0, **score(reference, windows, None, scratch)})
        others = ((r"^(?!.*_exps\.).*\.weight$", QType.F32),)
        for budget in map(float, arguments.bpw.split(",")):
            for strategy in arguments.strategy.split(","):
                settings = AllocationSettings(bpw=budget, strategy=strategy, overrides=others)
                recipe = allocate(source, settings, cache_dir=cache, threads=os.cpu_count() or 1, reporter=console)
                out = scratch / "out.gguf"
                convert(source, recipe, out, force=True, threads=os.cpu_count() or 1)
                found = {"strategy": strategy, "budget": budget, "bpw": recipe.expert_bpw}
                found |= {"gamma": recipe.result.get("gamma"), **score(out, windows, reference, scratch)}
                rows.append(found)
                console.note(json.dumps(found))
    result = {
        # Names without their directories, which mean nothing on another machine.
        "command": " ".join(["python", "tools/study_budgets.py", *(Path(word).name for word in sys.argv[1:])]),
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "llama-cpp-python": version("llama-cpp-python"),
        "model": source.path.name,
        "windows": len(windows),
        "ctx": arguments.ctx,
        "rows": rows,
    }
    arguments.output.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    lines = [
        f"# {source.path.name}: perplexity and KLD in llama.cpp by budget and strategy",
        "",
        f"`{result['command']}`, {result['date']}, {result['machine']}, llama-cpp-python {result['llama-cpp-python']}; "
        f"{len(windows)} windows of {arguments.ctx} tokens, second halves scored; only expert stacks quantised.",
        "",
        "| strategy | budget | expert bpw | PPL | mean KLD | top-1 agreement |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        kld = f"{row['kld']:.5f} ± {row['kld_standard_error']:.5f} | {row['top1']:.4f}" if "kld" in row else "- | -"
        lines.append(f"| {row['strategy']} | {row.get('budget', '-')} | {row['bpw']:.4g} | {row['ppl']:.4f} | {kld} |")
    arguments.output.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
