"""A model as lm-evaluation-harness asks for one: texts in, log-likelihoods and texts out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llama_cpp
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..errors import AlphaQError
from ..reporter import Reporter
from .scoring import Answer, Request, Scorer

# The harness' own model for transformers writes so much where a task does not say.
_MAX_NEW_TOKENS = 256


class HarnessModel(TemplateLM):
    """The harness' view of `scorer`, which tokenises, cuts and generates as its model for transformers does.

    `label` names what runs, in progress bars and messages. AlphaQError for requests that the context cannot hold and
    for tasks that sample their text.
    """

    def __init__(self, scorer: Scorer, label: str, reporter: Reporter) -> None:
        super().__init__()
        self.label = label
        self._scorer = scorer
        self._vocabulary = scorer.vocabulary
        self._reporter = reporter

    @property
    def eot_token_id(self) -> int:
        return self._vocabulary.llm.token_eos()

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        return self._vocabulary.document_start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, begun by BOS where the model wants one and `string` or `add_special_tokens` does not forbid it."""
        tokens: list[int] = self._vocabulary.tokenize(string, special=True)
        bos: int | None = self._vocabulary.bos
        if bos is None or add_special_tokens is False or (add_special_tokens is None and tokens[:1] == [bos]):
            return tokens
        return [bos, *tokens]

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[Any]:
        """(log-likelihood, whether greedy decoding would say so) of each continuation after its context."""
        n_ctx = self._scorer.n_ctx
        cut: list[Request] = []
        for _texts, context, continuation in requests:
            if not 0 < len(continuation) <= n_ctx:
                raise AlphaQError(
                    f"{self.label}: a text to score has {len(continuation)} tokens, expected 1 to {n_ctx}",
                    "take a longer --task-ctx" if continuation else "look for empty answers among the task's examples",
                )
            kept = (context + continuation)[-n_ctx - 1 :]
            cut.append(Request(tuple(kept[:-1]), tuple(continuation)))
        n_cut = sum(len(context) + len(continuation) > n_ctx + 1 for _, context, continuation in requests)
        if n_cut:
            self._reporter.note(f"{self.label}: {n_cut} of {len(requests)} requests lose what exceeds {n_ctx} tokens")
        answers: list[Answer | None] = [None] * len(cut)
        with self._reporter.task(self.label, len(cut), "requests") as advance:
            for i, answer in self._scorer.score(cut):
                answers[i] = answer
                advance(1)
        return [(answer.logprob, answer.is_greedy) for answer in answers if answer is not None]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows where they are longer than the context."""
        windows = [
            (i, None, *make_disjoint_window(window))
            for i, request in enumerate(requests)
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._scorer.n_ctx,
                context_len=1,
            )
        ]
        totals = [0.0] * len(requests)
        for (i, *_), (logprob, _) in zip(
            windows, self._loglikelihood_tokens([window[1:] for window in windows]), strict=True
        ):
            totals[i] += logprob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, up to the first of the texts that a request says to stop at."""
        texts = []
        with self._reporter.task(self.label, len(requests), "texts") as advance:
            for request in requests:
                texts.append(self._generate(*request.args))
                advance(1)
        return texts

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        known = normalize_gen_kwargs(settings, _MAX_NEW_TOKENS)
        until = handle_stop_sequences(known.get("until"), eos=None)
        n_new = known.get("max_gen_toks", _MAX_NEW_TOKENS)
        n_context = self._scorer.n_ctx - n_new
        if known.get("do_sample"):
            raise AlphaQError(f"{self.label}: the task samples its texts, which no two engines do alike")
        if n_context <= 0:
            raise AlphaQError(
                f"{self.label}: the task asks for {n_new} tokens, the context has {self._scorer.n_ctx}",
                f"--task-ctx {2 * n_new}",
            )
        llm, text, drawn = self._vocabulary.llm, "", []
        vocabulary: Any = llama_cpp.llama_model_get_vocab(llm.model)
        for token in self._scorer.continue_greedily(self.tok_encode(context)[-n_context:] or [self.prefix_token_id]):
            if llama_cpp.llama_vocab_is_eog(vocabulary, token):
                break
            drawn.append(token)
            text = llm.detokenize(drawn).decode("utf-8", "replace")
            if len(drawn) == n_new or any(stop and stop in text for stop in until):
                break
        return postprocess_generated_text(text, until, None)
