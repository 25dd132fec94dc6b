"""Engines give the logits and choose the experts that transformers does, and time what they say they time."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import LAYOUTS, LITE, build_moe

from alphaq_gguf.checkpoint.huggingface import HuggingFaceSource
from alphaq_gguf.errors import AlphaQError
from alphaq_gguf.evaluate import engines
from alphaq_gguf.evaluate.blocks import FileBlocks, RecipeBlocks
from alphaq_gguf.evaluate.engines import Engine, LlamaEngine, TorchEngine
from alphaq_gguf.evaluate.isolated import run_isolated
from alphaq_gguf.evaluate.llama import LlamaModel
from alphaq_gguf.evaluate.speed import Rate, _time, time_llama
from alphaq_gguf.evaluate.torch_model import TorchModel
from alphaq_gguf.pipeline import AllocationSettings, allocate, open_source
from alphaq_gguf.reporter import Reporter, Silent

pytestmark = pytest.mark.usefixtures("one_torch_thread")

FLOATS = ("--bpw", 32, "--tensor-type", r"\.weight$=F32")
# More than llama.cpp takes at once, for one of them.
N_TOKENS = {"Mixtral": 600}
VARIANTS = {**LAYOUTS, "DeepseekV2 thin": {"family": "DeepseekV2", **LITE}}


def tokens_for(n: int) -> list[int]:
    return np.random.default_rng(0).integers(3, 390, n).tolist()


def router_choices(model: Any, tokens: list[int]) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """What transformers' own routers choose, by layer: expert by expert whether it is chosen, [n, E]; and logits."""
    found: dict[int, np.ndarray] = {}

    def note(bid: int, module: Any, output: tuple[Any, ...]) -> None:
        n_experts = len(module.weight)
        if len(output) == 2:  # scores of all experts, 0 where not chosen
            found[bid] = output[0].numpy() > 0
        else:
            found[bid] = as_sets(output[2].numpy(), n_experts)

    for name, module in model.named_modules():
        if name.endswith((".gate", ".router")) and "Router" in type(module).__name__:
            bid = int(name.split(".")[2])
            module.register_forward_hook(lambda module, _, output, bid=bid: note(bid, module, output))
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].numpy()
    return found, logits


def as_sets(chosen: np.ndarray, n_experts: int) -> np.ndarray:
    """Ids [n, top_k] -> [n, n_experts]."""
    found = np.zeros((len(chosen), n_experts), bool)
    np.put_along_axis(found, chosen.astype(np.int64), True, axis=1)
    return found


def convert(cli: Callable, source: Path, out: Path, *options: object) -> Path:
    code, _, err = cli("convert", source, "-o", out, *(options or FLOATS))
    assert code == 0, err
    return out


@pytest.mark.parametrize(
    "layout",
    ["Qwen2Moe", "Mixtral", "DeepseekV2 thin", "DeepseekV3", "Llama4", "GptOss", "GraniteMoe", "Qwen3Next"],
)
def test_logits_and_chosen_experts_are_those_of_transformers(layout: str, tmp_path: Path, cli) -> None:
    from transformers import AutoModelForCausalLM

    directory = build_moe(tmp_path / "model", **VARIANTS[layout])
    path = convert(cli, directory, tmp_path / "f32.gguf")
    tokens = tokens_for(N_TOKENS.get(layout, 48))
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    expected, logits = router_choices(reference, tokens)
    assert expected
    for engine in (
        LlamaEngine(path, n_ctx=len(tokens), threads=1, exact=True),
        TorchEngine(FileBlocks(path), n_ctx=len(tokens)),
    ):
        with engine:
            # The second run starts afresh.
            engine.run(tokens[::-1])
            found, chosen = engine.run(tokens)
        assert found.dtype == np.float32
        assert found.shape == (len(tokens), engine.n_vocab)
        # Of 600 tokens one is further off than the rest.
        assert np.quantile(np.abs(found - logits).max(axis=1), 0.99) < 2e-5 * np.ptp(logits)
        assert chosen.keys() == expected.keys()
        for bid, sets in expected.items():
            assert chosen[bid].shape == (len(tokens), sets[0].sum())
            same = (as_sets(chosen[bid], sets.shape[1]) == sets).all(axis=1)
            # A router's tie may be broken by rounding.
            assert same.mean() > 0.99, (engine.name, bid)
            assert len(np.unique(sets, axis=0)) > 1


