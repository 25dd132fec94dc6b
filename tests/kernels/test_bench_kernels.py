"""The benchmark of the kernels: its inputs, its contestants against a plain sum, its judgement and its check."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest
import torch
from oracles import load_tool

from alphaq_gguf.console import Console
from alphaq_gguf.errors import AlphaQError, UsageError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    load_tool("results")
    return load_tool("bench_kernels")


def test_random_blocks_are_sane_weights(bench: ModuleType):
    for name in bench.HALVES:
        rows = bench.random_blocks(name, 8, 512, CPU).numpy()
        weights = gguf.dequantize(rows, gguf.GGMLQuantizationType[name])
        assert weights.shape == (8, 512)
        assert 0.005 < np.std(weights) < 0.1, name


@pytest.mark.parametrize(("n_experts", "n_cols"), [(8, 4096), (60, 2048), (256, 7168)])
def test_the_mix_averages_what_it_is_named_after(bench: ModuleType, n_experts: int, n_cols: int):
    names = bench.draw_types(n_experts, n_cols, 1)
    assert names == bench.draw_types(n_experts, n_cols, 1)
    assert len(names) == n_experts
    assert len(set(names)) > 2
    sizes = [gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] for name in names]
    mean = sum(8 * size / block for block, size in sizes) / n_experts
    # No step between neighbouring types is longer than 2 bits.
    assert 3.5 - 2 / n_experts < mean <= 3.5


def test_rows_that_no_k_quant_fits_take_the_stock_substitute(bench: ModuleType):
    shape = bench.Shape(256, 96, 2, 1)
    gate, up, down = bench.build_experts("Q4_K", shape, 0, CPU)
    assert (gate.types, up.types, down.types) == ((12,), (12,), (6,))
    used = bench.expert_bytes(gate, range(2)) + bench.expert_bytes(down, range(2))
    assert used == gate.n_bytes + down.n_bytes


def test_single_tokens_meet_every_expert_before_one_comes_again(bench: ModuleType):
    shape = bench.Shape(32, 32, 12, 4)
    sets = bench.build_inputs(shape, 1, 6, torch.float32, 0, CPU)
    for three in (sets[:3], sets[3:]):
        assert sorted(torch.cat([inputs.chosen.flatten() for inputs in three]).tolist()) == list(range(12))


@pytest.mark.parametrize("n_tokens", [1, 7])
def test_all_contestants_in_bf16_compute_the_layer(bench: ModuleType, n_tokens: int):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = bench.Shape(64, 32, 6, 3)
    floats = bench.Floats(shape, CPU)
    inputs = bench.build_inputs(shape, n_tokens, 1, torch.bfloat16, 0, CPU)[0]
    want = torch.zeros(n_tokens, 64, dtype=torch.float64)
    for i_t in range(n_tokens):
        for xid, share in zip(inputs.chosen[i_t].tolist(), inputs.gates[i_t].tolist(), strict=True):
            gate, up = (floats.gate_up[xid].double() @ inputs.x[i_t].double()).chunk(2)
            want[i_t] += share * (floats.down[xid].double() @ (gate * gate.sigmoid() * up))
    ways = floats.ways(n_tokens)
    assert set(ways) == {"loop", "grouped_mm", "gathered bmm", "transformers"}
    for name, way in ways.items():
        assert bench.relative_error(way(inputs), want) < 2e-2, name
    assert set(floats.ways(512)) == {"loop", "grouped_mm", "transformers"}


def rows_of(**figures: float) -> list[dict]:
    place = {"shape": "mixtral-8x7b", "type": "Q4_K", "bpw": 4.5, "tokens": 1}
    return [{**place, "us": 80.0, "copy_share": 0.8, "over_bf16": 2.0, "over_decoded_first": 3.0, **figures}]


def test_targets_are_judged(bench: ModuleType):
    assert [(t["met"], t["found"]) for t in bench.judge(rows_of())] == [(True, 0.8), (True, 3.0)]
    assert [t["met"] for t in bench.judge(rows_of(copy_share=0.69, over_decoded_first=0.99))] == [False, False]
    mix = bench.judge(rows_of(type="mix"))
    assert (mix[0]["target"].split(",")[0], mix[0]["met"]) == ("mix", False)
    assert bench.judge([{**rows_of()[0], "us": 1.0, "tokens": 512}])[0]["target"].startswith("everywhere")


def test_a_wrong_result_is_reported_without_a_time(bench: ModuleType):
    wrong = {"shape": "deepseek-v3", "type": "Q2_K", "bpw": 2.6, "tokens": 1, "error": 0.5}
    assert bench.judge([wrong]) == []
    result = {"gpu": "G", "driver": "1", "command": "c", "date": "d", "machine": "m", "copy_bytes_per_s": 4e12}
    result |= {"torch": "2", "triton": "3", "transformers": None, "targets": bench.judge(rows_of()), "notes": []}
    lines = bench.report({**result, "rows": [*rows_of(), wrong]})
    assert "| mixtral-8x7b | Q4_K | 4.50 | 80.0 | 80% | 160.0 | 2.00 | - | 3.00 |" in lines
    assert "| deepseek-v3 | Q2_K | 2.60 | wrong: error 5.0e-01 | | | | | |" in lines
    assert "| mixtral-8x7b, Q4_K, 1 token: share of the copy bandwidth | 0.7 | 0.80 | met |" in lines


def test_the_check_runs_anywhere(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    pytest.importorskip("triton")
    assert bench.main(["--check", "--types", "Q8_0"], Console()) == 0
    monkeypatch.setitem(bench.TOLERANCE, torch.float32, 0.0)
    assert bench.main(["--check", "--types", "Q4_0"], Console()) == 1
    assert "wrong: moe_prefill Q4_0 planar: relative error" in capsys.readouterr().err


def test_bad_words_are_refused(bench: ModuleType):
    with pytest.raises(UsageError, match="--types Q9_K: expected some of Q4_K, Q8_0, mix"):
        bench.main(["--check", "--types", "Q4_K,Q9_K"], Console())
    with pytest.raises(UsageError, match="--shapes gpt-2: expected some of mixtral-8x7b"):
        bench.main(["--check", "--shapes", "gpt-2"], Console())


def test_without_a_gpu_it_says_so(bench: ModuleType, tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(AlphaQError, match="no CUDA GPU") as caught:
        bench.main(["-o", str(tmp_path / "r")], Console())
    assert caught.value.exit_code == 1
    assert not list(tmp_path.iterdir())


def test_it_runs_on_a_gpu(bench: ModuleType, tmp_path: Path):
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs a GPU with 24 GiB of free memory")
    words = ["--quick", "--shapes", "qwen3-30b-a3b", "--types", "Q4_K", "-o", str(tmp_path / "r")]
    assert bench.main(words, Console()) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert [row["tokens"] for row in result["rows"]] == [1, 512]
    assert all(row["us"] > 0 and row["error"] < 1e-2 for row in result["rows"])
    assert str(tmp_path) not in (tmp_path / "r.md").read_text()
