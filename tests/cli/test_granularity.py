"""One type per stack, per expert or per whole expert; budgets for the model, its layers or its projections."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
from checkpoints import build_moe

from alphaq_gguf.qtypes import QType, row_bytes

# Bits of 16 weights as IQ1_S, TQ1_0, IQ1_M, TQ2_0, IQ2_XS, IQ2_S, Q2_K, IQ3_XXS, Q3_K, IQ4_XS, Q4_0, Q4_1, Q5_0, Q5_1,
# Q6_K, I8, Q8_0 and F16, which a container can be declared as.
CONTAINER_BITS = (25, 27, 28, 33, 37, 41, 42, 49, 55, 68, 72, 80, 88, 96, 105, 128, 136, 256)


def allocated(cli, *arguments: object) -> dict:
    code, out, err = cli("allocate", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_each_expert_may_get_a_type_of_its_own(trained: Path, cli) -> None:
    by_stack = allocated(cli, trained, "--bpw", 3.5, "--strategy", "mse")
    by_expert = allocated(cli, trained, "--bpw", 3.5, "--strategy", "mse", "--granularity", "expert", "--no-containers")
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
    arguments = ("--bpw", 3.5, "--strategy", "mse", "--granularity", "expert", "--no-containers")
    by_expert = allocated(cli, trained, *arguments)["result"]
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


def stored_bytes(units: list[dict]) -> dict[str, tuple[int, int, bool]]:
    """Stack -> (bytes in a file, bytes of experts, whether a container), by the format's description.

    Of stacks whose experts take multiples of 32 bytes.
    """
    types, weights, experts = defaultdict(set), defaultdict(int), defaultdict(list)
    for unit in units:
        types[unit["tensor"]].add(unit["qtype"])
        weights[unit["tensor"]] += unit["n_weights"]
        experts[unit["tensor"]].append(unit["n_bytes"])
    found = {}
    for name, sizes in experts.items():
        assert not any(size % 32 for size in sizes)
        payload = sum(sizes)
        # A header of 40 bytes, 16 an expert, and then the experts from a multiple of 32 on.
        end = -(-(40 + 16 * len(sizes)) // 32) * 32 + payload
        declared = [weights[name] * bits // 128 for bits in CONTAINER_BITS]
        plain = len(types[name]) == 1
        found[name] = (payload if plain else min(size for size in declared if size >= end), payload, not plain)
    return found


@pytest.mark.parametrize("granularity", ["expert", "expert-shared"])
@pytest.mark.parametrize("strategy", ["mse", "alphaq", "router-norm", "random"])
@pytest.mark.parametrize("bpw", [2.7, 3.2, 4.1])
def test_a_budget_counts_what_a_file_stores(bpw: float, strategy: str, granularity: str, trained: Path, cli) -> None:
    found = allocated(cli, trained, "--bpw", bpw, "--strategy", strategy, "--granularity", granularity)
    stored, result = stored_bytes(found["units"]).values(), found["result"]
    n_weights = sum(unit["n_weights"] for unit in found["units"])
    assert result["expert_bytes"] == sum(n for n, _, _ in stored) <= bpw * n_weights / 8
    assert result["expert_bpw"] == pytest.approx(result["expert_bytes"] * 8 / n_weights)
    assert result["wasted_bytes"] == sum(n - payload for n, payload, _ in stored)
    assert result["containers"] == sum(contained for _, _, contained in stored)


def test_experts_never_cost_more_than_stacks_of_as_many_bytes(trained: Path, cli) -> None:
    for bpw in (2.7, 3.0, 3.3, 3.7, 5.0):
        by_stack, by_expert = (
            allocated(cli, trained, "--bpw", bpw, "--granularity", granularity)["result"]
            for granularity in ("stack", "expert")
        )
        assert by_expert["cost"] <= by_stack["cost"] * (1 + 1e-9)
        assert by_expert["method"] == "exact"


def test_a_file_of_the_size_asked_for_holds_experts_of_several_types(trained: Path, tmp_path: Path, cli) -> None:
    recipe, out = tmp_path / "recipe.json", tmp_path / "out.gguf"
    common = ("--granularity", "expert", "--strategy", "alphaq")
    for n_bytes in (2_200_000, 2_500_000):
        code, text, err = cli("allocate", trained, "--size", n_bytes, *common, "-o", recipe, "--force")
        assert code == 0, err
        result = json.loads(recipe.read_text(encoding="utf-8"))["result"]
        assert result["containers"] > 0
        assert f"Stacks: {6 - result['containers']} plain, {result['containers']} in containers" in text
        share = 100 * result["wasted_bytes"] / result["expert_bytes"]
        assert f"of which {share:.2g} % unused" in text
        assert cli("convert", trained, "--recipe", recipe, "-o", out, "--force")[0] == 0
        # Within one step of one stack, Q6_K to the next that a file can hold.
        assert n_bytes - 8 * 256 * (272 - 210) < out.stat().st_size == result["file_bytes"] <= n_bytes
    fitted = allocated(cli, trained, "--fit", "560M", *common)
    assert fitted["result"]["memory_bytes"] <= 560 << 20
    code, _, err = cli("allocate", trained, "--size", 1_000_000, *common)
    assert code == 1
    least = re.search(r"at least --size (\d+)", err)
    assert least is not None
    assert allocated(cli, trained, "--size", least[1], *common)["result"]["file_bytes"] <= int(least[1])


def test_a_budget_below_the_smallest_type_names_the_range(trained: Path, cli) -> None:
    for granularity in ("expert", "expert-shared"):
        code, _, err = cli("allocate", trained, "--bpw", 2.6, "--granularity", granularity, "--strategy", "mse")
        assert code == 1
        assert "feasible are 2.625 to 8.5" in err


def test_without_containers_experts_are_paid_alone(trained: Path, cli) -> None:
    common = ("--bpw", 3.2, "--strategy", "mse", "--granularity", "expert")
    alone, within = allocated(cli, trained, *common, "--no-containers"), allocated(cli, trained, *common)
    payload = sum(unit["n_bytes"] for unit in alone["units"])
    assert alone["result"]["expert_bytes"] == payload <= 3.2 * 6 * 8 * 256 * 256 / 8
    # What no header and no zeros take is spent on experts: all but a step of one of them.
    assert payload > 3.2 * 6 * 8 * 256 * 256 / 8 - 256 * 62
    assert alone["result"]["cost"] < within["result"]["cost"]
    assert not alone["result"].keys() & {"containers", "wasted_bytes", "file_bytes"}
    assert (alone["settings"]["containers"], within["settings"]["containers"]) == (False, True)


def test_llama_quantize_cannot_be_told_a_type_per_expert(trained: Path, tmp_path: Path, cli) -> None:
    types = tmp_path / "types.txt"
    arguments = ("--bpw", 3.5, "--strategy", "mse", "--granularity", "expert")
    code, _, err = cli("allocate", trained, *arguments, "--tensor-type-file", types)
    assert code == 2
    assert "--granularity stack" in err
    assert not types.exists()


@pytest.mark.parametrize(("scope", "key"), [("layer", "layer"), ("projection", "proj")])
def test_a_scope_gives_each_part_its_share(scope: str, key: str, trained: Path, cli) -> None:
    common = ("--bpw", 3.3, "--strategy", "mse", "--granularity", "expert", "--no-containers")
    found = allocated(cli, trained, *common, "--scope", scope)
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
    whole = allocated(cli, trained, *common)
    assert whole["result"]["cost"] <= found["result"]["cost"] * (1 + 1e-9)


def test_a_share_counts_what_a_file_stores(trained: Path, cli) -> None:
    arguments = ("--bpw", 3.3, "--granularity", "expert", "--scope", "layer")
    found = allocated(cli, trained, *arguments)
    spent = defaultdict(int)
    for name, (n_bytes, _, _) in stored_bytes(found["units"]).items():
        spent[name.split(".")[1]] += n_bytes
    assert set(spent) == {"0", "1"}
    assert all(n_bytes <= 3.3 * 3 * 8 * 256 * 256 / 8 for n_bytes in spent.values())


def test_a_share_that_is_too_small_names_its_part(tmp_path: Path, cli) -> None:
    source = build_moe(tmp_path / "model", moe_intermediate_size=352)
    code, _, err = cli("allocate", source, "--bpw", 3.5, "--strategy", "mse", "--scope", "projection")
    assert code == 1
    assert "projection down: its share of the budget, 3.5 bits per weight, is too small" in err
    assert "--scope global" in err
