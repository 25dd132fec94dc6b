"""Our figures are those that llama-perplexity prints, and each reads the base file that the other wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CORPUS, build_moe
from oracles import run_perplexity

from alphaq_gguf.compare.data import Comparison, from_plain
from alphaq_gguf.evaluate.base_file import BaseFile, BaseWriter
from alphaq_gguf.evaluate.llama import LlamaModel
from alphaq_gguf.evaluate.metrics import Divergence, Estimate, compress, row_words, scored, summarize, token_stats

FLOAT = ("--bpw", 32, "--tensor-type", r"\.weight$=F32")
Q2_K_EXPERTS = ("--strategy", "uniform", "--types", "Q2_K", "--bpw", 2.7)
# What LlamaModel's `exact` does, one window at a time.
EXACT = ("-t", 1, "-ctk", "f32", "-ctv", "f32", "-fa", "off", "--no-repack")

# What it does by itself, but for weights rearranged for the processor, whose products round otherwise on each.
DEFAULT = ("-t", 1, "--no-repack")

# Model, tokens in a window, windows; vocabularies and windows of even and of odd size, texts with BOS and without.
CASES = {"trained": (256, 12), "trained, odd windows": (101, 9), "odd vocabulary": (64, 6), "BOS, odd": (63, 5)}


@dataclass(frozen=True)
class Case:
    base: Path
    """A model in float32."""
    candidate: Path
    """The same with experts in Q2_K."""
    text: Path
    n_ctx: int
    n_windows: int
    has_bos: bool

    def windows(self) -> np.ndarray:
        with LlamaModel(self.base, n_ctx=self.n_ctx, threads=1) as model:
            assert (model.bos is not None) == self.has_bos
            return np.array(model.windows(self.text.read_text(encoding="utf-8"), self.n_ctx)[: self.n_windows])

    def logits(self, path: Path) -> Iterator[np.ndarray]:
        """Of the scored positions, by window."""
        with LlamaModel(path, n_ctx=self.n_ctx, threads=1, exact=True) as model:
            for window in self.windows().tolist():
                yield model.logits(window)[scored(self.n_ctx)]

    def perplexity(self, path: Path, *arguments: object, flags: tuple[object, ...] = EXACT) -> str:
        """What llama-perplexity prints of a model."""
        return run_perplexity("-m", path, *flags, "-c", self.n_ctx, "-b", self.n_ctx, *arguments)


@pytest.fixture(scope="module", params=CASES)
def case(request, trained: Path, heldout: str, tmp_path_factory, cache_dir: Path) -> Case:
    from alphaq_gguf.cli import main

    n_ctx, n_windows = CASES[request.param]
    directory = tmp_path_factory.mktemp("protocol")
    text, has_bos = "\n".join(CORPUS * 10), request.param.startswith("BOS")
    if request.param.startswith("trained"):
        source, text = trained, heldout[:40000]
    else:
        source = build_moe(directory / "model", "Ernie4_5_Moe" if has_bos else "Qwen2Moe", vocab_size=401)
    for name, options in (("base", FLOAT), ("candidate", Q2_K_EXPERTS)):
        command = ["convert", source, "-o", directory / f"{name}.gguf", "-q", "--cache-dir", cache_dir, *options]
        assert main([str(word) for word in command]) == 0
    # llama-perplexity leaves out a line feed at the end of its file.
    (directory / "text.txt").write_text(text.rstrip("\n"), encoding="utf-8")
    return Case(
        directory / "base.gguf", directory / "candidate.gguf", directory / "text.txt", n_ctx, n_windows, has_bos
    )


@pytest.fixture(scope="module")
def theirs(case: Case) -> tuple[Path, str]:
    """The base file that llama-perplexity writes, and what it prints with that."""
    path = case.text.with_name("theirs.base")
    printed = case.perplexity(case.base, "-f", case.text, "--chunks", case.n_windows, "--kl-divergence-base", path)
    return path, printed


def judge(case: Case, base: BaseFile, path: Path) -> tuple[Estimate, Estimate, Divergence]:
    """A model against a base file, by our arithmetic."""
    targets = case.windows()[:, scored(case.n_ctx).start + 1 :]
    stats = [token_stats(logits, base.rows(i), targets[i]) for i, logits in enumerate(case.logits(path))]
    return summarize(np.concatenate(stats))


def assert_printed(printed: str, name: str, found: Estimate | float, unit: float = 1) -> None:
    """`found` is the figure printed as `name`, and its error the one behind it, to two units of the last digit."""
    match = re.search(
        rf"^(?:.* )?{re.escape(name)} *[:=] +(-?[\d.]+)(?: *%? (?:±|\+/-) +([\d.]+))?", printed, re.MULTILINE
    )
    assert match, (name, printed[-3000:])
    values = (found.value, found.standard_error) if isinstance(found, Estimate) else (found,)
    for value, digits in zip(values, match.groups(), strict=False):
        last = 10.0 ** -len(digits.split(".")[1])
        assert value * unit == pytest.approx(float(digits), abs=2 * last, rel=1e-7), (name, digits)


def assert_all_printed(printed: str, figures: tuple[Estimate, Estimate, Divergence]) -> None:
    perplexity, base_perplexity, divergence = figures
    assert_printed(printed, "Mean PPL(Q)", perplexity)
    assert_printed(printed, "Mean PPL(base)", base_perplexity)
    assert_printed(printed, "Mean    KLD", divergence.kld)
    assert_printed(printed, "Median  KLD", divergence.kld_median)
    assert_printed(printed, "99.9%   KLD", divergence.kld_p999)
    assert_printed(printed, "Maximum KLD", divergence.kld_max)
    assert_printed(printed, "RMS Δp", divergence.rms_dp, unit=100)
    assert_printed(printed, "Same top p", divergence.top1, unit=100)


def test_its_base_file_holds_our_tokens_and_our_rows(case: Case, theirs: tuple[Path, str]) -> None:
    base, windows = BaseFile(theirs[0]), case.windows()
    assert (base.n_ctx, base.n_windows) == (case.n_ctx, case.n_windows)
    # BOS takes the place of a window's first token only when the model runs.
    np.testing.assert_array_equal(base.windows[:, case.has_bos :], windows[:, case.has_bos :])
    assert (base.windows[1:, 0] == windows[1:, 0]).all() != case.has_bos
    differing = n_codes = 0
    for i, logits in enumerate(case.logits(case.base)):
        found, expected = compress(logits), base.rows(i)
        assert found.shape == expected.shape == (len(logits), row_words(base.n_vocab))
        np.testing.assert_allclose(found[:, :4].view(np.float32), expected[:, :4].view(np.float32), rtol=1e-6)
        gaps = abs(found[:, 4:].astype(int) - expected[:, 4:])
        assert gaps.max() <= 1
        differing, n_codes = differing + gaps.sum(), n_codes + gaps.size
    # Compilers may join a product and a sum, which rounds otherwise.
    assert differing < 1e-3 * n_codes


def test_divergence_is_what_it_prints_of_its_own_base_file(case: Case, theirs: tuple[Path, str]) -> None:
    path, _ = theirs
    printed = case.perplexity(case.candidate, "--kl-divergence", "--kl-divergence-base", path)
    figures = judge(case, BaseFile(path), case.candidate)
    assert figures[2].kld.value > 0.01
    assert_all_printed(printed, figures)


def test_it_reads_our_base_file_as_we_do(case: Case) -> None:
    path = case.text.with_name("ours.base")
    with LlamaModel(case.base, n_ctx=case.n_ctx, threads=1) as model:
        n_vocab = model.llm.n_vocab()
    with BaseWriter(path, case.windows(), n_vocab) as writer:
        for logits in case.logits(case.base):
            writer.append(compress(logits))
    printed = case.perplexity(case.candidate, "--kl-divergence", "--kl-divergence-base", path)
    assert_all_printed(printed, judge(case, BaseFile(path), case.candidate))


def test_perplexity_is_what_it_prints_without_a_base(case: Case, theirs: tuple[Path, str]) -> None:
    base = BaseFile(theirs[0])
    candidate, own, _ = judge(case, base, case.candidate)
    printed = case.perplexity(case.candidate, "-f", case.text, "--chunks", case.n_windows)
    assert_printed(printed, "Final estimate: PPL", candidate)
    # The base's rows are rounded; what it printed when it wrote them is not.
    match = re.search(r"PPL = ([\d.]+)", theirs[1])
    assert match
    assert own.value == pytest.approx(float(match[1]), rel=1e-4)


def test_a_model_is_hardly_off_its_own_rounded_base(case: Case, theirs: tuple[Path, str]) -> None:
    path, _ = theirs
    printed = case.perplexity(case.base, "--kl-divergence", "--kl-divergence-base", path)
    perplexity, base_perplexity, divergence = judge(case, BaseFile(path), case.base)
    assert_printed(printed, "Mean    KLD", divergence.kld)
    assert_printed(printed, "Maximum KLD", divergence.kld_max)
    assert abs(divergence.kld.value) < 1e-5
    assert divergence.kld_max < 2e-4
    assert divergence.top1.value > 0.99
    assert perplexity.value == pytest.approx(base_perplexity.value, rel=1e-4)


def test_its_running_figures_are_those_of_our_first_windows(case: Case, theirs: tuple[Path, str]) -> None:
    running = [float(value) for value in re.findall(r"\[\d+\]([\d.]+),", theirs[1])]
    assert len(running) == case.n_windows
    base, targets = BaseFile(theirs[0]), case.windows()[:, scored(case.n_ctx).start + 1 :]
    stats = [token_stats(logits, base.rows(i), targets[i]) for i, logits in enumerate(case.logits(case.base))]
    found = [summarize(np.concatenate(stats[: i + 1]))[0].value for i in range(case.n_windows)]
    assert all(a != b for a, b in pairwise(running))
    np.testing.assert_allclose(found, running, rtol=0, atol=2e-4)


@pytest.mark.parametrize("flags", [DEFAULT, EXACT])
def test_compare_finds_what_it_prints(case: Case, flags: tuple[object, ...], tmp_path: Path, cli) -> None:
    base = tmp_path / "base"
    arguments = ("-f", case.text, "--chunks", case.n_windows, "--kl-divergence-base", base)
    case.perplexity(case.base, *arguments, flags=flags)
    printed = case.perplexity(case.candidate, "--kl-divergence", "--kl-divergence-base", base, flags=flags)
    options = ("--engine", "llama", "--threads", 1, "--no-speed", "--json", *(["--exact"] if flags is EXACT else []))
    code, out, err = cli("compare", case.candidate, "--base", base, *options)
    assert code == 0, err
    found: Comparison = from_plain(Comparison, json.loads(out))
    one = found.evaluations[0]
    assert_all_printed(printed, (one.perplexity, found.reference.perplexity, one.divergence))
