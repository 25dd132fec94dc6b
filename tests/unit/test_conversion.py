"""Experts of several types are written as their rows are, whatever the shape of their stack."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from container_bytes import assert_holds, by_expert
from gguf import GGUFReader
from small_sources import expert_tensors, gaussian, stack_name, write_source

from alphaq_gguf.checkpoint import Source
from alphaq_gguf.encode import encode_rows
from alphaq_gguf.pipeline import convert
from alphaq_gguf.qtypes import QType
from alphaq_gguf.recipe import Recipe

Q = QType


def recipe_without_stacks(source: Source) -> Recipe:
    stacks = {stack.name for stack in source.stacks}
    others = {name: Q.F32 for name in source.tensors if name not in stacks}
    return Recipe("a tool", source.fingerprint, "testmoe", {}, {}, (), others)


def tensor_bytes(path: Path, name: str) -> bytes:
    return next(tensor.data.tobytes() for tensor in GGUFReader(path).tensors if tensor.name == name)


def test_both_matrices_of_a_fused_expert_have_its_type(tmp_path: Path) -> None:
    tensors = expert_tensors(n_experts=3, n_ff=512, seed=5)
    gate, up = tensors.pop(stack_name("gate")), tensors.pop(stack_name("up"))
    name = stack_name("gate_up")
    source = write_source(tmp_path / "in.gguf", {name: np.concatenate([gate, up], axis=1), **tensors})
    types = {name: [Q.Q2_K, Q.Q5_K, Q.Q2_K], stack_name("down"): [Q.Q8_0, Q.Q8_0, Q.Q4_K]}
    done = convert(source, by_expert(recipe_without_stacks(source), source, types), tmp_path / "out.gguf")
    assert done.containers == tuple(types)
    blocks = [
        encode_rows(gate[xid], qtype).tobytes() + encode_rows(up[xid], qtype).tobytes()
        for xid, qtype in enumerate(types[name])
    ]
    assert_holds(tensor_bytes(tmp_path / "out.gguf", name), blocks)


def test_experts_larger_than_what_is_encoded_at_once_are_whole(tmp_path: Path) -> None:
    weights, name = gaussian(2, 2500, 2048), stack_name("up")
    source = write_source(tmp_path / "in.gguf", {name: weights})
    types = [Q.Q8_0, Q.Q4_0]
    convert(source, by_expert(recipe_without_stacks(source), source, {name: types}), tmp_path / "out.gguf")
    blocks = [encode_rows(matrix, qtype).tobytes() for matrix, qtype in zip(weights, types, strict=True)]
    assert_holds(tensor_bytes(tmp_path / "out.gguf", name), blocks)