@pytest.fixture(scope="module")
def q4(trained: Path, tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """The bundled model with experts of four bits."""
    from alphaq_gguf.cli import main

    out = tmp_path_factory.mktemp("engines") / "q4.gguf"
    arguments = ["convert", trained, "-o", out, "-q", "--bpw", 32, "--tensor-type", "_exps=Q4_K"]
    assert main([str(argument) for argument in (*arguments, "--cache-dir", cache_dir)]) == 0
    return out


def open_engine(name: str, path: Path) -> Engine:
    if name == "llama.cpp":
        return LlamaEngine(path, n_ctx=128, threads=1, exact=True)
    return TorchEngine(FileBlocks(path), n_ctx=128, dtype=torch.float32)


@pytest.mark.parametrize("name", ["llama.cpp", "pytorch"])
def test_watching_changes_no_logits_of_a_quantised_file(name: str, q4: Path, heldout: str) -> None:
    with LlamaModel(q4, n_ctx=128, threads=1, exact=True) as model:
        window = model.windows(heldout, 128)[0]
        expected = model.logits(window)
    if name == "pytorch":
        expected = TorchModel(FileBlocks(q4)).logits(window)
    with open_engine(name, q4) as engine:
        logits, chosen = engine.run(window)
        assert (engine.name, engine.device, engine.notes) == (name, "cpu", [])
        assert engine.load_s > 0
        assert engine.device_bytes is None
    np.testing.assert_array_equal(logits, expected)
    # Two layers, two of eight experts.
    assert {bid: rows.shape for bid, rows in chosen.items()} == {0: (128, 2), 1: (128, 2)}
    assert all(len(set(row)) == 2 for rows in chosen.values() for row in rows.tolist())


def test_a_recipe_runs_as_its_checkpoint_does(tiny: Path, cache_dir: Path) -> None:
    source, tokens = open_source(tiny), tokens_for(20)
    assert isinstance(source, HuggingFaceSource)
    recipe = allocate(source, AllocationSettings(bpw=4, strategy="mse", granularity="expert"), cache_dir=cache_dir)
    logits, chosen = TorchEngine(RecipeBlocks(source, recipe), n_ctx=20).run(tokens)
    np.testing.assert_array_equal(logits, TorchModel(RecipeBlocks(source, recipe)).logits(tokens))
    assert {bid: rows.shape for bid, rows in chosen.items()} == {0: (20, 2), 1: (20, 2)}


@pytest.mark.parametrize("name", ["llama.cpp", "pytorch"])
def test_a_file_that_computes_nan_is_said_to(name: str, q4: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copy(q4, tmp_path / "damaged.gguf"))
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(damaged, "r+").tensors}
    tensors["output_norm.weight"][:] = np.nan
    with open_engine(name, damaged) as engine, pytest.raises(AlphaQError, match=f"damaged.gguf: {name} computes NaN"):
        engine.run(tokens_for(9))


def check(rate: Rate, n_runs: int, n_tokens: int) -> None:
    assert (rate.n_runs, rate.n_tokens) == (n_runs, n_tokens)
    assert 0 < rate.least <= rate.median <= rate.most < float("inf")


def evaluate(path: Path, reporter: Reporter) -> tuple[Any, ...]:
    with LlamaEngine(path, n_ctx=64, threads=1) as engine, reporter.task("t", 2, "runs") as advance:
        before = engine.run(tokens_for(64))[0]
        speed = engine.time_speed(24, 5, 2, advance)
        return speed, engine.notes, engine.peak_bytes, np.array_equal(engine.run(tokens_for(64))[0], before)


def test_llama_cpp_is_timed_as_users_run_it_whatever_the_processor_makes_of_it(q4: Path) -> None:
    (speed, notes, peak, same), _ = run_isolated(evaluate, q4, label="", reporter=Silent())
    check(speed.prefill, 2, 24)
    check(speed.decode, 2, 5)
    assert speed.threads == 1
    if notes:
        assert notes[0].endswith("with weights repacked for this processor, its default: timed with weights as stored")
        assert speed.setting == "flash attention, weights as stored"
    else:
        assert speed.setting == "flash attention, weights repacked for the processor"
    assert sys.platform != "linux" or peak > 10 << 20
    # The model is there again afterwards.
    assert same


def die_repacked(path: Path, threads: int, gpu_layers: int, repack: bool, *rest: Any) -> Any:
    """`time_llama` on a processor that lacks instructions."""
    if repack:
        os.kill(os.getpid(), signal.SIGILL)
    return time_llama(path, threads, gpu_layers, repack, *rest)


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(sys.platform == "win32", reason="has no signals")
def test_a_crash_while_timing_costs_no_more_than_it_must(q4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    with LlamaEngine(q4, n_ctx=64, threads=1) as engine:
        monkeypatch.setattr(engines, "time_llama", die_repacked)
        speed = engine.time_speed(8, 4, 2, steps.append)
        assert speed is not None
        assert speed.setting == "flash attention, weights as stored"
        assert sum(steps) == 2
        monkeypatch.setattr(engines, "time_llama", die)
        assert engine.time_speed(8, 4, 1, steps.append) is None
        assert engine.notes == [
            "llama.cpp crashed (SIGILL) with weights repacked for this processor, its default: "
            "timed with weights as stored",
            "no speed: llama.cpp ran out of memory when it ran the file as llama-cli does",
        ]


def test_pytorch_is_timed_with_a_word_on_what_stands_in_for_kernels(q4: Path) -> None:
    steps: list[int] = []
    with open_engine("pytorch", q4) as engine:
        speed = engine.time_speed(24, 5, 2, steps.append)
        assert speed is not None
        check(speed.prefill, 2, 24)
        check(speed.decode, 2, 5)
        assert (speed.threads, speed.setting) == (1, "float32, plain PyTorch operations")
        assert engine.notes == [
            "plain PyTorch operations decode the experts, slowly: on cpu there are no Triton kernels"
        ]
        assert steps == [1, 1]


def is_interpreted(reporter: Reporter) -> bool:
    return engines._is_interpreted()


@pytest.mark.parametrize("interpreted", [True, False])
def test_tritons_interpreter_is_recognised(interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreted)))
    assert run_isolated(is_interpreted, label="", reporter=Silent())[0] is interpreted


def test_the_clock_runs_for_what_is_counted_alone() -> None:
    begun: list[int] = []
    written: list[int] = []

    def begin(tokens: Any) -> None:
        begun.append(len(tokens))
        time.sleep(0.5 if len(tokens) < 100 else 0.05)

    def step(token: int) -> None:
        written.append(token)
        time.sleep(0.002)

    prefill, decode = _time(begin, step, 7, 100, 5, 2, lambda _: None)
    assert begun == [100, 16] * 3
    assert len(written) == 15
    assert set(written) <= set(range(7))
    check(prefill, 2, 100)
    check(decode, 2, 5)
    assert prefill.most <= 100 / 0.05
    # The prompt before what is written would make it less.
    assert 5 / 0.5 < decode.most <= 1 / 0.002
