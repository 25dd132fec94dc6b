"""Files of equal size held against each other: AlphaQ against the rest, a type per expert against one per stack."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

from ..compare.data import Candidate, Comparison
from .ranking import differs, kld_of, too_few
from .wording import count, in_bytes, listed, number

# Files whose sizes differ by no more are held against each other as equals.
_EQUAL_SIZE = 0.01
_HOW = "of equal size (within 1 %), or where one is both smaller and nearer"
_TOO_FEW = "Too few tokens were scored to say."
_WAYS = {
    "stack": "With one type per stack",
    "expert": "With a type per expert",
    "expert-shared": "With a type per whole expert",
}

Outcomes = dict[str, list[tuple[float, str, str]]]
"""By how a file fares against a rival: what its KLD has more than the rival's, and the names of both."""


def alphaq_against_others(comparison: Comparison) -> str | None:
    """How AlphaQ's files fare, those with a type per expert against others with one, and all against presets.

    None where there is nothing else.
    """
    files = [comparison.candidate(name) for name in kld_of(comparison)]
    mine = [candidate for candidate in files if candidate.origin == "alphaq"]
    if not mine or len(mine) == len(files):
        return None
    if too_few(comparison):
        return _TOO_FEW
    told: dict[str, str] = {}
    losses: list[tuple[float, str, str]] = []
    for way in dict.fromkeys(candidate.granularity for candidate in mine):
        rivals: dict[str, list[Candidate]] = {}
        for rival in files:
            if rival.origin != "alphaq" and (rival.granularity == way or _family(rival) != rival.origin):
                rivals.setdefault(_family(rival), []).append(rival)
        found = {f: _hold(comparison, [c for c in mine if c.granularity == way], rivals[f]) for f in rivals}
        parts = [f"of {_pairs(outcomes)} with {f} it {_counts(outcomes)}" for f, outcomes in found.items() if outcomes]
        losses += [duel for outcomes in found.values() for duel in outcomes.get("loses", [])]
        if parts:
            told[way] = "; ".join(parts)
    if not told:
        return (
            "No file has the size of an AlphaQ file (within 1 %), and none beats one in both size and KLD or is "
            "beaten by one: they cannot be held against each other."
        )
    text = f"Held against files {_HOW}"
    if list(told) == ["stack"]:
        text += f": {told['stack']}."
    else:
        text += f". {' '.join(f'{_WAYS[way]}, {part}.' for way, part in told.items())}"
    if not losses:
        return f"{text} AlphaQ loses nowhere in this comparison."
    return f"{text} The worst loss: {_pair(comparison, *max(losses)[1:])}."


def experts_against_stacks(comparison: Comparison) -> str | None:
    """How files with a type per expert fare against those of the same strategy with one per stack.

    None where there are not both.
    """
    files = [comparison.candidate(name) for name in kld_of(comparison)]
    told, wins = [], []
    for origin in dict.fromkeys(candidate.origin for candidate in files if candidate.granularity != "stack"):
        mine, rivals = (
            [c for c in files if c.origin == origin and (c.granularity == "stack") == is_stack]
            for is_stack in (False, True)
        )
        outcomes = _hold(comparison, mine, rivals)
        if outcomes:
            told.append(f"of {_pairs(outcomes)} of {origin} it {_counts(outcomes)}")
            wins += outcomes.get("wins", [])
    if not told:
        return None
    if too_few(comparison):
        return _TOO_FEW
    text = f"A type per expert, against one per stack of the same strategy, in files {_HOW}: {'; '.join(told)}."
    return f"{text} The largest gain: {_pair(comparison, *min(wins)[1:])}." if wins else text


def _hold(comparison: Comparison, mine: Iterable[Candidate], rivals: Iterable[Candidate]) -> Outcomes:
    """How each of `mine` fares against each of `rivals`; pairs of which one is smaller, the other nearer, left out."""
    kld = kld_of(comparison)
    outcomes: Outcomes = {}
    for one, rival in product(mine, rivals):
        ratio = rival.n_bytes / one.n_bytes - 1
        more = kld[one.name].value - kld[rival.name].value
        is_clear = differs(comparison, kld[one.name], kld[rival.name])
        if abs(ratio) > _EQUAL_SIZE and (not is_clear or (more < 0) != (ratio > 0)):
            continue
        outcome = "ties" if not is_clear else "wins" if more < 0 else "loses"
        outcomes.setdefault(outcome, []).append((more, one.name, rival.name))
    return outcomes


def _pairs(outcomes: Outcomes) -> str:
    return count(sum(map(len, outcomes.values())), "pair")


def _counts(outcomes: Outcomes) -> str:
    return listed([f"{word} {len(outcomes[word])}" for word in ("loses", "wins", "ties") if word in outcomes])


def _pair(comparison: Comparison, name: str, rival: str) -> str:
    kld = kld_of(comparison)
    sizes = [in_bytes(comparison.candidate(file).n_bytes) for file in (name, rival)]
    return f"{name} has KLD {number(kld[name].value)}, {rival} {number(kld[rival].value)} ({sizes[0]} and {sizes[1]})"


def _family(candidate: Candidate) -> str:
    """What a file's maker is called; other than its origin where that is no strategy."""
    if candidate.origin.startswith("preset "):
        return "llama.cpp's presets"
    return candidate.origin or "files of unknown origin"
