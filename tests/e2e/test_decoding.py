"""Text token by token: over a cache of fixed size, as without any cache, and with and without CUDA graphs."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from alphaq_kernels import moe_decode
from checkpoints import FAMILIES, build_moe
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alphaq_gguf.cli import main
from alphaq_gguf.evaluate import packed_experts
from alphaq_gguf.evaluate.blocks import FileBlocks
from alphaq_gguf.evaluate.decoding import Decoder
from alphaq_gguf.evaluate.torch_model import TorchModel
from alphaq_gguf.evaluate.transformers_library import cache_name

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# Share of the logit range that f32 arithmetic in another order costs.
BOUND = 2e-5
PROMPT = [int(t) for t in np.random.default_rng(0).integers(3, 390, 12)]
N_TOKENS = 24
# The last token drawn is not read.
N_CTX = len(PROMPT) + N_TOKENS - 1
FLOATS = ("--bpw", "32", "--tensor-type", r"\.weight$=F32")


def convert(source: Path, out: Path, cache_dir: Path) -> Path:
    assert main(["convert", str(source), "-o", str(out), "-q", "--cache-dir", str(cache_dir), *FLOATS]) == 0
    return out


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def file(family: str, tmp_path_factory, cache_dir: Path) -> Path:
    directory = tmp_path_factory.mktemp("decoding")
    return convert(build_moe(directory / "model", family), directory / "f32.gguf", cache_dir)


@pytest.fixture(scope="module")
def model(file: Path) -> Any:
    return TorchModel(FileBlocks(file)).model


@pytest.fixture(scope="module")
def trained_file(trained: Path, tmp_path_factory, cache_dir: Path) -> Path:
    return convert(trained, tmp_path_factory.mktemp("decoding") / "trained.gguf", cache_dir)


@torch.no_grad()
def rerun(
    model: Any, tokens: Sequence[int], n_tokens: int, pick: Callable[[torch.Tensor], int] = lambda x: int(x.argmax())
) -> tuple[list[int], torch.Tensor]:
    """Tokens that follow `tokens`, and the logits they were picked from, the whole text read again for each."""
    text, logits = list(tokens), []
    for _ in range(n_tokens):
        logits.append(model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1])
        text.append(pick(logits[-1]))
    return text[len(tokens) :], torch.stack(logits)


@torch.no_grad()
def run_growing_cache(model: Any, tokens: Sequence[int], n_tokens: int) -> list[int]:
    """Greedy tokens over the cache that transformers takes by itself."""
    ids, cache, drawn = torch.tensor([list(tokens)]), None, []
    for _ in range(n_tokens):
        output = model(input_ids=ids, use_cache=True, **{cache_name(model): cache})
        ids, cache = output.logits[:, -1:].argmax(-1), output[cache_name(model)]
        drawn.append(int(ids))
    return drawn


def draw(decoder: Decoder, tokens: Sequence[int], n_tokens: int) -> tuple[list[int], torch.Tensor]:
    """As `rerun`, by `decoder`."""
    logits = []

    def pick(found: torch.Tensor) -> torch.Tensor:
        logits.append(found[0].cpu())
        return found.argmax(-1, keepdim=True)

    return [int(ids) for ids in decoder.draw(tokens, n_tokens, pick)], torch.stack(logits)


def check_same(found: tuple[list[int], torch.Tensor], expected: tuple[list[int], torch.Tensor]) -> None:
    assert found[0] == expected[0]
    assert (found[1] - expected[1]).abs().max() < BOUND * (expected[1].max() - expected[1].min())


def test_a_cache_of_fixed_size_changes_nothing_and_may_be_filled(model: Any) -> None:
    decoder = Decoder(model, N_CTX)
    found = draw(decoder, PROMPT, N_TOKENS)
    assert len(set(found[0])) > N_TOKENS / 2, "a text that repeats itself compares little"
    check_same(found, rerun(model, PROMPT, N_TOKENS))
    assert found[0] == run_growing_cache(model, PROMPT, N_TOKENS)
    with pytest.raises(ValueError, match=f"no step after {N_CTX} tokens"):
        decoder.step(torch.tensor([[5]]))


def test_a_second_text_may_begin_with_one_token_and_finds_nothing_of_the_first(model: Any) -> None:
    decoder, fresh = Decoder(model, N_CTX), Decoder(model, N_CTX)
    draw(decoder, PROMPT, N_TOKENS)
    found = draw(decoder, PROMPT[:1], 10)
    check_same(found, rerun(model, PROMPT[:1], 10))
    assert torch.equal(found[1], draw(fresh, PROMPT[:1], 10)[1])


def test_masks_alone_keep_attention_within_its_chunks(tmp_path: Path) -> None:
    # llama.cpp has one size of chunks, too long for a test, so that there is no file of this model.
    directory = build_moe(tmp_path / "model", "Llama4", attention_chunk_size=16)
    model = transformers.Llama4ForCausalLM.from_pretrained(directory).eval()
    check_same(draw(Decoder(model, N_CTX), PROMPT, N_TOKENS), rerun(model, PROMPT, N_TOKENS))


class ReplayedStep(TorchDispatchMode):
    """What a CUDA graph does, on the CPU: the operations of a step, run again on the very same tensors.

    `waits` are those that a graph cannot hold, as they read from the device or bring numbers to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self._is_inside_one = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._is_inside_one:
            return func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or name in ("_local_scalar_dense", "nonzero", "lift_fresh", "_unique2", "bincount", "equal"):
            frame = traceback.extract_stack()[-2]
            self.waits.append(f"{name} in {frame.filename}:{frame.lineno}")
        return self._run(func, args, kwargs or {})

    def as_one(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` as one operation: the experts, whose twin for the CPU asks which are chosen, as kernels do not."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._is_inside_one = True
            try:
                return self._run(function, args, kwargs)
            finally:
                self._is_inside_one = False

        return run

    def _run(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self._calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                # Views, and what is changed in place, are there already.
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def skip_where_masks_come_from_the_host(family: str) -> None:
    if family == "GptOss" and transformers.__version__ < "5.23":
        pytest.skip("this transformers brings a number to the device in every mask of eager attention")


def test_a_step_can_be_replayed_for_every_token_of_every_text(
    family: str, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_where_masks_come_from_the_host(family)
    expected = draw(Decoder(model, N_CTX), PROMPT, N_TOKENS)
    decoder, step, ids = Decoder(model, N_CTX), ReplayedStep(), torch.tensor([[0]])
    decoder.prefill([0])
    monkeypatch.setattr(packed_experts, "moe_decode", step.as_one(moe_decode))
    with step:
        logits = decoder.step(ids)
    monkeypatch.undo()
    assert step.waits == []
    found = [decoder.prefill(PROMPT)[0]]
    for token in expected[0][:-1]:
        ids.fill_(token)
        with torch.no_grad():
            step.replay()
        found.append(logits[0].clone())
    assert torch.equal(torch.stack(found), expected[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_change_nothing(dtype: torch.dtype, family: str, file: Path) -> None:
    skip_where_masks_come_from_the_host(family)
    model = TorchModel(FileBlocks(file), device="cuda", dtype=dtype).model
    plain, captured = Decoder(model, N_CTX, graphs=False), Decoder(model, N_CTX)
    assert captured.note is None
    for tokens, n_tokens in ((PROMPT, N_TOKENS), (PROMPT[:1], 10)):
        expected, found = (draw(decoder, tokens, n_tokens) for decoder in (plain, captured))
        assert found[0] == expected[0]
        assert torch.equal(found[1], expected[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_step_that_waits_for_the_device_runs_without_graphs(trained_file: Path) -> None:
    model = TorchModel(FileBlocks(trained_file), device="cuda").model
    expected = draw(Decoder(model, N_CTX), PROMPT, N_TOKENS)
    model.model.norm.register_forward_hook(
        lambda module, given, result: result if bool((result == result).all()) else 0
    )
    decoder = Decoder(model, N_CTX)
    assert "without CUDA graphs" in (decoder.note or "")
    found = draw(decoder, PROMPT, N_TOKENS)
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])


@pytest.fixture
def talker(trained_file: Path) -> Iterator[TorchModel]:
    with TorchModel(FileBlocks(trained_file), n_ctx=512, seed=3) as model:
        yield model


def test_models_without_a_cache_of_fixed_size_take_one_that_grows(talker: TorchModel) -> None:
    expected = rerun(talker.model, PROMPT, 10)
    talker.model._can_compile_fullgraph = False
    decoder = Decoder(talker.model, N_CTX)
    check_same(draw(decoder, PROMPT, 10), expected)
    check_same(draw(decoder, PROMPT, 10), expected)


def test_drawn_tokens_are_those_of_the_seed(talker: TorchModel) -> None:
    generator = torch.Generator().manual_seed(3)

    def pick(logits: torch.Tensor) -> int:
        p = (logits / 1.5).softmax(-1)
        return int(torch.multinomial(p * (p >= 0.05 * p.max()), 1, generator=generator))

    tokens = talker.vocabulary.tokenize("import ")
    expected = talker.vocabulary.llm.detokenize(rerun(talker.model, tokens, 30, pick)[0]).decode()
    assert "".join(talker.generate("import ", max_tokens=30, temperature=1.5, chat=False)) == expected


def test_text_ends_where_the_model_ends_it(talker: TorchModel) -> None:
    question = "What does json.dumps do?"
    text = "".join(talker.generate(question, max_tokens=400, temperature=0, chat=True))
    prompt = talker.vocabulary.tokenize(
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", special=True
    )
    drawn, end = rerun(talker.model, prompt, 60)[0], talker.vocabulary.llm.token_eos()
    assert end in drawn
    assert talker.vocabulary.llm.detokenize(drawn[: drawn.index(end)]).decode() == text != ""


def test_a_longer_text_after_a_shorter_one(talker: TorchModel) -> None:
    asked = {"temperature": 0.0, "chat": False}
    short = "".join(talker.generate("import ", max_tokens=5, **asked))
    long = "".join(talker.generate("import ", max_tokens=300, **asked))
    assert len(long) > 100
    assert long.startswith(short)
    assert "".join(talker.generate("import ", max_tokens=5, **asked)) == short


def test_a_cache_holds_one_text_at_a_time(talker: TorchModel) -> None:
    decoder = Decoder(talker.model, N_CTX)
    first = decoder.draw(PROMPT, 3)
    next(first)
    next(decoder.draw(PROMPT[:5], 3))
    with pytest.raises(RuntimeError, match="another sequence"):
        next(first)


@pytest.mark.parametrize("n_tokens", [0, N_CTX + 1])
def test_prompts_that_do_not_fit_are_refused(n_tokens: int, talker: TorchModel) -> None:
    with pytest.raises(ValueError, match=f"1 to {N_CTX} tokens, not {n_tokens}"):
        Decoder(talker.model, N_CTX).prefill([5] * n_tokens)


def test_no_step_before_a_prompt(talker: TorchModel) -> None:
    with pytest.raises(ValueError, match="no step after 0 tokens"):
        Decoder(talker.model, N_CTX).step(torch.tensor([[5]]))
