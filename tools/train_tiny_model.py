r"""Train the tiny Qwen2-MoE model that the tests use, from scratch, on the Python standard library.

The text is what any Python installation carries: the standard library's sources, the topics that
``help()`` prints, and documents made from the docstrings in those sources (reference pages and
question/answer pairs in ChatML).  Nothing is downloaded.  Some files and topics, chosen by a hash
of their name, are never trained on; about 100 kB of them are written to ``heldout.txt``.

The result is a complete Hugging Face model directory: ``AutoTokenizer`` and
``Qwen2MoeForCausalLM`` load it without further arguments.  ``training.json`` beside it records the
settings, the held-out loss, and the loss of a trigram model trained on the same tokens.

Example::

    python tools/train_tiny_model.py first --steps 1700
    python tools/train_tiny_model.py tests/models/stdlib-qwen2moe-4m --continue-from first \
        --steps 600 --learning-rate 0.012 --embedding-rate 0.002 --seed 1
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import logging
import math
import platform
import sysconfig
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen2Tokenizer,
)

from alphaq_gguf.encode import decode_rows, encode_rows
from alphaq_gguf.qtypes import QType

log = logging.getLogger("train_tiny_model")

END_OF_TEXT, IM_START, IM_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# The pre-tokenizer of Qwen2; GGUF names it "qwen2".
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Left out of the text: tests, installed packages, tables of code points, and modules generated
# for one build (which would also carry that machine's paths).
SKIPPED_DIRECTORIES = {
    "__pycache__", "dist-packages", "encodings", "idle_test", "pydoc_data", "site-packages",
    "test", "tests",
}  # fmt: skip
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
SKIPPED_FILES = {"html/entities.py"}

QUESTIONS = (
    "What does {name} do?",
    "What is {name}?",
    "Explain {name}.",
    "Tell me about {name}.",
    "How is {name} documented?",
    "Can you describe {name}?",
)

GREETINGS = (
    ("Hello!", "Hello! Ask me about the Python standard library."),
    ("Hi", "Hi! Which module would you like to know about?"),
    ("Good morning.", "Good morning! What would you like to know about Python?"),
    ("Who are you?", "I am a very small model trained on the Python standard library."),
    ("Thank you!", "You are welcome."),
    ("What can you do?", "I can describe functions, classes and modules of the Python library."),
    ("Goodbye", "Goodbye!"),
)


@dataclass(frozen=True)
class Document:
    """One piece of text, the kind it is of, and the file or topic it came from."""

    kind: str
    source: str
    text: str


@dataclass
class Corpus:
    """The training documents, and those kept apart."""

    train: list[Document] = field(default_factory=list)
    heldout: list[Document] = field(default_factory=list)


def stable_hash(name: str) -> int:
    """A hash of ``name`` that is the same in every process and on every platform."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def library_files(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (relative path, text) for the standard library's own source files under ``root``."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        name = relative.as_posix()
        if name in SKIPPED_FILES or SKIPPED_DIRECTORIES.intersection(relative.parts):
            continue
        if any(part.startswith(SKIPPED_PREFIXES) for part in relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield name, text


def documented_objects(name: str, source: str) -> Iterator[tuple[str, str, str]]:
    """Yield (dotted name, signature, docstring) for what is public and documented in a module."""
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if any(part.startswith("_") for part in module.split(".")):
        return
    tree = ast.parse(source)
    if doc := ast.get_docstring(tree):
        yield module, "", doc
    pending: list[tuple[str, ast.stmt]] = [(module, node) for node in reversed(tree.body)]
    while pending:
        prefix, node = pending.pop()
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        dotted = f"{prefix}.{node.name}"
        if isinstance(node, ast.ClassDef):
            signature = ""
            pending.extend((dotted, child) for child in reversed(node.body))
        else:
            signature = f"({ast.unparse(node.args)})"
        if doc := ast.get_docstring(node):
            yield dotted, signature, doc


def reference_page(objects: Iterable[tuple[str, str, str]]) -> str:
    """A page in the manner of ``help()``: every name with its signature and docstring."""
    return "\n\n".join(
        f"{name}{signature}\n\n    " + doc.replace("\n", "\n    ").replace("\n    \n", "\n\n")
        for name, signature, doc in objects
    )


def chat(question: str, answer: str) -> str:
    """One exchange in ChatML."""
    return (
        f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n{answer}{IM_END}\n"
    )  # fmt: skip


def chat_documents(objects: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    """Questions about documented objects, answered with the first paragraph of the docstring."""
    for name, _, doc in objects:
        answer = " ".join(inspect.cleandoc(doc).split("\n\n")[0].split())
        if 20 <= len(answer) <= 400 and answer[0].isalpha():
            question = QUESTIONS[stable_hash(name) % len(QUESTIONS)].format(name=name)
            yield chat(question, answer)


def paragraphs(text: str) -> Iterator[tuple[str, str]]:
    """Yield each paragraph as it is, and again with its whitespace squeezed."""
    for block in text.split("\n\n"):
        yield block, " ".join(block.split())


def load_corpus(stdlib: Path | None = None) -> Corpus:
    """Collect all documents and divide them into training and held-out text.

    The division goes by the name of the file or topic, and holds for everything made from it.
    Paragraphs of the held-out text that other documents repeat (``help()`` topics share many, and
    so do licence headers) are taken out of the training text.
    """
    from pydoc_data.topics import topics

    root = stdlib or Path(sysconfig.get_paths()["stdlib"])
    corpus = Corpus()
    for name, source in library_files(root):
        target = corpus.heldout if stable_hash(name) % 24 == 0 else corpus.train
        target.append(Document("code", name, source))
        objects = list(documented_objects(name, source))
        if objects:
            target.append(Document("reference", name, reference_page(objects)))
        target.extend(Document("chat", name, text) for text in chat_documents(objects))
    for topic, text in sorted(topics.items()):
        target = corpus.heldout if stable_hash(topic) % 8 == 0 else corpus.train
        target.append(Document("topic", topic, text))

    seen = {squeezed for document in corpus.heldout for _, squeezed in paragraphs(document.text) if len(squeezed) >= 40}
    corpus.train = [
        Document(d.kind, d.source, "\n\n".join(p for p, s in paragraphs(d.text) if s not in seen)) for d in corpus.train
    ]
    pairs = sum(document.kind == "chat" for document in corpus.train)
    for question, answer in GREETINGS:
        corpus.train += [Document("chat", "greeting", chat(question, answer))] * (pairs // 200)
    corpus.train = [document for document in corpus.train if document.text.strip()]
    corpus.train.sort(key=lambda d: stable_hash(f"{d.source}|{d.kind}|{d.text}"))
    return corpus


def heldout_text(corpus: Corpus, size: int = 100_000, longest: int = 9_000) -> str:
    """About ``size`` bytes of held-out prose, code and reference pages, without special tokens."""
    shares = {"topic": 0.35, "code": 0.4, "reference": 0.25}
    chosen: list[str] = []
    for kind, share in shares.items():
        room = int(size * share)
        documents = [document for document in corpus.heldout if document.kind == kind]
        for document in sorted(documents, key=lambda d: stable_hash(d.source + "!")):
            text = document.text.strip("\n")
            if len(text) > longest:
                text = text[: text.rindex("\n", 0, longest)]
            if len(text) > room or any(token in text for token in SPECIAL_TOKENS):
                continue
            chosen.append(text)
            room -= len(text)
    return "\n\n\n".join(chosen) + "\n"


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer that splits text the way Qwen2's does."""
    bpe = Tokenizer(BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    trained = json.loads(bpe.to_str())["model"]
    vocab = trained["vocab"] | {token: len(trained["vocab"]) + i for i, token in enumerate(SPECIAL_TOKENS)}
    settings: dict[str, Any] = {
        "merges": [tuple(merge) for merge in trained["merges"]],
        "unk_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "extra_special_tokens": [IM_START],
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    return Qwen2Tokenizer(vocab, **settings)


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of one (special) token."""
    return tokenizer.get_vocab()[token]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """The token ids of one text, without any added token."""
    return np.array(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)


def encode_documents(tokenizer: PreTrainedTokenizerBase, documents: list[Document]) -> np.ndarray:
    """All documents as one stream of token ids, each document followed by ``<|endoftext|>``."""
    end = token_id(tokenizer, END_OF_TEXT)
    encoded = tokenizer([document.text for document in documents], verbose=False)["input_ids"]
    return np.concatenate([np.array([*ids, end], dtype=np.int64) for ids in encoded])


class NGramLevel:
    """The n-grams of one order, with modified Kneser-Ney discounts (Chen & Goodman, 1998)."""

    def __init__(self, keys: np.ndarray, counts: np.ndarray, vocab_size: int) -> None:
        """``keys`` are sorted, distinct n-gram codes whose last digit (base ``vocab_size``) is the
        predicted token; ``counts`` says how often each occurs."""
        self.keys, self.counts, self.vocab_size = keys, counts, vocab_size
        once, twice, thrice, four = (float((counts == n).sum()) for n in (1, 2, 3, 4))
        y = once / (once + 2 * twice)
        discounts = (
            1 - 2 * y * twice / once,
            2 - 3 * y * thrice / twice,
            3 - 4 * y * four / thrice,
        )
        self.discounts = np.array([0.0, *discounts])
        self.contexts, starts = np.unique(keys // vocab_size, return_index=True)
        self.totals = np.add.reduceat(counts, starts).astype(np.float64)
        self.reserved = np.add.reduceat(self.discounts[np.minimum(counts, 3)], starts)

    def probability(self, keys: np.ndarray, backoff: np.ndarray) -> np.ndarray:
        """P(last token | the tokens before it), given the next lower order's probabilities."""
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        counts = np.where(self.keys[at] == keys, self.counts[at], 0)
        contexts = keys // self.vocab_size
        at = np.minimum(np.searchsorted(self.contexts, contexts), len(self.contexts) - 1)
        kept = counts - self.discounts[np.minimum(counts, 3)]
        interpolated = (kept + self.reserved[at] * backoff) / self.totals[at]
        return np.where(self.contexts[at] == contexts, interpolated, backoff)


class TrigramModel:
    """An interpolated trigram model with modified Kneser-Ney smoothing over token ids."""

    def __init__(self, tokens: np.ndarray, vocab_size: int) -> None:
        """Count the trigrams of ``tokens``, a one-dimensional array of ids below ``vocab_size``."""
        self.vocab_size = vocab_size
        tokens = tokens.astype(np.int64)
        codes = (tokens[:-2] * vocab_size + tokens[1:-1]) * vocab_size + tokens[2:]
        trigrams, counts = np.unique(codes, return_counts=True)
        # Below the highest order, an n-gram counts once for every token seen before it.
        bigrams, bigram_counts = np.unique(trigrams % vocab_size**2, return_counts=True)
        self.trigram = NGramLevel(trigrams, counts, vocab_size)
        self.bigram = NGramLevel(bigrams, bigram_counts, vocab_size)
        unigram = np.bincount(bigrams % vocab_size, minlength=vocab_size) + 0.5
        self.unigram = unigram / unigram.sum()

    def loss(self, tokens: np.ndarray) -> float:
        """Mean negative log-likelihood, in nats, of every token but the first."""
        tokens = tokens.astype(np.int64)
        last = self.unigram[tokens[1:]]
        pairs = self.bigram.probability(tokens[:-1] * self.vocab_size + tokens[1:], last)
        codes = (tokens[:-2] * self.vocab_size + tokens[1:-1]) * self.vocab_size + tokens[2:]
        triples = self.trigram.probability(codes, pairs[1:])
        return float(-(np.log(pairs[0]) + np.log(triples).sum()) / (len(tokens) - 1))


def build_model(tokenizer: PreTrainedTokenizerBase, context: int, active: int) -> Qwen2MoeForCausalLM:
    """A freshly initialised Qwen2-MoE model of just under four million parameters."""
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=256,
        moe_intermediate_size=256,
        shared_expert_intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=1,
        num_experts=8,
        num_experts_per_tok=active,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=context,
        tie_word_embeddings=True,
        use_sliding_window=False,
        router_aux_loss_coef=0.0,
        eos_token_id=token_id(tokenizer, IM_END),
        pad_token_id=token_id(tokenizer, END_OF_TEXT),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = Qwen2MoeForCausalLM(config)
    model.set_experts_implementation("eager")
    return model


def batches(tokens: np.ndarray, rows: int, context: int, seed: int) -> Iterator[torch.Tensor]:
    """Shuffled windows of the stream, pass after pass, each pass cut at another offset."""
    rng = np.random.default_rng(seed)
    while True:
        offset = int(rng.integers(context))
        windows = (len(tokens) - offset) // context
        stream = tokens[offset : offset + windows * context].reshape(windows, context)
        order = rng.permutation(windows)
        for start in range(0, windows - rows + 1, rows):
            yield torch.from_numpy(stream[order[start : start + rows]])


def schedule(step: int, steps: int, warmup: int) -> float:
    """The share of the peak learning rate: a linear warm-up, then a cosine down to nothing."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al., 2024), for square blocks of weights.

    A parameter of shape (..., m * n, n) counts as blocks of n x n: every projection of every
    expert is orthogonalised by itself, also where the model keeps them in one tensor.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], momentum: float = 0.95) -> None:
        """Take ``parameters``; the learning rate is set in ``param_groups`` before every step."""
        super().__init__(parameters, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter from its gradient."""
        for group in self.param_groups:
            blocks = []
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(state["momentum"], group["momentum"])
                blocks.append(ahead.view(-1, parameter.shape[-1], parameter.shape[-1]))
            updates = orthogonalize(torch.cat(blocks)).split([len(block) for block in blocks])
            for parameter, update in zip(group["params"], updates, strict=True):
                parameter.sub_(update.view_as(parameter), alpha=group["lr"])


def orthogonalize(blocks: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of every matrix near one, by Muon's Newton-Schulz iteration."""
    x = blocks.to(torch.bfloat16)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.to(blocks.dtype)


def make_optimizers(
    model: Qwen2MoeForCausalLM, options: argparse.Namespace
) -> dict[torch.optim.Optimizer, list[float]]:
    """The optimizers, each with the peak learning rates of its parameter groups."""
    projections, embeddings, others = [], [], []
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            embeddings.append(parameter)
        elif parameter.ndim >= 2 and parameter.shape[-2] % parameter.shape[-1] == 0:
            projections.append(parameter)
        else:
            others.append(parameter)
    adam = torch.optim.AdamW(
        [{"params": embeddings}, {"params": others}],
        betas=(0.9, 0.98),
        weight_decay=0.0,
        fused=True,
    )
    return {
        Muon(projections): [options.learning_rate],
        adam: [options.embedding_rate, options.other_rate],
    }


def balance_loss(router_logits: Iterable[torch.Tensor], active: int) -> torch.Tensor:
    """The load-balance loss of the Switch Transformer, layer by layer; 1 where balance is even."""
    losses = []
    for logits in router_logits:
        experts = logits.shape[-1]
        probabilities = logits.float().softmax(-1)
        chosen = probabilities.topk(active).indices
        share = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
        losses.append(experts * (share * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def train(model: Qwen2MoeForCausalLM, tokens: np.ndarray, options: argparse.Namespace) -> None:
    """Train ``model`` on the stream of ``tokens``."""
    optimizers = make_optimizers(model, options)
    source = batches(tokens, options.batch, options.context, options.seed)
    started, recent = time.monotonic(), []
    model.train()
    for step in range(options.steps):
        for optimizer, peaks in optimizers.items():
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * schedule(step, options.steps, options.warmup)
        ids = next(source)
        output = model(input_ids=ids, labels=ids, use_cache=False, output_router_logits=True)
        balance = balance_loss(output.router_logits, options.active_experts)
        (output.loss + options.balance * balance).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent.append(output.loss.item())
        if (step + 1) % 50 == 0:
            speed = (step + 1) * ids.numel() / (time.monotonic() - started)
            mean = sum(recent) / len(recent)
            even = balance.item()
            log.info("step %d: loss %.4f, balance %.2f, %.0f tokens/s", step + 1, mean, even, speed)
            recent = []


@torch.no_grad()
def model_loss(model: Qwen2MoeForCausalLM, tokens: np.ndarray, context: int) -> float:
    """Mean negative log-likelihood, in nats, of every token but the first.

    The text is read in windows of ``context`` tokens; each window sees only its own tokens.
    """
    model.eval()
    total = 0.0
    for start in range(0, len(tokens) - 1, context):
        ids = torch.from_numpy(tokens[start : start + context + 1])[None]
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        total += torch.nn.functional.cross_entropy(logits[0].float(), ids[0, 1:], reduction="sum").item()
    return total / (len(tokens) - 1)


@torch.no_grad()
def quantize_experts(model: Qwen2MoeForCausalLM) -> None:
    """Replace every routed expert matrix of ``model`` by what Q2_K leaves of it."""
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            for expert in parameter:
                blocks = encode_rows(expert.float().numpy(), QType.Q2_K)
                expert.copy_(torch.from_numpy(decode_rows(blocks, QType.Q2_K, expert.shape[1])))


def save(model: Qwen2MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write the model in bfloat16, its configuration, and the tokenizer."""
    model.generation_config = GenerationConfig(
        eos_token_id=[token_id(tokenizer, IM_END), token_id(tokenizer, END_OF_TEXT)],
        pad_token_id=token_id(tokenizer, END_OF_TEXT),
        do_sample=False,
        max_new_tokens=128,
    )
    model.bfloat16().save_pretrained(directory)
    tokenizer.save_pretrained(directory, save_jinja_files=False)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path, help="where to write the model")
    parser.add_argument("--continue-from", type=Path, help="train the model in this directory further")
    parser.add_argument("--steps", type=int, default=1700, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=8, help="windows in one step")
    parser.add_argument("--context", type=int, default=512, help="tokens in one window")
    parser.add_argument("--vocab-size", type=int, default=592)
    parser.add_argument("--active-experts", type=int, default=2, help="experts used per token")
    parser.add_argument("--learning-rate", type=float, default=0.02, help="of Muon, at the peak")
    parser.add_argument("--embedding-rate", type=float, default=4e-3, help="of the embeddings")
    parser.add_argument("--other-rate", type=float, default=1e-3, help="of routers, norms, biases")
    parser.add_argument("--warmup", type=int, default=50, help="steps up to the peak")
    parser.add_argument("--balance", type=float, default=0.01, help="load-balance loss coefficient")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train, save, reload, and measure."""
    options = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    started = time.monotonic()

    corpus = load_corpus()
    heldout = heldout_text(corpus)
    if options.continue_from:
        tokenizer = AutoTokenizer.from_pretrained(options.continue_from)
        model = Qwen2MoeForCausalLM.from_pretrained(options.continue_from, dtype=torch.float32)
        earlier = json.loads((options.continue_from / "training.json").read_text(encoding="utf-8"))
    else:
        texts = (document.text for document in corpus.train)
        tokenizer = train_tokenizer(texts, options.vocab_size, options.context)
        model = build_model(tokenizer, options.context, options.active_experts)
        earlier = {"stages": [], "tokens_seen": 0, "minutes": 0.0}
    tokens = encode_documents(tokenizer, corpus.train)
    text_bytes = sum(len(document.text.encode()) for document in corpus.train)
    log.info("%d documents, %d bytes, %d tokens", len(corpus.train), text_bytes, len(tokens))

    heldout_tokens = encode(tokenizer, heldout)
    trigram_loss = TrigramModel(tokens, len(tokenizer)).loss(heldout_tokens)
    log.info("held out: %d tokens, trigram loss %.4f", len(heldout_tokens), trigram_loss)

    log.info("%d parameters", model.num_parameters())
    train(model, tokens, options)

    options.directory.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, options.directory)
    (options.directory / "heldout.txt").write_text(heldout, encoding="utf-8", newline="\n")

    model = Qwen2MoeForCausalLM.from_pretrained(options.directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.directory)
    loss = model_loss(model, encode(tokenizer, heldout), options.context)
    log.info("held-out loss %.4f", loss)
    quantize_experts(model)
    q2_k_increase = math.exp(model_loss(model, heldout_tokens, options.context) - loss) - 1
    log.info("perplexity with all routed experts in Q2_K: %+.2f %%", 100 * q2_k_increase)

    bits_per_nat = (len(heldout_tokens) - 1) / (math.log(2) * len(heldout.encode()))
    settings = {k: v for k, v in vars(options).items() if k not in ("directory", "continue_from")}
    report = {
        "text": "Python standard library, sources and pydoc topics (PSF License Version 2)",
        "stages": [*earlier["stages"], settings],
        "parameters": model.num_parameters(),
        "training_documents": len(corpus.train),
        "training_bytes": text_bytes,
        "training_tokens": len(tokens),
        "tokens_seen": earlier["tokens_seen"] + options.steps * options.batch * options.context,
        "heldout_bytes": len(heldout.encode()),
        "heldout_tokens": len(heldout_tokens),
        "heldout_loss_nats_per_token": round(loss, 4),
        "heldout_bits_per_byte": round(loss * bits_per_nat, 4),
        "trigram_loss_nats_per_token": round(trigram_loss, 4),
        "trigram_bits_per_byte": round(trigram_loss * bits_per_nat, 4),
        "q2_k_experts_perplexity_increase": round(q2_k_increase, 4),
        "minutes": round(earlier["minutes"] + (time.monotonic() - started) / 60, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "numpy": np.__version__,
        },
    }
    text = json.dumps(report, indent=2) + "\n"
    (options.directory / "training.json").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
