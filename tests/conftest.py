"""Fixtures of all tests: checkpoints, a cache of measurements, and the command line."""

from __future__ import annotations

import gc
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import ROOT, build_moe

TRAINED = ROOT / "tests/models/stdlib-qwen2moe-4m"

# A shell that runs the suite in the background has it ignore Ctrl-C, and every process that a test starts would too.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def trained() -> Path:
    """The bundled trained model."""
    return TRAINED


@pytest.fixture(scope="session")
def heldout() -> str:
    """Text the bundled model was not trained on."""
    return (TRAINED / "heldout.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2-MoE in float32, experts one by one, one file. Never change it: copy with `tiny_copy`."""
    return build_moe(tmp_path_factory.mktemp("tiny") / "tiny-moe")


@pytest.fixture
def tiny_copy(tiny: Path, tmp_path: Path) -> Path:
    """A private copy of `tiny` to damage."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Measurements shared by all tests of a run."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Small decompositions only suffer from more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def _plugin_unloaded() -> Iterator[None]:
    """The ggml plug-in stays with the tests that load it: llama.cpp counts its devices in what it prints."""
    yield
    plugin = sys.modules.get("alphaq_gguf.plugin")
    if plugin is not None:
        # Models that nobody closed go first.
        gc.collect()
        plugin.unload_plugin()


@pytest.fixture
def cli(cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: (exit code, stdout, stderr)."""
    from alphaq_gguf.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        texts = [str(argument) for argument in arguments]
        if (
            texts[0] in ("convert", "alphas", "allocate", "calibrate", "compare", "sweep")
            and "--cache-dir" not in texts
        ):
            texts += ["--cache-dir", str(cache_dir)]
        capsys.readouterr()
        code = main(texts)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
