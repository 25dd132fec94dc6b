"""The bundled trained model is a fair test object, and the main job works on it from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from oracles import load_tool

from alphaq_gguf.evaluate.llama import LlamaModel
from alphaq_gguf.ledger import read_ledger

CTX = 256
WINDOWS = 40


@pytest.fixture(scope="module")
def convert(trained: Path, tmp_path_factory, cache_dir: Path):
    """Convert the trained model with given options; the same options give the same file."""
    from alphaq_gguf.cli import main

    directory = tmp_path_factory.mktemp("trained")
    done: dict[tuple[str, ...], Path] = {}

    def run(*options: str) -> Path:
        if options not in done:
            out = directory / f"{len(done)}.gguf"
            assert main(["convert", str(trained), "-o", str(out), "-q", "--cache-dir", str(cache_dir), *options]) == 0
            done[options] = out
        return done[options]

    return run


FLOATS = ("--tensor-type", r"\.weight$=F32")
OTHERS_FLOAT = ("--tensor-type", r"^(?!.*_exps).*\.weight$=F32")


@pytest.fixture(scope="module")
def perplexity(convert, heldout: str):
    found: dict[Path, float] = {}

    def measure(*options: str) -> float:
        path = convert(*options)
        if path not in found:
            with LlamaModel(path, n_ctx=CTX, threads=1) as model:
                found[path] = model.perplexity(heldout, n_ctx=CTX, max_windows=WINDOWS).value
        return found[path]

    return measure


def test_it_is_small_and_its_expert_rows_take_k_quants(trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    assert (trained / "model.safetensors").stat().st_size <= 8_000_000
    assert config["num_hidden_layers"] >= 2
    assert config["num_experts"] >= 8
    assert config["hidden_size"] % 256 == config["moe_intermediate_size"] % 256 == 0


def test_it_beats_a_trigram_model_with_back_off(trained: Path, heldout: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tool = load_tool("train_tiny_model")
    tokenizer = AutoTokenizer.from_pretrained(trained)
    tokens = tokenizer.encode(heldout, add_special_tokens=False)
    training_tokens = tool.encode_documents(tokenizer, tool.load_corpus().train)
    trigram = tool.TrigramModel(training_tokens, len(tokenizer)).loss(np.array(tokens))
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).eval()
    windows = torch.tensor(tokens[: len(tokens) // 512 * 512]).view(-1, 512)
    with torch.no_grad():
        losses = [float(model(window[None], labels=window[None]).loss) for window in windows]
    assert np.mean(losses) < trigram


def test_uniform_q2_k_experts_raise_its_perplexity_by_5_percent(perplexity) -> None:
    assert perplexity("--bpw", "2.625", "--strategy", "uniform", *OTHERS_FLOAT) > 1.05 * perplexity(
        "--bpw", "32", *FLOATS
    )


def test_alphas_of_its_experts_differ_clearly(trained: Path, tmp_path: Path, cli) -> None:
    assert cli("alphas", trained, "-o", tmp_path / "alphas.csv")[0] == 0
    alphas = np.array([float(row["alpha"]) for row in read_ledger(tmp_path / "alphas.csv")[1]])
    assert len(alphas) == 48
    assert alphas.max() / alphas.min() > 1.15
    assert np.log(alphas).std() > 0.03


def test_perplexity_falls_towards_the_float_models_as_the_budget_grows(perplexity) -> None:
    steps = [perplexity("--bpw", bpw, *OTHERS_FLOAT) for bpw in ("2.7", "3.5", "4.5", "6.5")]
    exact = perplexity("--bpw", "32", *FLOATS)
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] == pytest.approx(exact, rel=0.01)


def test_default_types_of_other_tensors_cost_next_to_nothing(perplexity) -> None:
    assert perplexity("--bpw", "6.5") == pytest.approx(perplexity("--bpw", "6.5", *OTHERS_FLOAT), rel=0.005)


def test_perplexity_in_llama_cpp_equals_that_of_transformers(perplexity, trained: Path, heldout: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(trained).encode(heldout, add_special_tokens=False)
    windows = torch.tensor(tokens[: CTX * WINDOWS]).view(-1, CTX)
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).eval()
    first = CTX // 2
    losses = []
    with torch.no_grad():
        for window in windows:
            logp = model(window[None]).logits[0].log_softmax(-1)[first:-1]
            losses.append(-logp.gather(1, window[first + 1 :, None])[:, 0])
    expected = float(torch.cat(losses).mean().exp())
    assert perplexity("--bpw", "32", *FLOATS) == pytest.approx(expected, rel=1e-3)


def test_it_answers_in_chat_form_and_stops(convert, cli) -> None:
    code, out, err = cli("run", convert("--bpw", "4.5"), "What does json.dumps do?", "-n", "200", "--temperature", "0")
    assert code == 0, err
    assert len(out.split()) > 3
    assert "<|im_" not in out


def test_raw_text_is_continued(convert, cli) -> None:
    code, out, err = cli("run", convert("--bpw", "4.5"), "def __init__(", "-n", "16", "--raw", "--temperature", "0")
    assert code == 0, err
    assert "self" in out
