"""The studies measure what they say, restore what they touch, and measure nothing twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from checkpoints import build_moe
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from oracles import load_tool
from safetensors.numpy import load_file, save_file
from scipy.stats import spearmanr

from alphaq_gguf.calibration import Calibration, LayerUsage
from alphaq_gguf.calibration.data import WHOLE
from alphaq_gguf.calibration.imatrix import open_importance
from alphaq_gguf.checkpoint import open_source
from alphaq_gguf.console import Console
from alphaq_gguf.pipeline import AllocationSettings, allocate, convert
from alphaq_gguf.qtypes import QType

CTX, WINDOWS = 64, 4
QTYPE = GGMLQuantizationType.Q4_0
ZERO = (1, 2)
"""(layer, expert) whose weights are all 0, which every type represents exactly."""


def weight_name(bid: int, xid: int, proj: str) -> str:
    return f"model.layers.{bid}.mlp.experts.{xid}.{proj}_proj.weight"


@pytest.fixture(scope="module", autouse=True)
def shared() -> None:
    """What the studies import lies beside them."""
    for name in ("results", "study"):
        load_tool(name)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, one expert of which is all zeros."""
    directory = build_moe(tmp_path_factory.mktemp("study") / "model")
    tensors = load_file(directory / "model.safetensors")
    for proj in ("gate", "up", "down"):
        tensors[weight_name(*ZERO, proj)][:] = 0
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, heldout: str) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(heldout[:3000], encoding="utf-8")
    return path


ROUTED = [40, 30, 20, 10]
"""Tokens that reach each expert of a layer by the importance matrix."""


