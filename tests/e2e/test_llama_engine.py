"""What is gathered from llama.cpp while it runs equals what transformers and llama-imatrix see of the same windows."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import LAYOUTS, LITE, build_moe
from gguf import GGUFReader
from oracles import llama_cpp_sources

from alphaq_gguf.calibration import llama_engine
from alphaq_gguf.calibration.llama_engine import collect
from alphaq_gguf.calibration.statistics import LayerSums
from alphaq_gguf.checkpoint import open_source
from alphaq_gguf.checkpoint.gguf import GGUFSource
from alphaq_gguf.errors import AlphaQError
from alphaq_gguf.evaluate import watch
from alphaq_gguf.evaluate.llama import LlamaModel
from alphaq_gguf.evaluate.watch import Watch
from alphaq_gguf.reporter import Silent

Collected = dict[int, tuple[LayerSums, Any]]
DATASETS = np.array([0, 1, 0])


def windows_of(n_ctx: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 390, (len(DATASETS), n_ctx))


def convert(cli: Callable, source: Path, out: Path, *options: object) -> Path:
    code, _, err = cli("convert", source, "-o", out, *(options or ("--bpw", 32, "--tensor-type", r"\.weight$=F32")))
    assert code == 0, err
    return out


def run(path: Path, windows: np.ndarray, work_dir: Path, sample: np.ndarray | None = None, **options: Any) -> Collected:
    work_dir.mkdir(exist_ok=True)
    chosen = np.arange(windows.size) if sample is None else sample
    dataset_of = np.arange(len(windows)) % 2
    source = GGUFSource(path, allow_requantize=True)
    return collect(path, source, windows, dataset_of, 2, chosen, work_dir, threads=1, **options)


def softmax(logits: Any) -> Any:
    return logits.softmax(-1)


def sigmoid(logits: Any) -> Any:
    return logits.sigmoid()


# How each family's logits become scores; None where only those of chosen experts do, which are then the gates.
SCORES: dict[str, Callable | None] = {
    "Qwen2Moe": softmax,
    "Qwen3Moe": softmax,
    "Qwen3Next": softmax,
    "Mixtral": softmax,
    "DeepseekV3": sigmoid,
    "Llama4": sigmoid,
    "Llama4 with one expert": sigmoid,
    "GraniteMoe": softmax,
    "GptOss": None,
}


VARIANTS = {**LAYOUTS, "Llama4 with one expert": {"family": "Llama4", "num_experts_per_tok": 1}}


class Seen:
    """What transformers computes in the layers of one window, by layer: recorded, not recomputed.

    `inputs` [T, H] of the block, `gates` [T, E], 0 where not chosen, `scores` [T, E]; by projection the rows that
    each expert multiplies, in `operands[bid][proj][expert]`.
    """

    def __init__(self, model: Any, score: Callable | None, tokens: np.ndarray) -> None:
        import torch
        from torch.overrides import TorchFunctionMode

        self.inputs: dict[int, np.ndarray] = {}
        self.gates: dict[int, np.ndarray] = {}
        self.scores: dict[int, np.ndarray] = {}
        self.chosen: dict[int, np.ndarray] = {}
        self.operands: dict[int, dict[str, dict[int, np.ndarray]]] = {}
        stacks = {
            name: p
            for name, p in model.named_parameters()
            if ".experts." in name and name.endswith(("gate_up_proj", "down_proj"))
        }

        def record(bid: int, module: Any, inputs: Any, output: Any) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            n_experts = len(module.weight)
            if len(output) == 2:
                gates = output[0]
            else:
                gates = torch.zeros(len(x), n_experts).scatter(1, output[2], output[1])
                self.chosen[bid] = output[2].numpy()
            logits = x @ module.weight.T
            self.inputs[bid], self.gates[bid] = x.numpy(), gates.numpy()
            self.scores[bid] = (gates if score is None else score(logits)).numpy()

        outer = self

        class Multiplications(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func in (torch.nn.functional.linear, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm):
                    x, weight = args[:2]
                    for name, stack in stacks.items():
                        xid, rest = divmod(weight.data_ptr() - stack.data_ptr(), 4 * stack[0].numel())
                        if 0 <= xid < len(stack) and rest == 0:
                            bid, proj = int(name.split(".")[2]), name.rsplit(".", 1)[1]
                            rows = enumerate(x.numpy()) if func is torch.bmm else [(xid, x.numpy())]
                            outer.operands.setdefault(bid, {}).setdefault(proj, {}).update(rows)
                return func(*args, **(kwargs or {}))

        hooks = [
            module.register_forward_hook(partial(record, int(name.split(".")[2])))
            for name, module in model.named_modules()
            if name.endswith((".gate", ".router")) and "Router" in type(module).__name__
        ]
        with torch.no_grad(), Multiplications():
            model(torch.from_numpy(tokens)[None])
        for hook in hooks:
            hook.remove()

    def squares(self, bid: int, proj: str, shape: tuple[int, int]) -> np.ndarray:
        found = np.zeros(shape)
        for xid, rows in self.operands[bid][proj].items():
            found[xid] = (rows.astype(np.float64) ** 2).sum(axis=0)
        return found

    def usage(self, bid: int) -> dict[str, np.ndarray]:
        """The sums of LayerUsage, by name, over the tokens of this window."""
        gates = self.gates[bid].astype(np.float64)
        chosen = gates > 0
        return {
            "tokens": chosen.sum(axis=0),
            "gates": gates.sum(axis=0),
            "squared_gates": (gates**2).sum(axis=0),
            "scores": (self.scores[bid] * chosen).sum(axis=0),
            "activations": self._activations(bid, chosen.astype(np.float64)),
            "significance": self._activations(bid, gates),
        }

    def _activations(self, bid: int, weights: np.ndarray) -> np.ndarray:
        """Mean absolute intermediate activations times `weights` [T, E], summed by expert."""
        found = np.zeros(weights.shape[1])
        for xid, rows in self.operands[bid]["down_proj"].items():
            tokens = np.arange(len(rows))
            if bid in self.chosen:
                # Those of an expert are in the order of its place among the token's choices.
                tokens = np.nonzero(np.equal(self.chosen[bid].T, xid))[1]
            found[xid] = np.abs(rows.astype(np.float64)).mean(axis=1) @ weights[tokens, xid]
        return found


@pytest.mark.parametrize("layout", SCORES)
def test_what_is_gathered_is_what_transformers_computes(layout: str, tmp_path: Path, cli) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    directory = build_moe(tmp_path / "model", **VARIANTS[layout])
    gguf = convert(cli, directory, tmp_path / "f32.gguf")
    # More tokens than llama.cpp takes at once, for one of them.
    windows = windows_of(600 if layout == "Mixtral" else 40)
    collected = run(gguf, windows, tmp_path / "work")
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    seen = [Seen(model, SCORES[layout], window) for window in windows]
    assert collected.keys() == seen[0].gates.keys()
    for bid, (sums, sample) in collected.items():
        gates = np.concatenate([s.gates[bid] for s in seen])
        inputs = np.concatenate([s.inputs[bid] for s in seen])
        # Float32 in another order; of 600 tokens one is further off than the rest.
        assert np.abs(sample.inputs - inputs).max() < 5e-4 * np.sqrt((inputs**2).mean())
        found = np.zeros(gates.shape)
        np.put_along_axis(found, sample.chosen.astype(np.int64), sample.gates.astype(np.float64), axis=1)
        assert ((found > 0) == (gates > 0)).all()
        assert np.abs(found - gates).max() < 5e-4
        assert np.median(np.abs(found - gates).max(axis=1)) < 1e-6
        assert sample.share == 1
        usage = [s.usage(bid) for s in seen]
        for name in usage[0]:
            expected = [sum(u[name] for u, d in zip(usage, DATASETS, strict=True) if d == i) for i in range(2)]
            np.testing.assert_allclose(getattr(sums.usage, name), expected, rtol=1e-4, atol=1e-5, err_msg=name)
        for name, moments in sums.moments.items():
            proj = "down_proj" if "down" in name else "gate_up_proj"
            squares = sum(s.squares(bid, proj, moments.sums.shape) for s in seen)
            np.testing.assert_allclose(moments.sums, squares, rtol=1e-4, atol=1e-6 * squares.max(), err_msg=name)
            assert (moments.counts == (gates > 0).sum(axis=0)).all()
        assert {name.split("_")[1] for name in sums.moments} == {"gate", "up", "down"}


def imatrix_tool() -> Path:
    tool = llama_cpp_sources() / "build/bin/llama-imatrix"
    if not tool.is_file():
        pytest.skip("llama-imatrix is not built")
    return tool


@pytest.mark.parametrize(
    ("model", "n_ctx", "options"),
    [("trained", 192, ()), ("trained", 700, ("--bpw", 4.5)), ("with BOS", 64, ())],
)
def test_counts_and_moments_are_those_of_llama_imatrix(
    model: str, n_ctx: int, options: tuple, trained: Path, heldout: str, tmp_path: Path, cli
) -> None:
    tool = imatrix_tool()
    source = trained if model == "trained" else build_moe(tmp_path / "model", family="Ernie4_5_Moe")
    gguf = convert(cli, source, tmp_path / "model.gguf", *options)
    text, theirs = tmp_path / "text.txt", tmp_path / "imatrix.gguf"
    text.write_text(heldout[:12000], encoding="utf-8")
    command = [tool, "-m", gguf, "-f", text, "-o", theirs, "-c", n_ctx, "-b", min(n_ctx, 512), "--chunks", 2, "-t", 1]
    # As LlamaModel runs it: no rounding of the cache, no repacked weights.
    command += ["-fa", "off", "-ctk", "f32", "-ctv", "f32", "--no-repack", "--no-ppl"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

    with LlamaModel(gguf, n_ctx=16, threads=1) as opened:
        assert (opened.bos is not None) == (model == "with BOS")
        windows = np.array(opened.windows(text.read_text(encoding="utf-8"), n_ctx)[:2])
    collected = run(gguf, windows, tmp_path / "work", np.empty(0, np.int64))
    expected = {t.name: t.data for t in GGUFReader(theirs).tensors if "_exps" in t.name}
    ours = {name: moments for sums, _ in collected.values() for name, moments in sums.moments.items()}
    assert {name.rsplit(".", 1)[0] for name in expected} == ours.keys()
    for name, moments in ours.items():
        np.testing.assert_array_equal(moments.counts, expected[f"{name}.counts"].ravel())
        np.testing.assert_allclose(moments.sums, expected[f"{name}.in_sum2"], rtol=2e-5)
    assert all(sample is None for _, sample in collected.values())


@pytest.fixture(scope="module")
def tiny_gguf(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from alphaq_gguf.cli import main

    out = tmp_path_factory.mktemp("tiny-gguf") / "f32.gguf"
    cache = tmp_path_factory.mktemp("tiny-cache")
    arguments = ["convert", tiny, "-o", out, "--bpw", 32, "--tensor-type", r"\.weight$=F32", "--cache-dir", cache]
    assert main([str(argument) for argument in arguments]) == 0
    return out


class Killing(Silent):
    """Breaks off after `n` windows, and remembers how far the run got."""

    def __init__(self, n: int) -> None:
        self.left = n
        self.steps: list[int] = []

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        def advance(amount: int) -> None:
            self.steps.append(amount)
            if len(self.steps) > self.left:
                raise KeyboardInterrupt

        yield advance


def test_a_killed_run_goes_on_and_ends_as_if_uninterrupted(tiny_gguf: Path, tmp_path: Path, monkeypatch) -> None:
    windows = np.random.default_rng(1).integers(3, 390, (6, 32))
    sample = np.sort(np.random.default_rng(2).choice(windows.size, 50, replace=False))
    whole = run(tiny_gguf, windows, tmp_path / "whole", sample)
    monkeypatch.setattr(llama_engine, "_SAVE_EVERY_S", 0)
    monkeypatch.setattr(llama_engine, "_SAVE_SHARE", 1e9)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_gguf, windows, tmp_path / "work", sample, reporter=Killing(3))
    second = Killing(99)
    resumed = run(tiny_gguf, windows, tmp_path / "work", sample, reporter=second)
    assert second.steps == [3, 1, 1, 1]
    # Nothing is left to run the third time.
    third = run(tiny_gguf, windows, tmp_path / "work", sample, reporter=Killing(0))
    for found in (resumed, third):
        assert found.keys() == whole.keys()
        for bid, (sums, tokens) in whole.items():
            for name, values in sums.arrays().items():
                np.testing.assert_array_equal(found[bid][0].arrays()[name], values, err_msg=name)
            for part in ("inputs", "chosen", "gates"):
                np.testing.assert_array_equal(getattr(found[bid][1], part), getattr(tokens, part))
            assert found[bid][1].share == tokens.share == 50 / 192


def test_samples_are_the_tokens_at_their_positions(tiny_gguf: Path, tmp_path: Path) -> None:
    windows = windows_of(32)
    positions = np.array([0, 31, 32, 70, 95])
    everything, some = run(tiny_gguf, windows, tmp_path / "a"), run(tiny_gguf, windows, tmp_path / "b", positions)
    for bid, (_, tokens) in some.items():
        np.testing.assert_array_equal(tokens.inputs, everything[bid][1].inputs[positions])
        np.testing.assert_array_equal(tokens.chosen, everything[bid][1].chosen[positions])


def test_counting_alone_counts_the_same(tiny_gguf: Path, tmp_path: Path) -> None:
    windows = windows_of(32)
    whole = run(tiny_gguf, windows, tmp_path / "a")
    counted = run(tiny_gguf, windows, tmp_path / "b", counts_only=True)
    for bid, (sums, sample) in counted.items():
        np.testing.assert_array_equal(sums.usage.tokens, whole[bid][0].usage.tokens)
        assert sample is None
        assert sums.moments == {}


def test_expert_layers_that_do_not_run_are_an_error(tmp_path: Path, cli) -> None:
    small = {**LITE, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "num_hidden_layers": 3, "draft": False}
    dense = convert(
        cli,
        build_moe(tmp_path / "a", family="DeepseekV3", **{**small, "first_k_dense_replace": 2}),
        tmp_path / "a.gguf",
    )
    other = open_source(build_moe(tmp_path / "b", family="DeepseekV3", **{**small, "first_k_dense_replace": 1}))
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(AlphaQError, match="0 of 16 tokens were seen at the experts of layer 1"):
        collect(dense, other, windows_of(16), DATASETS, 2, np.arange(3), work, threads=1)


def test_activations_that_overflow_are_an_error(tiny_gguf: Path, tmp_path: Path) -> None:
    damaged = shutil.copy(tiny_gguf, tmp_path / "damaged.gguf")
    tensors = {t.name: t.data for t in GGUFReader(damaged, "r+").tensors}
    tensors["blk.0.ffn_norm.weight"][:] = 3e38
    tensors["blk.0.ffn_norm.weight"].base.flush() if isinstance(
        tensors["blk.0.ffn_norm.weight"].base, np.memmap
    ) else None
    with pytest.raises(AlphaQError, match="activations of layer 0 are NaN or infinite"):
        run(damaged, windows_of(16), tmp_path / "work")


def test_what_a_watch_raises_surfaces_and_the_model_lives_on(tiny_gguf: Path) -> None:
    tokens = windows_of(32)[0].tolist()
    with LlamaModel(tiny_gguf, n_ctx=64, threads=1, exact=True) as model:
        expected = model.logits(tokens)
    failing = True
    shapes: list[tuple[int, ...]] = []

    def take(tensor: Any) -> None:
        if failing:
            raise ZeroDivisionError(tensor.name)
        shapes.append(tensor.array().shape)

    watching = Watch(lambda tensor: tensor.name == "ffn_moe_topk-1", take)
    with LlamaModel(tiny_gguf, n_ctx=64, threads=1, exact=True, watch=watching) as model:
        with pytest.raises(ZeroDivisionError, match="ffn_moe_topk-1"):
            model.run(tokens)
        failing = False
        np.testing.assert_array_equal(model.logits(tokens), expected)
    assert shapes == [(1, 1, 32, 2)]


def test_a_tensor_laid_out_otherwise_is_noticed(monkeypatch) -> None:
    # As if ggml had lost the field before the shape.
    fields = [field for field in watch._Fields._fields_ if field[0] != "buffer"]
    monkeypatch.setattr(watch, "_Fields", type("Other", (ctypes.Structure,), {"_fields_": fields}))
    with pytest.raises(AlphaQError, match="their layout is another"):
        watch._check_layout.__wrapped__()
