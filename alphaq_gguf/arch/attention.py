"""What llama.cpp knows about an architecture's attention cache and no GGUF metadata says.

Mixture-of-experts architectures of llama.cpp as of llama-cpp-python 0.3.36, from what each one's
`load_arch_hparams` does and `llama_model::create_memory`. An architecture that is missing here is counted with full
attention in every layer, which needs at least as much memory.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WindowRule:
    """Where an architecture attends to a sliding window only.

    Of every `period` layers the last (or the first, with `dense_first`) sees the whole context, unless the
    metadata has a pattern of its own; without a period it must. `size` is a window that llama.cpp hard-codes;
    `by_default` applies it to files without the metadata key as well.
    """

    period: int = 0
    dense_first: bool = False
    size: int | None = None
    by_default: bool = False


WINDOW_RULES = {
    "afmoe": WindowRule(4),
    "cohere2moe": WindowRule(4, dense_first=True),
    "exaone-moe": WindowRule(4),
    "gemma4": WindowRule(),
    "gpt-oss": WindowRule(2),
    "granite_swa": WindowRule(),
    "laguna": WindowRule(4, dense_first=True),
    "llama4": WindowRule(4, size=8192, by_default=True),
    "maple": WindowRule(),
    "mellum": WindowRule(4),
    "mimo2": WindowRule(),
    "smallthinker": WindowRule(4, dense_first=True, size=4096),
    "step35": WindowRule(),
}

# Hybrids of attention and recurrent layers leave the cache of multi-token prediction layers out only here.
HYBRIDS_WITHOUT_NEXTN_CACHE = {"glm5-next", "qwen35", "qwen35moe", "qwen3next", "qwen4exp"}

# llama.cpp switches flash attention off for these.
WITHOUT_FLASH_ATTENTION = {"grok"}
