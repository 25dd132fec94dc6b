"""Files with a type per expert in PyTorch and in llama.cpp with the plug-in: as near to each other as ordinary files.

The bounds are those that hold for one type per stack.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from container_bytes import write_twin
from gguf import GGUFReader

from alphaq_gguf.evaluate.blocks import FileBlocks
from alphaq_gguf.evaluate.engines import LlamaEngine
from alphaq_gguf.evaluate.llama import log_softmax
from alphaq_gguf.evaluate.torch_model import TorchModel

pytestmark = pytest.mark.usefixtures("one_torch_thread")

N_CTX, N_WINDOWS = 256, 4
OTHERS_FLOAT = ("--tensor-type", r"^(?!.*_exps).*\.weight$=F32")


@pytest.fixture(scope="module")
def make(trained: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The bundled model with a type per expert, as `convert` with further options makes it."""
    from alphaq_gguf.cli import main

    directory = tmp_path_factory.mktemp("parity")

    def convert(*options: str) -> Path:
        out = directory / f"{len(options)}.gguf"
        if not out.exists():
            budget = ("--bpw", "3.2", "--strategy", "mse", "--granularity", "expert")
            assert (
                main(["convert", str(trained), "-o", str(out), "-q", "--cache-dir", str(cache_dir), *budget, *options])
                == 0
            )
            assert len(GGUFReader(out).fields["alphaq.container.tensors"].contents()) >= 2
        return out

    return convert


def run_llama_cpp(path: Path, windows: list[list[int]]) -> np.ndarray:
    """Logits of all tokens."""
    with LlamaEngine(path, n_ctx=N_CTX, threads=1, exact=True) as engine:
        return np.concatenate([engine.run(window)[0] for window in windows])


def run_pytorch(path: Path, windows: list[list[int]], *, round_activations: bool = False) -> np.ndarray:
    with TorchModel(FileBlocks(path), round_activations=round_activations) as model:
        return np.concatenate([model.logits(window) for window in windows])


def windows_of(path: Path, text: str) -> list[list[int]]:
    with TorchModel(FileBlocks(path)) as model:
        return model.vocabulary.windows(text, N_CTX)[:N_WINDOWS]


def divergence(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean KLD."""
    p, q = (log_softmax(logits.astype(np.float64)) for logits in (expected, found))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.mark.parametrize(
    ("others", "plain", "rounding"),
    [(OTHERS_FLOAT, 1e-3, 1e-5), ((), 3e-3, 1e-3)],
    ids=["others in F32", "default"],
)
def test_what_llama_cpp_rounds_is_what_keeps_engines_apart(
    others: tuple[str, ...], plain: float, rounding: float, make: Callable[..., Path], heldout: str
) -> None:
    path = make(*others)
    windows = windows_of(path, heldout)
    expected = run_llama_cpp(path, windows)
    apart, left = (divergence(run_pytorch(path, windows, round_activations=value), expected) for value in (False, True))
    assert 0 < apart < plain
    assert left < min(rounding, apart / 2)


def test_blocks_in_containers_count_as_what_they_decode_to(
    make: Callable[..., Path], heldout: str, tmp_path: Path
) -> None:
    path = make(*OTHERS_FLOAT)
    write_twin(path, tmp_path / "twin.gguf")
    windows = windows_of(path, heldout)[:1]
    found, expected = (run_pytorch(file, windows) for file in (path, tmp_path / "twin.gguf"))
    assert np.abs(found - expected).max() < 1e-5 * np.ptp(expected)
    # With weights in F32 llama.cpp rounds nothing, and is the oracle of both.
    strict = run_llama_cpp(tmp_path / "twin.gguf", windows)
    assert np.abs(found - strict).max() < 2e-5 * np.ptp(strict)
