"""What each strategy's allocation costs a model: perplexity and KLD in llama.cpp, per stack and per expert.

    python tools/study_strategies.py MODEL --text FILE -o RESULT [--bpw 3,3.5,4.5] [--strategy mse,mse+gate2,...]

Only experts are quantised. So that types per expert, which no GGUF can hold, compare with types per stack, and the
8-bit activations of llama.cpp's quantised products blur neither, every file is a twin: the weights of the
allocation, dequantised to F32. A strategy named `mse+gate2` has its errors weighted by that routing mass. KLD is
KL(reference || twin) per token, the reference being the unquantised model. Writes RESULT.json and RESULT.md.
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
from itertools import product
from pathlib import Path

import numpy as np

from alphaq_gguf.checkpoint import Source
from alphaq_gguf.console import Console
from alphaq_gguf.encode import decode_rows, encode_rows
from alphaq_gguf.errors import AlphaQError
from alphaq_gguf.evaluate.llama import LlamaModel
from alphaq_gguf.gguf_file import Field
from alphaq_gguf.pipeline import AllocationSettings, allocate, convert, open_source
from alphaq_gguf.qtypes import QType
from alphaq_gguf.recipe import Recipe
from alphaq_gguf.strategies import STRATEGIES


class Twin(Source):
    """`source` with its experts encoded as a recipe says and decoded again."""

    def __init__(self, source: Source, recipe: Recipe) -> None:
        super().__init__(source.path, label=source.label, name=source.name)
        self.inner = source
        self.architecture = source.architecture
        self.tensors = source.tensors
        self.types = {(unit.tensor, unit.expert): unit.qtype for unit in recipe.units}

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
            for xid in range(start // shape[1], -(-stop // shape[1])):
                qtype = self.types.get((name, None), self.types.get((name, xid)))
                if qtype is not None:
                    part = rows[max(xid * shape[1] - start, 0) : (xid + 1) * shape[1] - start]
                    part[:] = decode_rows(encode_rows(part, qtype), qtype, shape[2])
        return rows


def score(path: Path, windows: list[list[int]], reference: Path | None, scratch: Path) -> dict[str, float]:
    """Perplexity over the second halves of `windows`; KLD against the reference's stored log-probabilities.

    Without `reference` the file's own log-probabilities are stored in `scratch` for later calls.
    """
    losses, divergences, same = [], [], []
    with LlamaModel(path, n_ctx=len(windows[0]), threads=os.cpu_count(), exact=True) as model:
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
    parser.add_argument("--strategy", default=",".join(STRATEGIES))
    parser.add_argument("--granularity", default="stack,expert")
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
        as_floats = allocate(source, AllocationSettings(bpw=32, overrides=floats), cache_dir=cache)
        convert(source, as_floats, reference)
        with LlamaModel(reference, n_ctx=arguments.ctx) as model:
            text = arguments.text.read_text(encoding="utf-8")
            windows = model.windows(text, arguments.ctx)[: arguments.windows]
        rows.append({"strategy": "f32", "bpw": 32.0, **score(reference, windows, None, scratch)})
        for granularity, budget, strategy in product(
            arguments.granularity.split(","), map(float, arguments.bpw.split(",")), arguments.strategy.split(",")
        ):
            name, _, mass = strategy.partition("+")
            settings = AllocationSettings(bpw=budget, strategy=name, granularity=granularity, routing_mass=mass or None)
            try:
                recipe = allocate(source, settings, cache_dir=cache, threads=os.cpu_count() or 1, reporter=console)
            except AlphaQError as error:
                console.note(f"{strategy} per {granularity}: {error.message}")
                continue
            out = scratch / "out.gguf"
            convert(Twin(source, recipe), as_floats, out, force=True, threads=os.cpu_count() or 1)
            found = {"strategy": strategy, "granularity": granularity, "budget": budget, "bpw": recipe.expert_bpw}
            found |= {"gamma": recipe.result.get("gamma"), **score(out, windows, reference, scratch)}
            rows.append(found)
            console.note(json.dumps(found))
    result = {
        # Names without their directories, which mean nothing on another machine.
        "command": " ".join(["python", "tools/study_strategies.py", *(Path(word).name for word in sys.argv[1:])]),
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
        f"# {source.path.name}: perplexity and KLD in llama.cpp by strategy",
        "",
        f"`{result['command']}`, {result['date']}, {result['machine']}, llama-cpp-python {result['llama-cpp-python']}; "
        f"{len(windows)} windows of {arguments.ctx} tokens, second halves scored; experts quantised, then decoded.",
        "",
        "| types per | budget | strategy | expert bpw | PPL | mean KLD | top-1 agreement |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        kld = f"{row['kld']:.5f} ± {row['kld_standard_error']:.5f} | {row['top1']:.4f}" if "kld" in row else "- | -"
        place = f"{row.get('granularity', '-')} | {row.get('budget', '-')} | {row['strategy']}"
        lines.append(f"| {place} | {row['bpw']:.4g} | {row['ppl']:.4f} | {kld} |")
    arguments.output.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
