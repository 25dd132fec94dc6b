"""Every model family with two types in each stack, in llama.cpp with the plug-in.

The same weights can be written as Q4_0 and, block by block, as Q8_0 with small numbers. A container in which every
other expert is the latter is the ordinary Q4_0 file in other bytes, and gives its logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from checkpoints import FAMILIES, LAYOUTS, build_moe
from container_bytes import by_expert

from alphaq_gguf.checkpoint import open_source
from alphaq_gguf.checkpoint.gguf import GGUFSource
from alphaq_gguf.conversion import convert
from alphaq_gguf.encode import encode_rows, find_encoder
from alphaq_gguf.evaluate.llama import LlamaModel
from alphaq_gguf.pipeline import AllocationSettings, allocate
from alphaq_gguf.qtypes import QType

TOLERANCE = 2e-5


@dataclass
class SmallNumbers:
    """Encodes Q8_0 so that it decodes to what Q4_0 decodes to."""

    name: str = "libggml"
    version: str = find_encoder().version

    def encode(
        self, rows: np.ndarray, qtype: QType, threads: int = 1, importance: np.ndarray | None = None
    ) -> np.ndarray:
        if qtype != QType.Q8_0:
            return encode_rows(rows, qtype, threads, importance)
        blocks = encode_rows(rows, QType.Q4_0).reshape(-1, 18)
        # The low halves of 16 bytes are the first 16 numbers.
        halves = blocks[:, 2:] & 15, blocks[:, 2:] >> 4
        numbers = np.concatenate(halves, axis=1).astype(np.int8) - 8
        return np.concatenate([blocks[:, :2], numbers.view(np.uint8)], axis=1).reshape(len(rows), -1)


@pytest.mark.parametrize("layout", FAMILIES)
def test_types_by_expert_give_the_logits_of_one_type(layout: str, tmp_path: Path) -> None:
    source = open_source(build_moe(tmp_path / "model", **LAYOUTS[layout]))
    floats = ((r"^(?!.*_exps).*\.weight$", QType.F32), (r"_exps", QType.Q4_0))
    plain = allocate(source, AllocationSettings(bpw=32, strategy="uniform", overrides=floats), cache_dir=tmp_path)
    turns = {s.name: [(QType.Q4_0, QType.Q8_0)[(xid + s.bid) % 2] for xid in range(s.n_experts)] for s in source.stacks}
    mixed = by_expert(plain, source, turns)
    for name, recipe in (("plain", plain), ("mixed", mixed)):
        convert(source, recipe, tmp_path / f"{name}.gguf", encoder=SmallNumbers())
    found = GGUFSource(tmp_path / "mixed.gguf", allow_requantize=True)
    assert set(found.containers) == {stack.name for stack in source.stacks}
    # One token, a few, and so many that all threads move rows.
    for n_tokens in (1, 7, 100):
        tokens = [int(t) for t in np.random.default_rng(n_tokens).integers(3, 390, n_tokens)]
        logits = []
        for name in ("plain", "mixed"):
            with LlamaModel(tmp_path / f"{name}.gguf", n_ctx=128, threads=2, exact=True) as model:
                logits.append(model.logits(tokens))
        assert np.ptp(logits[0]) > 1, "logits too small for the comparison to mean anything"
        assert np.abs(logits[1] - logits[0]).max() <= TOLERANCE * np.ptp(logits[0])
