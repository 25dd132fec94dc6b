"""One type per stack, per expert or per whole expert; budgets for the model, its layers or its projections."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest
from checkpoints import build_moe

from alphaq_gguf.qtypes import QType, row_bytes


def allocated(cli, *arguments: object) -> dict:
    code, out, err = cli("allocate", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_each_expert_may_get_a_type_of_its_own(trained: Path, cli) -> None:
    by_stack = allocated(cli, trained, "--bpw", 3.5, "--strategy", "mse")
    by_expert = allocated(cli, trained, "--bpw", 3.5, "--strategy", "mse", "--granularity", "expert")
    assert (by_stack["granularity"], by_expert["granularity"]) == ("stack", "expert")
    assert len(by_stack["units"]) == 6
    assert len(by_expert["units"]) == 6 * 8
    assert {(u["tensor"], u["expert"]) for u in by_expert["units"]} == {
        (u["tensor"], xid) for u in by_stack["units"] for xid in range(8)
    }
    types = defaultdict(set)
    for unit in by_expert["units"]:
        types[unit["tensor"]].add(unit["qtype"])
        assert unit["n_bytes"] == 256 * row_bytes(QType[unit["qtype"]], 256)
    assert any(len(found) > 1 for found in types.values())
    assert by_expert["result"]["expert_bpw"] <= 3.5
    assert by_expert["result"]["cost"] < by_stack["result"]["cost"]


def test_what_stacking_costs_is_the_difference_between_the_two(trained: Path, cli) -> None:
    by_expert = allocated(cli, trained, "--bpw", 3.5, "--strategy", "mse", "--granularity", "expert")["result"]
    stacking = by_expert["stacking"]
    assert stacking["per_expert"] == pytest.approx(by_expert["cost"], rel=1e-3)
    by_stack = allocated(cli, trained, "--bpw", by_expert["expert_bpw"], "--strategy", "mse")["result"]
    assert stacking["per_stack"] == pytest.approx(by_stack["cost"])
    uniform = stacking["uniform"]
    assert stacking["kept"] == pytest.approx(
        (uniform - stacking["per_stack"]) / (uniform - stacking["per_expert"]), rel=1e-9
    )
    assert set(stacking["layers"]) == {"0", "1"}
    code, out, _ = cli("allocate", trained, "--bpw", 3.3, "--strategy", "mse")
    assert code == 0
    assert "Stacking keeps" in out


def test_a_whole_expert_takes_one_type_or_what_its_rows_can_take_of_it(tmp_path: Path, cli) -> None:
    source = build_moe(tmp_path / "model", moe_intermediate_size=352)
    found = allocated(cli, source, "--bpw", 5, "--strategy", "mse", "--granularity", "expert-shared")
    types = defaultdict(dict)
    for unit in found["units"]:
        types[unit["layer"], unit["expert"]][unit["proj"]] = unit["qtype"]
    substitutes = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q8_0": "Q8_0"}
    assert len(types) == 8
    for projs in types.values():
        assert projs["gate"] == projs["up"]
        assert projs["down"] == substitutes[projs["gate"]]
    assert found["result"]["expert_bpw"] <= 5


def test_a_file_cannot_hold_a_type_per_expert_and_says_so(trained: Path, tmp_path: Path, cli) -> None:
    recipe, out = tmp_path / "recipe.json", tmp_path / "out.gguf"
    arguments = ("--bpw", 3.5, "--strategy", "mse", "--granularity", "expert")
    assert cli("allocate", trained, *arguments, "-o", recipe)[0] == 0
    code, _, err = cli("convert", trained, "--recipe", recipe, "-o", out)
    assert code == 1
    assert "a GGUF for llama.cpp has one type for all experts" in err
    assert "--granularity stack" in err
    code, _, err = cli("convert", trained, *arguments, "-o", out)
    assert code == 1
    assert "--granularity stack" in err
    assert not out.exists()
    types = tmp_path / "types.txt"
    code, _, err = cli("allocate", trained, *arguments, "--tensor-type-file", types)
    assert code == 2
    assert "--granularity stack" in err
    assert not types.exists()


@pytest.mark.parametrize(("scope", "key"), [("layer", "layer"), ("projection", "proj")])
def test_a_scope_gives_each_part_its_share(scope: str, key: str, trained: Path, cli) -> None:
    found = allocated(cli, trained, "--bpw", 3.3, "--strategy", "mse", "--granularity", "expert", "--scope", scope)
    spent, weights = defaultdict(int), defaultdict(int)
    for unit in found["units"]:
        spent[unit[key]] += unit["n_bytes"]
        weights[unit[key]] += unit["n_weights"]
    assert len(spent) > 1
    # Within one step of one expert of its share.
    step = 256 * (row_bytes(QType.Q8_0, 256) - row_bytes(QType.Q6_K, 256))
    for part, n_bytes in spent.items():
        share = 3.3 * weights[part] / 8
        assert share - step < n_bytes <= share
    whole = allocated(cli, trained, "--bpw", 3.3, "--strategy", "mse", "--granularity", "expert")
    assert whole["result"]["cost"] <= found["result"]["cost"] * (1 + 1e-9)


def test_a_share_that_is_too_small_names_its_part(tmp_path: Path, cli) -> None:
    source = build_moe(tmp_path / "model", moe_intermediate_size=352)
    code, _, err = cli("allocate", source, "--bpw", 3.5, "--strategy", "mse", "--scope", "projection")
    assert code == 1
    assert "projection down: its share of the budget, 3.5 bits per weight, is too small" in err
    assert "--scope global" in err
