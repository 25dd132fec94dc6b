"""llama.cpp's own programs with the plug-in, as `convert` says they are to be started."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from oracles import run_perplexity, start_tool

from alphaq_gguf.evaluate.llama import LlamaModel
from alphaq_gguf.gguf_file import read_header
from alphaq_gguf.guard import OPTIONS_KEY
from alphaq_gguf.plugin import build_plugin, cache_dir
from alphaq_gguf.reporter import Silent

N_CTX, N_WINDOWS = 128, 8


@pytest.fixture(scope="module")
def mixed(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a type per expert."""
    from alphaq_gguf.cli import main

    directory = tmp_path_factory.mktemp("mixed")
    out = directory / "mixed.gguf"
    words = ["convert", trained, "-o", out, "--bpw", 3.2, "--strategy", "mse", "--granularity", "expert"]
    assert main([*map(str, words), "--cache-dir", str(directory)]) == 0
    return out


@pytest.fixture(scope="module")
def plugin() -> str:
    return str(build_plugin(cache_dir(), Silent()))


@pytest.fixture
def text(heldout: str, tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(heldout[:20000], encoding="utf-8")
    return path


def options(path: Path, device: str = "ALPHAQ") -> list[str]:
    """What the file itself says it needs."""
    return [word.replace("=ALPHAQ", f"={device}") for word in shlex.split(read_header(path).get(OPTIONS_KEY))]


def test_perplexity_is_that_of_llama_cpp_python(mixed: Path, plugin: str, text: Path) -> None:
    words = ["-m", mixed, "-f", text, "-c", N_CTX, "--chunks", N_WINDOWS, "--no-repack", *options(mixed)]
    printed = run_perplexity(*words, GGML_BACKEND_PATH=plugin)
    found = re.search(r"Final estimate: PPL = ([\d.]+)", printed)
    assert found
    with LlamaModel(mixed, n_ctx=N_CTX, threads=1) as model:
        ours = model.perplexity(text.read_text(encoding="utf-8"), n_ctx=N_CTX, max_windows=N_WINDOWS)
    assert float(found[1]) == pytest.approx(ours.value, abs=2e-4)


def test_repacked_experts_say_nearly_the_same(mixed: Path, plugin: str, text: Path) -> None:
    words = ["-m", mixed, "-f", text, "-c", N_CTX, "--chunks", N_WINDOWS, "--no-repack"]
    found = []
    for device in ("ALPHAQ", "ALPHAQ_REPACK"):
        printed = run_perplexity(*words, *options(mixed, device), GGML_BACKEND_PATH=plugin)
        match = re.search(r"Final estimate: PPL = ([\d.]+)", printed)
        assert match
        found.append(float(match[1]))
    assert found[1] == pytest.approx(found[0], rel=5e-3)


def test_without_the_plugin_the_file_is_refused_with_its_reason(mixed: Path, text: Path) -> None:
    done = start_tool("llama-perplexity", "-m", mixed, "-f", text, "-c", N_CTX)
    assert done.returncode > 0
    said = done.stdout + done.stderr
    assert "unknown model architecture: 'qwen2moe in alphaq containers: runs only with the ggml plug-in" in said
    assert "Final estimate" not in said


@pytest.mark.parametrize("device", ["ALPHAQ", "ALPHAQ_REPACK"])
def test_a_damaged_container_stops_it_with_a_message(
    device: str, mixed: Path, plugin: str, text: Path, tmp_path: Path
) -> None:
    data = bytearray(mixed.read_bytes())
    data[data.index(b"ALPHAQEX") + 60] ^= 0x10
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(data)
    words = ["-m", damaged, "-f", text, "-c", N_CTX, "--chunks", 2, "--no-repack", *options(mixed, device)]
    done = start_tool("llama-perplexity", *words, GGML_BACKEND_PATH=plugin)
    # A signal would be a negative code.
    assert done.returncode >= 0
    said = done.stdout + done.stderr
    assert re.search(r"alphaq: blk\.\d+\.ffn_\w+_exps\.weight is no container .* checksum of its table", said)
    assert "Final estimate" not in said


def test_an_ordinary_file_runs_as_without_the_plugin(trained: Path, plugin: str, text: Path, tmp_path: Path) -> None:
    from alphaq_gguf.cli import main

    out = tmp_path / "stacks.gguf"
    words = ["convert", trained, "-o", out, "--bpw", 3.2, "--strategy", "mse", "--cache-dir", tmp_path]
    assert main([*map(str, words)]) == 0
    given = ["-m", out, "-f", text, "-c", N_CTX, "--chunks", N_WINDOWS, "--no-repack"]
    lines = [
        re.findall(r"\[\d+\][\d.]+", run_perplexity(*given, **more)) for more in ({}, {"GGML_BACKEND_PATH": plugin})
    ]
    assert lines[0]
    assert lines[0] == lines[1]


def test_llama_cli_writes_text(mixed: Path, plugin: str) -> None:
    words = ["-m", mixed, "-p", "def __init__(", "-n", 12, "--temp", 0, "-st", "--no-repack", *options(mixed)]
    done = start_tool("llama-cli", *words, GGML_BACKEND_PATH=plugin)
    assert done.returncode == 0, done.stderr[-2000:]
    written = done.stdout.partition("> def __init__(")[2].partition("[ Prompt")[0]
    # What a product gone wrong would write is no words.
    assert len(re.findall(r"[a-z]{2,}", written)) >= 3


def test_what_convert_prints_is_what_the_file_says(mixed: Path, cli, trained: Path, tmp_path: Path) -> None:
    words = ("--bpw", 3.2, "--strategy", "mse", "--granularity", "expert", "-o", tmp_path / "again.gguf", "--json")
    code, out, err = cli("convert", trained, *words)
    assert code == 0, err
    server = next(line for line in json.loads(out)["commands"] if "llama-server" in line)
    assert read_header(mixed).get(OPTIONS_KEY) in server
    assert 'GGML_BACKEND_PATH="$(alphaq-gguf plugin path)"' in server
