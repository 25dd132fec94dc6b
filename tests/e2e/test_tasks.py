"""Zero-shot tasks in llama.cpp and PyTorch against lm-evaluation-harness' own model for transformers."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import ROOT, build_moe
from tokenizer_files import edit_json
from tokenizers import Tokenizer, processors

from alphaq_gguf.errors import AlphaQError
from alphaq_gguf.evaluate.blocks import FileBlocks
from alphaq_gguf.evaluate.llama import LlamaModel, log_softmax
from alphaq_gguf.evaluate.torch_model import TorchModel
from alphaq_gguf.pipeline import AllocationSettings, allocate, convert, open_source
from alphaq_gguf.reporter import Silent
from alphaq_gguf.tasks.run import TASKS, check_tasks, run_tasks
from alphaq_gguf.tasks.scoring import Request, open_scorer
from alphaq_gguf.tensor_types import parse_overrides

with warnings.catch_warnings():
    # What the harness and its libraries warn of when they are imported is theirs.
    warnings.simplefilter("ignore")
    pytest.importorskip("lm_eval", reason="the harness is absent: pip install '.[eval]'")
    import datasets
    import huggingface_hub
    from lm_eval.api.instance import Instance

    from alphaq_gguf.tasks.language_model import HarnessModel

pytestmark = pytest.mark.usefixtures("one_torch_thread", "own_data_cache")

OWN = Path("tests/tasks")
N_CTX = 256
# The metric that counts of each task.
METRICS = {
    "code_choice": "acc_norm",
    "code_acc": "acc",
    "code_word": "acc",
    "code_written": "exact_match",
}
ENGINES: dict[str, Callable[..., Any]] = {
    "llama.cpp": lambda path, n_ctx=N_CTX: LlamaModel(path, n_ctx=n_ctx, threads=1, exact=True),
    "pytorch": lambda path, n_ctx=N_CTX: TorchModel(FileBlocks(path), n_ctx=n_ctx),
}


class Recorder(Silent):
    """What was reported."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.bars: dict[str, list[int]] = {}

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        self.bars[label] = [total]
        yield self.bars[label].append

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture(scope="module")
def own_data_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Data sets are kept apart from the user's, and nobody asks the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        # The tasks' files name their data from the repository's root.
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="module")
def begun_by_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer begins every text by BOS."""
    directory = build_moe(tmp_path_factory.mktemp("bos") / "model")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]),
        ]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    edit_json(directory, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", bos_token="<|endoftext|>")
    return directory


@pytest.fixture(scope="module")
def file_of(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Callable[[Path], Path]:
    """A checkpoint as a GGUF in float32."""
    made: dict[Path, Path] = {}

    def find(checkpoint: Path) -> Path:
        if checkpoint not in made:
            source = open_source(checkpoint)
            settings = AllocationSettings(bpw=32, overrides=parse_overrides([r"\.weight$=F32"]))
            made[checkpoint] = tmp_path_factory.mktemp("f32") / "f32.gguf"
            convert(source, allocate(source, settings, cache_dir=cache_dir), made[checkpoint])
        return made[checkpoint]

    return find


def open_oracle(checkpoint: Path) -> Any:
    """The harness' model for transformers in float32."""
    pytest.importorskip("accelerate", reason="the harness' model for transformers needs accelerate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.models.huggingface import HFLM

        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        # The bundled model's own would outweigh what tasks say.
        model.generation_config.max_new_tokens = None
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
        # What ends a text in llama.cpp's eyes.
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        # Its cache takes the wrong logits where texts repeat themselves.
        return HFLM(
            pretrained=model, tokenizer=tokenizer, max_length=N_CTX, batch_size=4, device="cpu", logits_cache=False
        )


@pytest.fixture(scope="module")
def expected(trained: Path, own_data_cache: None) -> dict[str, Any]:
    """What the harness itself finds of the bundled model."""
    oracle = open_oracle(trained)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.evaluator import evaluate
        from lm_eval.tasks import TaskManager

        tasks = TaskManager(include_path=OWN, include_defaults=False).load(list(METRICS))
        for task in tasks["tasks"].values():
            task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=1234)
        return evaluate(lm=oracle, task_dict=tasks, bootstrap_iters=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_scores_are_those_of_the_harness(
    engine: str, trained: Path, file_of, expected, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    reporter = Recorder()
    with ENGINES[engine](file_of(trained)) as model:
        capfd.readouterr()
        caplog.clear()
        found = run_tasks(
            model, list(METRICS), limit=None, task_dir=OWN, file="f32.gguf", engine=engine, reporter=reporter
        )
    assert [(score.file, score.engine, score.task, score.metric, score.n) for score in found] == [
        ("f32.gguf", engine, name, metric, 20) for name, metric in METRICS.items()
    ]
    for score in found:
        theirs = expected["results"][score.task][f"{score.metric},none"]
        assert score.score.value == pytest.approx(theirs, rel=1e-5)
        assert 0 < theirs < 1, "a score that most mistakes leave as it is"
        values = [sample[score.metric] for sample in expected["samples"][score.task]]
        assert score.score.standard_error == pytest.approx(np.std(values, ddof=1) / 20**0.5)
    assert expected["results"]["code_choice"]["acc,none"] != expected["results"]["code_choice"]["acc_norm,none"]
    # Every request advances its bar, and nothing else is heard of the harness.
    assert list(reporter.bars) == [f"{name}, f32.gguf in {engine}" for name in METRICS]
    assert all(sum(advances) == total for total, *advances in reporter.bars.values())
    assert reporter.notes == []
    assert (*capfd.readouterr(), caplog.records) == ("", "", [])
    assert logging.root.manager.disable == 0


def ask(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("", 0, 1))


LONG = "def function(argument):\n    return argument + 1\n\n" * 40
CHAT = "<|im_start|>user\nWhat is a list?<|im_end|>\n<|im_start|>assistant\n"
PAIRS = [
    ("import os\nimport", " sys"),
    ("import os\nimport", " sys, re"),
    ("import os\nimport", " o"),
    ("import os\nimport ", "sys"),
    ("import os\nimport  \n", "sys"),
    ("", "def main():"),
    ("", "<|endoftext|>def main():"),
    ("Größe = '東京'\nprint(Größe,", " 'naïve')"),
    ("<|im_start|>user\nhello<|im_end|>\n", "<|im_start|>assistant"),
    ("<|endoftext|>import", " re"),
    (LONG, "x = 1"),
    (LONG, "x = 2"),
    ("x", LONG[:200]),
]


@pytest.mark.parametrize("checkpoint", ["trained", "begun_by_bos"])
def test_answers_are_those_of_the_harness(checkpoint: str, file_of, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(checkpoint)
    oracle = open_oracle(directory)
    pairs = [ask("loglikelihood", *pair) for pair in PAIRS]
    texts = [ask("loglikelihood_rolling", text) for text in ("", "import os\n", LONG, "Größe")]
    stops = [["\n"], ["("], ["\n\n", "return"], []]
    prompts = [ask("generate_until", LONG[:-9] + "x", {"until": until, "max_gen_toks": 40}) for until in stops]
    prompts.append(ask("generate_until", "import", {"until": "\n", "max_new_tokens": 30}))
    prompts.append(ask("generate_until", "import", {"max_gen_toks": 20}))
    prompts.append(ask("generate_until", CHAT, {"until": [], "max_gen_toks": 120}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = [oracle.loglikelihood(pairs), oracle.loglikelihood_rolling(texts), oracle.generate_until(prompts)]
    assert len(set(theirs[2])) > 1
    for engine, open_model in ENGINES.items():
        reporter = Recorder()
        with open_model(file_of(directory)) as model:
            harness = HarnessModel(open_scorer(model), "A task", reporter)
            ours = harness.loglikelihood(pairs), harness.loglikelihood_rolling(texts), harness.generate_until(prompts)
        np.testing.assert_allclose([a for a, _ in ours[0]], [a for a, _ in theirs[0]], rtol=0, atol=1e-3)
        assert [b for _, b in ours[0]] == [b for _, b in theirs[0]]
        np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=1e-3)
        assert ours[2] == theirs[2], engine
        assert reporter.notes == ["A task: 2 of 13 requests lose what exceeds 256 tokens"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", ["Qwen3Next", "GptOss"])
def test_what_sequences_share_is_not_confused(engine: str, family: str, file_of, tmp_path: Path) -> None:
    # Recurrent states, which cannot be taken back, and attention windows of 16 tokens; llama.cpp's batches have 512.
    draw = np.random.default_rng(0)

    def some(n: int) -> tuple[int, ...]:
        return tuple(draw.integers(3, 390, n).tolist())

    begin, other = some(60), some(600)
    rows = [begin, begin + other[:9], begin + other[:9], begin[:40] + other[:30], other, begin[:3], begin + other[:20]]
    requests = [Request(tokens, some(n)) for tokens, n in zip(rows, (1, 9, 3, 30, 200, 2, 1), strict=True)]
    with ENGINES[engine](file_of(build_moe(tmp_path / "model", family)), 640) as model:
        likeliest = tuple(model.logits(other)[-200:].argmax(-1).tolist())
        requests += [Request(other, likeliest), Request(other, ((likeliest[0] + 1) % 400, *likeliest[1:]))]
        answers = dict(open_scorer(model).score(requests))
        for i, (tokens, targets) in enumerate((request.tokens, request.targets) for request in requests):
            logp = log_softmax(model.logits(tokens)[-len(targets) :].astype(np.float64))
            assert answers[i].logprob == pytest.approx(logp[range(len(targets)), targets].sum(), abs=1e-3)
            assert answers[i].is_greedy == (targets == tuple(logp.argmax(-1)))
    assert answers[len(rows)].is_greedy


@pytest.fixture(scope="module")
def trained_model(trained: Path, file_of) -> Iterator[LlamaModel]:
    with ENGINES["llama.cpp"](file_of(trained)) as model:
        yield model


def refuse(model: Any, names: Sequence[str], task_dir: Path | None = OWN, limit: int | None = None) -> str:
    with pytest.raises(AlphaQError) as caught:
        run_tasks(model, names, limit=limit, task_dir=task_dir, file="a", engine="b", reporter=Silent())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_six_tasks_are_known_and_their_data_come_from_the_hub(trained_model: LlamaModel) -> None:
    for name in TASKS:
        # The network is out of reach.
        message = refuse(trained_model, [name])
        assert message.startswith(f"task {name}: its data set ")
        assert "offline" in message.lower()
        assert "connect to the Hugging Face Hub" in message


def test_what_cannot_be_run_is_said_in_a_line(trained_model: LlamaModel, tmp_path: Path) -> None:
    unknown = refuse(trained_model, ["code_acc", "hellaswg"])
    assert unknown.startswith("task hellaswg: no such task in lm-evaluation-harness or tests/tasks")
    assert "piqa, arc_easy, arc_challenge, hellaswag, winogrande, boolq" in unknown
    assert "is no directory" in refuse(trained_model, ["code_acc"], Path("README.md"))
    assert "expected at least 2 examples, found 1" in refuse(trained_model, ["code_acc"], limit=1)
    assert "task code_text: measures byte_perplexity, expected a share" in refuse(trained_model, ["code_text"])
    text = (OWN / "code_choice.yaml").read_text(encoding="utf-8")
    (tmp_path / "lost.yaml").write_text(text.replace("continuations", "nothing"), encoding="utf-8")
    assert "its data set json cannot be loaded: Unable to find" in refuse(trained_model, ["code_choice"], tmp_path)


def test_the_limit_counts_examples(trained_model: LlamaModel, expected) -> None:
    (score,) = run_tasks(trained_model, ["code_acc"], limit=7, task_dir=OWN, file="a", engine="b", reporter=Silent())
    assert score.n == 7
    assert score.score.value == pytest.approx(
        np.mean([sample["acc"] for sample in expected["samples"]["code_acc"][:7]])
    )


def test_requests_beyond_the_context_are_refused(trained_model: LlamaModel) -> None:
    harness = HarnessModel(open_scorer(trained_model), "A task", Silent())
    with pytest.raises(AlphaQError, match=r"a text to score has \d+ tokens, expected 1 to 256"):
        harness.loglikelihood([ask("loglikelihood", "x", LONG)])
    with pytest.raises(AlphaQError, match="asks for 256 tokens, the context has 256"):
        harness.generate_until([ask("generate_until", "x", {"until": []})])
    with pytest.raises(AlphaQError, match="samples its texts"):
        harness.generate_until([ask("generate_until", "x", {"do_sample": True, "temperature": 0.7})])


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(AlphaQError) as caught:
        check_tasks(["piqa"], None)
    assert caught.value.hint == "pip install 'alphaq-gguf[eval]'"
