"""A reference is what the full-precision model computes, whatever runs it and however often it was interrupted."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import CORPUS, FAMILIES, build_moe
from oracles import run_perplexity
from tokenizer_files import edit_json

from alphaq_gguf.checkpoint import open_source
from alphaq_gguf.compare.reference import Reference, make_reference, read_reference
from alphaq_gguf.errors import AlphaQError, OutputError
from alphaq_gguf.reporter import Silent

N_CTX = 32


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(CORPUS * 4) + "\n", encoding="utf-8")
    return path


def make(path: Path, text: Path | str, cache: Path, **options: Any) -> Reference:
    settings = {"n_ctx": N_CTX, "max_windows": 5, "batch": 2, "exact": True, **options}
    return make_reference(open_source(path), [text], cache_dir=cache, **settings)


def log_probabilities(reference: Reference) -> tuple[np.ndarray, np.ndarray]:
    """Of all scored positions [n, n_vocab], and the steps [n, 1] that a row is stored in."""
    rows = np.concatenate([reference.base.rows(i) for i in range(reference.base.n_windows)])
    heads = np.ascontiguousarray(rows[:, :4]).view("<f4").astype(np.float64)
    codes = rows[:, 4 : 4 + reference.base.n_vocab]
    return codes * heads[:, :1] + heads[:, 1:], heads[:, :1]


def run_whole(directory: Path, windows: np.ndarray) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """By transformers, at once: log-probabilities of scored positions, and who gets each token [T, E] by layer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    sent: dict[int, np.ndarray] = {}

    def record(bid: int, experts: Any, given: tuple[torch.Tensor, ...]) -> None:
        if len(given) == 1:
            # Llama 4's experts read all tokens, as zeros those that are not theirs.
            sent[bid] = given[0].reshape(experts.num_experts, windows.size, -1).any(dim=2).T.numpy()
        else:
            numbers = next(values for values in given if not values.is_floating_point()).numpy()
            sent[bid] = np.zeros((windows.size, experts.num_experts), bool)
            np.put_along_axis(sent[bid], numbers, True, axis=1)

    for bid, layer in enumerate(model.model.layers):
        for module in layer.modules():
            if type(module).__name__.endswith("Experts"):
                module.register_forward_pre_hook(partial(record, bid))
    with torch.no_grad():
        logits = model(torch.from_numpy(windows)).logits[:, windows.shape[1] // 2 : -1].double()
    return logits.log_softmax(-1).flatten(0, 1).numpy(), sent


def experts_of(reference: Reference, n_experts: int = 128) -> dict[int, np.ndarray]:
    """Whether each token is sent to each expert, [T, n_experts] by layer."""
    assert reference.routes is not None
    found = {}
    for bid in reference.routes.layers:
        chosen = np.concatenate([reference.routes.read(i)[bid] for i in range(len(reference.windows))])
        found[bid] = np.zeros((len(chosen), n_experts), bool)
        np.put_along_axis(found[bid], chosen.astype(np.int64), True, axis=1)
        assert (found[bid].sum(axis=1) == chosen.shape[1]).all()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_what_transformers_computes(family: str, text: Path, tmp_path: Path) -> None:
    directory = build_moe(tmp_path / "model", family)
    reference = make(directory, text, tmp_path / "cache")
    assert reference.windows.shape == (5, N_CTX)
    expected, sent = run_whole(directory, reference.windows)
    found, steps = log_probabilities(reference)
    assert np.ptp(expected, axis=1).max() > 1, "too even for the comparison to mean anything"
    # Nothing is told apart from 16 below the best; half a step is lost in rounding, the rest in float32.
    cut = np.maximum(expected, expected.max(axis=1, keepdims=True) - 16)
    assert (np.abs(found - cut) <= steps / 2 + 5e-5).all()

    chosen = experts_of(reference)
    assert chosen.keys() == sent.keys() != set()
    for bid, known in sent.items():
        np.testing.assert_array_equal(chosen[bid][:, : known.shape[1]], known)

    targets = reference.windows[:, N_CTX // 2 + 1 :].ravel()
    losses = -cut[np.arange(len(targets)), targets]
    value = np.exp(losses.mean())
    perplexity = reference.info.perplexity
    assert perplexity.value == pytest.approx(value, rel=1e-4)
    assert perplexity.standard_error == pytest.approx(value * losses.std() / np.sqrt(len(losses) - 1), rel=1e-3)
    assert reference.text.n_scored == len(losses)


def convert(cli: Callable, source: Path, out: Path) -> Path:
    code, _, err = cli("convert", source, "-o", out, "--bpw", 32, "--tensor-type", r"\.weight$=F32")
    assert code == 0, err
    return out


@pytest.mark.parametrize("family", ["Qwen2Moe", "DeepseekV3", "Ernie4_5_Moe", "Llama4"])
def test_a_gguf_tells_what_its_checkpoint_does(family: str, text: Path, tmp_path: Path, cli) -> None:
    directory = build_moe(tmp_path / "model", family)
    ours = make(directory, text, tmp_path / "cache")
    theirs = make(convert(cli, directory, tmp_path / "f32.gguf"), text, tmp_path / "cache")
    np.testing.assert_array_equal(theirs.windows, ours.windows)
    assert theirs.text == ours.text
    assert (ours.info.engine, theirs.info.engine) == ("pytorch", "llama.cpp, exact")
    assert theirs.base.path != ours.base.path
    (found, steps), (expected, _) = log_probabilities(theirs), log_probabilities(ours)
    assert (np.abs(found - expected) <= steps + 5e-3).all()
    assert np.abs(found - expected).mean() < 5e-4
    chosen, expected_chosen = experts_of(theirs), experts_of(ours)
    assert chosen.keys() == expected_chosen.keys() != set()
    for bid, known in expected_chosen.items():
        np.testing.assert_array_equal(chosen[bid], known)


class Recorder(Silent):
    """Remembers tasks and their steps, and interrupts the `n`-th step of those called `label`."""

    def __init__(self, label: str = "", n: int = 1) -> None:
        self.label, self.left, self.tasks, self.amounts = label, n, [], []

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        self.tasks.append(label)

        def advance(amount: int) -> None:
            self.amounts.append(amount)
            self.left -= bool(self.label) and label.startswith(self.label)
            if self.left == 0:
                raise KeyboardInterrupt

        yield advance


def contents(cache: Path) -> dict[str, bytes]:
    """What is in the cache's only reference, by file."""
    (directory,) = cache.glob("reference-*")
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("kind", ["checkpoint", "gguf"])
def test_interrupted_anywhere_it_ends_the_same_and_is_then_reused(
    kind: str, tiny: Path, text: Path, tmp_path: Path, cli
) -> None:
    path = tiny if kind == "checkpoint" else convert(cli, tiny, tmp_path / "f32.gguf")
    whole = make(path, text, tmp_path / "whole")
    breaks = [("Layer 0", 2), ("Layer 1", 1), ("Layer 1", 3), ("Logits", 1), ("Logits", 3), ("Logits", 3)]
    if kind == "gguf":
        # Another process tells of its steps several at a time.
        breaks = [("Running", 1)]
    for label, n in [*breaks, ("Reading", 2)]:
        with pytest.raises(KeyboardInterrupt):
            make(path, text, tmp_path / "cache", reporter=Recorder(label, n))
    last = Recorder()
    assert make(path, text, tmp_path / "cache", reporter=last).info == whole.info
    assert last.tasks == ["Reading base.kld"]
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    assert contents(tmp_path / "cache").keys() == {"base.kld", "routes.npy", "reference.json"}

    again = Recorder()
    same = make(path, text, tmp_path / "cache", reporter=again)
    assert again.tasks == []
    assert same.info == whole.info


def test_what_is_finished_is_not_run_again(tiny: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(tiny, text, tmp_path / "cache", reporter=Recorder("Logits of tiny-moe", 3))
    resumed = Recorder()
    make(tiny, text, tmp_path / "cache", reporter=resumed)
    assert resumed.tasks == ["Logits of tiny-moe", "Reading base.kld"]
    assert resumed.amounts[:4] == [2, 1, 1, 1]


def test_windows_that_llama_cpp_has_run_it_does_not_run_again(tiny: Path, text: Path, tmp_path: Path, cli) -> None:
    path = convert(cli, tiny, tmp_path / "f32.gguf")
    whole = make(path, text, tmp_path / "cache")
    expected = experts_of(whole)
    # As a run leaves it that was interrupted in the third window, with marks on the first two that show who wrote them.
    directory = whole.base.path.parent
    (directory / "reference.json").unlink()
    n_bytes = whole.base.rows(0).nbytes
    data = whole.base.path.read_bytes()
    whole.base.path.rename(directory / "base.kld.partial").write_bytes(data[: -2 * n_bytes - n_bytes // 2])
    routes = np.load(directory / "routes.npy")
    marked = routes.copy()
    for name in routes.dtype.names:
        marked[name][:2] = routes[name][:2, ::-1]
        marked[name][2:] = 0
    np.save(directory / "routes.npy", marked)
    resumed = make(path, text, tmp_path / "cache")
    assert resumed.base.path.read_bytes() == data
    for bid, found in experts_of(resumed).items():
        np.testing.assert_array_equal(found[2 * N_CTX :], expected[bid][2 * N_CTX :])
        np.testing.assert_array_equal(found[:N_CTX], expected[bid][:N_CTX][::-1])


@pytest.mark.skipif(sys.platform != "linux", reason="finds the process as Linux shows it")
def test_when_llama_cpp_dies_the_reference_is_named_and_what_it_ran_stays(
    tiny: Path, text: Path, tmp_path: Path, cli
) -> None:
    class Killer(Silent):
        """Kills the process at work when it begins."""

        @contextmanager
        def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
            for children in Path("/proc/self/task").glob("*/children"):
                for child in children.read_text(encoding="ascii").split():
                    os.kill(int(child), signal.SIGKILL)
            yield lambda amount: None

    path = convert(cli, tiny, tmp_path / "f32.gguf")
    text.write_text(text.read_text(encoding="utf-8") * 20, encoding="utf-8")
    with pytest.raises(AlphaQError, match=r"f32\.gguf, the reference: out of memory: its process was killed"):
        make(path, text, tmp_path / "cache", max_windows=100, reporter=Killer())
    assert (next(tmp_path.glob("cache/reference-*")) / "base.kld.partial").exists()
    assert make(path, text, tmp_path / "cache", max_windows=100).text.n_windows == 100


def test_other_hyperparameters_make_another_reference(tiny_copy: Path, text: Path, tmp_path: Path) -> None:
    first = make(tiny_copy, text, tmp_path / "cache")
    edit_json(tiny_copy, "config.json", num_experts_per_tok=1)
    second = make(tiny_copy, text, tmp_path / "cache")
    assert second.base.path != first.base.path
    assert second.info.perplexity != first.info.perplexity
    assert experts_of(second)[0].sum(axis=1).max() == 1
    assert make(tiny_copy, text, tmp_path / "cache", n_ctx=16).text.digest != second.text.digest


def test_the_reference_writes_text_itself(tiny: Path, text: Path, tmp_path: Path) -> None:
    source, cache, recorder = open_source(tiny), tmp_path / "cache", Recorder()
    both = make_reference(source, ["self", text], n_ctx=N_CTX, max_windows=2, cache_dir=cache, reporter=recorder)
    assert "Writing text" in recorder.tasks
    assert both.text.names == ("self", "text.txt")
    assert both.text.is_own
    assert both.text.n_windows == 4
    np.testing.assert_array_equal(both.windows[2:], make(tiny, text, cache, max_windows=2).windows)
    recorder = Recorder()
    own = make_reference(source, ["self"], n_ctx=N_CTX, max_windows=2, cache_dir=cache, reporter=recorder)
    assert "Writing text" not in recorder.tasks
    np.testing.assert_array_equal(own.windows, both.windows[:2])
    other = make_reference(source, ["self"], n_ctx=N_CTX, max_windows=2, cache_dir=cache, seed=7)
    assert (other.windows != own.windows).any()


def test_two_runs_do_not_share_the_temporary_file_that_writes_text(tiny: Path, tmp_path: Path) -> None:
    class Noting(Silent):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, message: str) -> None:
            self.notes.append(message)

    source, cache, reporter = open_source(tiny), tmp_path / "cache", Noting()
    home = cache / f"own-text-{source.fingerprint[:24]}"
    with subprocess.Popen([sys.executable, "-c", HOLD, home], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        own = make_reference(source, ["self"], n_ctx=N_CTX, max_windows=2, cache_dir=cache, reporter=reporter)
    assert own.text.n_windows == 2
    assert reporter.notes[0] == f"Waiting for another run, which is at work in {home}"
    assert reporter.notes[1].endswith(f": {home / 'temporary.gguf'}")
    assert list(home.iterdir()) == []


HOLD = """
import sys, time
from pathlib import Path
from alphaq_gguf.alone import alone
from alphaq_gguf.reporter import Silent
with alone(Path(sys.argv[1]), Silent()):
    print("held", flush=True)
    time.sleep(1)
"""


@pytest.mark.parametrize("family", ["Qwen2Moe", "Ernie4_5_Moe"])
def test_a_base_file_of_llama_perplexity_is_a_reference(family: str, text: Path, tmp_path: Path, cli) -> None:
    gguf = convert(cli, build_moe(tmp_path / "model", family), tmp_path / "f32.gguf")
    base = tmp_path / "theirs.kld"
    options = ["-c", N_CTX, "-b", N_CTX, "--chunks", 5, "-t", 1, "-fa", "off", "-ctk", "f32", "-ctv", "f32"]
    arguments = ["-m", gguf, "-f", text, "--kl-divergence-base", base, "--no-repack", *options]
    found = re.search(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", run_perplexity(*arguments))
    assert found
    value, error = map(float, found.groups())
    theirs, ours = read_reference(base), make(gguf, text, tmp_path / "cache")
    for reference in (theirs, ours):
        assert reference.info.perplexity.value == pytest.approx(value, rel=1e-4)
        assert reference.info.perplexity.standard_error == pytest.approx(error, rel=1e-2)
    assert theirs.info.engine == "file"
    assert theirs.routes is None
    # Where the model wants BOS, it stands before each window here, and there is put in the place of its first token.
    np.testing.assert_array_equal(theirs.windows[:, 1:], ours.windows[:, 1:])
    assert (theirs.windows == ours.windows).all() == (family == "Qwen2Moe")
    again = read_reference(Path(shutil.copy(base, tmp_path / "other.kld")))
    assert again.info.fingerprint == theirs.info.fingerprint
    damaged = bytearray(base.read_bytes())
    damaged[-20] ^= 1
    (tmp_path / "other.kld").write_bytes(damaged)
    assert read_reference(tmp_path / "other.kld").info.fingerprint != theirs.info.fingerprint
    (tmp_path / "other.kld").write_bytes(damaged[:-20])
    with pytest.raises(AlphaQError, match=r"other\.kld: base file cut short"):
        read_reference(tmp_path / "other.kld")


def test_a_full_disk_is_said_before_anything_runs(tiny: Path, text: Path, tmp_path: Path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    n_hidden, n_base = 2 * 4 * 5 * N_CTX * 256, 2 * 5 * 15 * (400 + 4)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, n_hidden + n_base - 1))
    recorder = Recorder()
    with pytest.raises(OutputError, match=f"disk full: hidden states take {n_hidden:,} bytes .* {n_base:,}, .* free"):
        make(tiny, text, tmp_path / "cache", reporter=recorder)
    assert recorder.tasks == []