@pytest.fixture(scope="module")
def imatrix(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An importance matrix of the model as llama-imatrix writes it, its figures made up."""
    path = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, "")
    # The package always writes an architecture, llama-imatrix does not.
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["made-up.txt"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 50)
    counts = np.array(ROUTED, np.float32)[:, None]
    for stack in open_source(model).stacks:
        writer.add_tensor(f"{stack.name}.in_sum2", counts * rng.gamma(0.3, size=(4, stack.n_cols)).astype(np.float32))
        writer.add_tensor(f"{stack.name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def study(model: Path, text: Path, cache_dir: Path) -> Callable[..., dict]:
    """Run a study on the model and return what it wrote to RESULT.json."""
    tools = {name: load_tool(f"study_{name}") for name in ("sensitivity", "strategies")}

    def run(name: str, output: Path, *options: object) -> dict:
        words = [model, "--text", text, "-o", output, "--cache-dir", cache_dir, "--ctx", CTX, "--threads", 1, *options]
        tools[name].main([str(word) for word in words], Console(quiet=True))
        return json.loads(output.with_name(output.name + ".json").read_text(encoding="utf-8"))

    return run


@pytest.fixture(scope="module")
def sensitivity(study, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("sensitivity") / "result-1.5"
    return output, study("sensitivity", output, "--qtype", QTYPE.name, "--windows", WINDOWS)


def rows_by_expert(result: dict) -> dict[tuple[int, int], dict]:
    return {(row["layer"], row["expert"]): row for row in result["rows"]}


def test_kld_of_an_expert_equals_that_of_transformers(model: Path, text: Path, sensitivity, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(model).encode(text.read_text(encoding="utf-8"), add_special_tokens=False)
    windows = torch.tensor(tokens[: CTX * WINDOWS]).view(WINDOWS, CTX)

    def log_probabilities(directory: Path) -> torch.Tensor:
        reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        with torch.no_grad():
            return reference(windows).logits[:, CTX // 2 : -1].double().log_softmax(-1)

    base = log_probabilities(model)
    for expert in ((0, 1), (1, 3)):
        copy = Path(shutil.copytree(model, tmp_path / str(expert)))
        tensors = load_file(copy / "model.safetensors")
        for proj in ("gate", "up", "down"):
            name = weight_name(*expert, proj)
            tensors[name] = dequantize(quantize(tensors[name], QTYPE), QTYPE)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        expected = float((base.exp() * (base - log_probabilities(copy))).sum(-1).mean())
        row = rows_by_expert(sensitivity[1])[expert]
        assert row["kld"] == pytest.approx(expected, rel=1e-3)
        assert row["kld"] > 1e-5
        assert row["tokens"] == base.shape[0] * base.shape[1]


def test_an_expert_that_its_type_represents_exactly_costs_nothing(sensitivity) -> None:
    rows = rows_by_expert(sensitivity[1])
    assert rows[ZERO]["kld"] == pytest.approx(0, abs=1e-12)
    assert rows[ZERO]["squared_error"] == 0
    assert min(row["kld"] for expert, row in rows.items() if expert != ZERO) > 1e-6


def test_signals_are_those_of_the_checkpoint(model: Path, sensitivity) -> None:
    tensors = load_file(model / "model.safetensors")
    for (bid, xid), row in rows_by_expert(sensitivity[1]).items():
        error = 0.0
        for proj in ("gate", "up", "down"):
            weights = tensors[weight_name(bid, xid, proj)]
            error += np.square(weights - dequantize(quantize(weights, QTYPE), QTYPE), dtype=np.float64).sum()
        router = tensors[f"model.layers.{bid}.mlp.gate.weight"][xid]
        assert row["squared_error"] == pytest.approx(error, rel=1e-5)
        assert row["router_norm"] == pytest.approx(np.linalg.norm(router), rel=1e-5)
        gate = tensors[weight_name(bid, xid, "gate")].astype(np.float64)
        assert row["row_variance"] == pytest.approx(gate.var(axis=1).max(), rel=1e-5)
        assert (row["alpha"] is None) == ((bid, xid) == ZERO)


def test_correlations_equal_scipys(sensitivity) -> None:
    rows = sensitivity[1]["rows"]
    assert len(rows) == 8
    for found in sensitivity[1]["signals"]:
        pairs = [(row[found["signal"]], row["kld"], row["layer"]) for row in rows if row[found["signal"]] is not None]
        values, klds, layers = map(np.array, zip(*pairs, strict=True))
        expected = spearmanr(values, klds)
        assert found["experts"] == len(pairs) == (7 if found["signal"] == "alpha" else 8)
        assert found["spearman"] == pytest.approx(expected.statistic)
        assert found["p"] == pytest.approx(expected.pvalue, abs=0.05)
        within = [spearmanr(values[layers == bid], klds[layers == bid]).statistic for bid in (0, 1)]
        assert found["within_layers"] == pytest.approx(np.mean(within))


@pytest.mark.parametrize(
    ("n_experts", "sign", "verdict"), [(12, 1, "opposite"), (12, -1, "agrees"), (3, 1, "undecided")]
)
def test_a_claim_is_judged_by_its_sign_and_only_on_enough_experts(
    study, n_experts: int, sign: int, verdict: str
) -> None:
    rows = [{"layer": 0, "kld": float(i), "alpha": sign * float(i) ** 3} for i in range(n_experts)]
    found = load_tool("study_sensitivity").judge(rows, "alpha")
    assert found["spearman"] == pytest.approx(sign)
    assert found["verdict"] == verdict


def test_only_the_experts_bytes_are_changed_and_put_back(study, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "f32.gguf"
    source = open_source(model)
    settings = AllocationSettings(bpw=32, strategy="uniform", overrides=((r"\.weight$", QType.F32),))
    convert(source, allocate(source, settings, cache_dir=tmp_path), path)
    before = path.read_bytes()
    tool = load_tool("study_sensitivity")
    expected = {tensor.name: tensor.data.copy() for tensor in GGUFReader(path).tensors}
    for proj in ("gate", "up", "down"):
        stack = expected[f"blk.1.ffn_{proj}_exps.weight"]
        stack[3] = dequantize(quantize(stack[3], QTYPE), QTYPE)
    with tool.encoded(path, tool.experts_of(source)[1, 3], QType.Q4_0):
        for tensor in GGUFReader(path).tensors:
            np.testing.assert_array_equal(tensor.data, expected[tensor.name], err_msg=tensor.name)
        assert path.read_bytes() != before
    assert path.read_bytes() == before


def test_a_second_run_measures_only_what_the_first_did_not(study, sensitivity, tmp_path: Path) -> None:
    output, first = sensitivity
    header, columns, *lines = output.with_name(output.name + ".csv").read_text(encoding="utf-8").splitlines()
    fields = lines[0].split(",")
    # A figure that no measurement gives shows where it came from.
    fields[columns.split(",").index("kld")] = "0.5"
    kept = "\n".join([header, columns, ",".join(fields), *lines[1:5]]) + "\n"
    (tmp_path / "again.csv.partial").write_text(kept, encoding="utf-8")
    options = ("--qtype", QTYPE.name, "--windows", WINDOWS)
    again = study("sensitivity", tmp_path / "again", *options)
    assert [row["kld"] for row in again["rows"]] == [0.5, *(row["kld"] for row in first["rows"][1:])]
    assert (tmp_path / "again.csv").is_file()
    few = study("sensitivity", tmp_path / "again", *options, "--experts", 5)
    assert len(few["rows"]) == 5
    known = rows_by_expert(again)
    assert all(row["kld"] == known[row["layer"], row["expert"]]["kld"] for row in few["rows"])


def test_the_report_and_the_plot_show_every_signal(sensitivity) -> None:
    output, result = sensitivity
    report = output.with_name(output.name + ".md").read_text(encoding="utf-8")
    plot = "".join(ElementTree.parse(output.with_name(output.name + ".svg")).getroot().itertext())
    labels = load_tool("study_sensitivity").SIGNALS
    assert len(result["signals"]) == 6
    for found in result["signals"]:
        assert f"| {labels[found['signal']][0]} |" in report
        assert labels[found["signal"]][0] in plot
    assert str(output.parent) not in report


def test_calibration_adds_what_it_knows_and_says_what_it_lacks(study) -> None:
    usage = LayerUsage(np.array([[10.0, 30.0]]), squared_gates=np.array([[1.0, 2.0]]))
    errors = {(4, 0, WHOLE, QType.Q2_K): 7.0, (4, 1, "up", QType.Q2_K): 8.0}
    calibration = Calibration("FILE", ("text",), (40,), {4: usage}, errors)
    tool = load_tool("study_sensitivity")
    found, absent = tool.calibrated_signals(calibration, [(4, 0), (4, 1)], QType.Q2_K)
    assert found == {
        "tokens_routed": {(4, 0): 0.25, (4, 1): 0.75},
        "squared_gate": {(4, 0): 0.025, (4, 1): 0.05},
        "block_error": {(4, 0): 7.0, (4, 1): None},
    }
    assert absent.keys() == {"significance"}
    assert tool.calibrated_signals(calibration, [(4, 0)], QType.Q3_K)[1].keys() == {"significance", "block_error"}


def test_an_imatrix_given_later_adds_tokens_without_measuring_again(
    study, sensitivity, imatrix: Path, tmp_path: Path
) -> None:
    output, first = sensitivity
    shutil.copy(output.with_name(output.name + ".csv"), tmp_path / "with.csv")
    options = ("--qtype", QTYPE.name, "--windows", WINDOWS, "--calibration", imatrix)
    found = study("sensitivity", tmp_path / "with", *options)
    for row, known in zip(found["rows"], first["rows"], strict=True):
        assert row == known | {"tokens_routed": pytest.approx(ROUTED[row["expert"]] / 50)}
    assert "tokens_routed" in [signal["signal"] for signal in found["signals"]]
    assert found["absent"].keys() == {"squared_gate", "significance", "block_error"}
    assert (tmp_path / "with.md").read_text(encoding="utf-8").count("Not known: ") == 3


@pytest.fixture(scope="module")
def strategies(study, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("strategies") / "result"
    options = ("--windows", 2, "--bpw", "3,5", "--strategy", "mse,router-norm")
    return output, study("strategies", output, *options)


def test_every_strategy_has_its_rows_or_a_reason(strategies) -> None:
    output, result = strategies
    assert (result["rows"][0]["strategy"], result["rows"][0]["tokens"]) == ("f32", 2 * (CTX // 2 - 1))
    rows = {(row["granularity"], row["strategy"], row["budget"]): row for row in result["rows"][1:]}
    assert len(rows) == 8
    report = output.with_name(output.name + ".md").read_text(encoding="utf-8")
    for (granularity, strategy, budget), row in rows.items():
        if (granularity, strategy) == ("stack", "router-norm"):
            assert "order" in row["error"]
            assert f"router-norm per stack at {budget:g}" in report
        else:
            assert row["bpw"] <= budget
    for granularity in ("stack", "expert"):
        assert 0 < rows[granularity, "mse", 5.0]["kld"] < rows[granularity, "mse", 3.0]["kld"]
    # Strategies that ran both ways, by budget.
    table = [line.strip("| ").split(" | ") for line in report.partition("## A type per expert")[2].splitlines()]
    gains = [cells for cells in table if len(cells) == 7][2:]
    assert [cells[:2] for cells in gains] == [["3.0", "mse"], ["5.0", "mse"]]
    for budget, _, *cells in gains:
        stack, expert = (rows[granularity, "mse", float(budget)] for granularity in ("stack", "expert"))
        assert [float(cell) for cell in cells[:4]] == pytest.approx(
            [stack["kld"], stack["bpw"], expert["kld"], expert["bpw"]], rel=1e-3, abs=1e-5
        )
        assert float(cells[4].removesuffix(" %")) == pytest.approx(100 * expert["kld"] / stack["kld"] - 100, abs=0.5)
    plot = "".join(ElementTree.parse(output.with_name(output.name + ".svg")).getroot().itertext())
    assert all(label in plot for label in ("mse", "router-norm", "one type per stack", "one type per expert"))


@pytest.mark.parametrize("weighed", [False, True])
def test_a_twin_holds_what_a_reader_finds_in_the_quantised_file(
    study, model: Path, imatrix: Path, weighed: bool, tmp_path: Path
) -> None:
    source = open_source(model)
    settings = AllocationSettings(bpw=3.5, strategy="random", imatrix=imatrix if weighed else None)
    recipe = allocate(source, settings, cache_dir=tmp_path)
    importance = open_importance(imatrix, source) if weighed else None
    convert(source, recipe, tmp_path / "out.gguf", imatrix=importance)
    twin = load_tool("study_strategies").Twin(source, recipe, importance)
    types = set()
    for tensor in GGUFReader(tmp_path / "out.gguf").tensors:
        if "_exps" in tensor.name:
            types.add(tensor.tensor_type)
            expected = dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(twin.read_rows(tensor.name), expected.reshape(-1, expected.shape[-1]))
    assert len(types) > 1


def test_finished_rows_are_kept_for_the_same_question_only(study, strategies, tmp_path: Path) -> None:
    first = strategies[1]
    figures = json.loads(json.dumps(first))
    # Figures that no measurement gives show where they came from.
    for row in figures["rows"]:
        row["ppl"] = -1.0
    result = tmp_path / "again.json"
    asked = ("--bpw", "5", "--strategy", "mse", "--granularity", "stack")
    result.write_text(json.dumps(figures), encoding="utf-8")
    kept = study("strategies", tmp_path / "again", "--windows", 2, *asked)
    assert [(row["strategy"], row["ppl"]) for row in kept["rows"]] == [("f32", -1.0), ("mse", -1.0)]
    result.write_text(json.dumps(figures), encoding="utf-8")
    other = study("strategies", tmp_path / "again", "--windows", 1, *asked)
    assert all(row["ppl"] > 1 for row in other["rows"])


def test_strategies_know_the_imatrix(study, strategies, imatrix: Path, tmp_path: Path) -> None:
    options = ("--windows", 2, "--bpw", "3", "--granularity", "expert", "--imatrix", imatrix)
    result = study("strategies", tmp_path / "with", *options, "--strategy", "mse,mse+true-count,pmq")
    found = {row["strategy"]: row for row in result["rows"]}
    wanted = {"strategy": "mse", "granularity": "expert", "budget": 3.0}
    (plain,) = (row for row in strategies[1]["rows"] if row.items() >= wanted.items())
    assert len({plain["kld"], found["mse"]["kld"], found["mse+true-count"]["kld"]}) == 3
    # PMQ needs gate weights, of which an imatrix tells nothing.
    assert "imatrix.gguf" in found["pmq"]["error"]
