"""What a comparison found, in plain words that follow from its figures."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ..compare.data import Comparison
from .duels import alphaq_against_others, experts_against_stacks
from .ranking import (
    beats,
    chosen,
    differs,
    front_by_place,
    is_finite,
    kld_of,
    pareto,
    router_agreement,
    too_few,
    with_quoted_names,
)
from .wording import ENGINES, count, estimate, in_bytes, listed, number, percent, short_names, shortened

# An engine whose mean KLD from another is below this share of the file's own agrees with it.
_AGREES = 0.1
_VERDICT_WIDTH = 160


@dataclass(frozen=True)
class Finding:
    """One answer of the summary; `title` is the question's subject."""

    title: str
    text: str


def summarise(comparison: Comparison) -> list[Finding]:
    """All that the figures allow to say, the most important first."""
    if not chosen(comparison):
        return [Finding("Nothing to compare", "No file has a KLD; see the failures below.")]
    comparison = with_quoted_names(comparison)
    makers = (_choice, _certainty, _meaning, _alphaq, _experts, _routers, _engines, _speed, _broken)
    return [finding for make in makers if (finding := make(comparison))]


def verdict(comparison: Comparison) -> str:
    """The summary in one line of at most 160 characters."""
    kld, places = kld_of(comparison), front_by_place(comparison)
    if not places:
        return "no file could be judged"
    best = places[-1]
    top1 = percent(1 - chosen(comparison)[best[0]].divergence.top1.value)
    size = {names[0]: in_bytes(comparison.candidate(names[0]).n_bytes) for names in places}
    line, named = _subject(best)
    if len(best) == len(kld):
        line += " tie" if len(kld) > 1 else ""
    else:
        line += f" {'is' if len(best) == 1 else 'tie as'} nearest of {len(kld)}"
    line += f": KLD {number(kld[best[0]].value)} (top token changes in {top1} of places) at {size[best[0]]}"
    if too_few(comparison):
        line += f"; {count(comparison.text.n_scored, 'scored token')}: too few to tell files apart"
    elif len(places) > 1:
        alike = [names for names in places[:-1] if not differs(comparison, kld[names[0]], kld[best[0]])]
        other = (alike or places)[0]
        subject, more = _subject(other)
        named += more
        if alike:
            line += f"; {subject} {'is' if len(other) == 1 else 'are'} as near within the error at {size[other[0]]}"
        else:
            line += f"; {subject} {'is' if len(other) == 1 else 'tie as'} smallest: {size[other[0]]}, "
            line += f"KLD {number(kld[other[0]].value)}"
    room = _VERDICT_WIDTH - len(line.format(*[""] * len(named)))
    if sum(map(len, named)) > room:
        files = list(kld)
        width = room // len(named)
        shorts = dict(zip(files, short_names(files, width), strict=True))
        named = [shortened(shorts[name], width) for name in named]
    return line.format(*named)


def _subject(names: list[str]) -> tuple[str, list[str]]:
    """A place for one name or two, and the names to put there."""
    if len(names) == 2:
        return "{} and {}", names
    return "{}" + (f" and {len(names) - 1} more" if len(names) > 2 else ""), names[:1]


def _choice(comparison: Comparison) -> Finding:
    kld, places = kld_of(comparison), front_by_place(comparison)
    front = [name for names in places for name in names]
    size = {name: comparison.candidate(name).n_bytes for name in kld}
    told = [f"{name} ({in_bytes(size[name])}, KLD {number(kld[name].value)})" for name in front]
    if len(kld) == 1:
        return Finding("One file", f"{told[0]} is held against the reference alone; no other file was judged.")
    if len(front) == len(kld) and len(places) == 1:
        first = f"All {len(kld)} files tie: they have the same size and the same KLD."
    elif len(front) == len(kld):
        first = (
            f"Each of the {len(kld)} files is the best of its size: none is both smaller and nearer to the reference."
        )
    elif len(places) == 1:
        best = "best one" if len(front) == 1 else f"best {len(front)}, which tie"
        first = f"Of {len(kld)} files, none is smaller and none nearer to the reference than the {best}."
    else:
        first = f"{len(front)} of {len(kld)} files are worth choosing from: no other is both smaller and nearer."
    # With many, the ends and the steps between them say enough; the table marks all.
    lead = "From the smallest: " if len(places) > 1 else "They are " if len(front) > 1 else "It is "
    text = f"{first} {lead}{listed(told, 8)}."
    ties = [listed(names, 3) for names in places if len(names) > 1]
    if ties and len(places) > 1:
        text += f" Of the same size and KLD, so that they tie: {'; '.join(ties)}."
    losers: dict[str, list[str]] = {}
    for name in kld:
        if name not in front:
            by = min((other for other in front if beats(size, kld, other, name)), key=lambda n: kld[n].value)
            losers.setdefault(by, []).append(name)
    beaten = [f"{listed(names, 3)} by {by}" for by, names in losers.items()]
    if beaten and len(places) > 1:
        text += f" Beaten in both: {'; '.join(beaten[:3])}{'; and others' if len(beaten) > 3 else ''}."
    return Finding("Which file", text)


def _certainty(comparison: Comparison) -> Finding:
    kld, front = kld_of(comparison), pareto(comparison)
    n_scored = count(comparison.text.n_scored, "scored token")
    if too_few(comparison):
        return Finding("How certain", f"Nothing is: from {n_scored} a standard error means nothing.")
    if len(kld) == 1:
        ((_, only),) = kld.items()
        return Finding("How certain", f"The mean KLD is {estimate(only)}, from {n_scored}.")
    size = {name: comparison.candidate(name).n_bytes for name in kld}
    neighbours = list(pairwise(names[0] for names in front_by_place(comparison)))
    alike = [(a, b) for a, b in neighbours if not differs(comparison, kld[a], kld[b])]
    beaten = [name for name in kld if name not in front]
    close = [
        name
        for name in beaten
        if not any(beats(size, kld, other, name) and differs(comparison, kld[other], kld[name]) for other in kld)
    ]
    text = f"A difference counts where it exceeds twice its standard error, from {n_scored}. "
    if not neighbours:
        pass
    elif not alike:
        text += "Of the files that no other beats, each is nearer than the next smaller one by more than that. "
    else:
        pairs = [f"{a} and {b} ({estimate(kld[a])} and {estimate(kld[b])})" for a, b in alike]
        text += f"Not told apart by KLD, so that the smaller is the better choice: {listed(pairs, 3)}. "
    if close:
        text += f"Larger than another file, but not measurably further from the reference: {listed(close, 4)}. "
    elif beaten:
        text += "Every file that is beaten is beaten by more than that. "
    return Finding("How certain", text + "All files saw the same tokens, which makes this test a cautious one.")


def _meaning(comparison: Comparison) -> Finding:
    evaluations, own = chosen(comparison), comparison.reference.perplexity.value
    order = sorted(evaluations, key=lambda name: evaluations[name].divergence.kld.value)
    sentences = []
    for name in dict.fromkeys((order[0], order[-1])):
        found, perplexity = evaluations[name].divergence, evaluations[name].perplexity.value
        sentences.append(
            f"With {name} (KLD {number(found.kld.value)}) the probability of the true token changes by "
            f"{number(found.rms_dp.value * 100)} percentage points (root mean square), the likeliest token is "
            f"another one in {percent(1 - found.top1.value)} of places, and perplexity goes from {number(own, 4)} to "
            f"{number(perplexity, 4)} ({round((perplexity / own - 1) * 100, 1) + 0.0:+.1f} %)."
        )
    return Finding("What the KLD means here", " ".join(sentences))


def _alphaq(comparison: Comparison) -> Finding | None:
    text = alphaq_against_others(comparison)
    return None if text is None else Finding("AlphaQ against the others", text)


def _experts(comparison: Comparison) -> Finding | None:
    text = experts_against_stacks(comparison)
    return None if text is None else Finding("A type per expert", text)


def _routers(comparison: Comparison) -> Finding:
    found = {name: router_agreement(evaluation.routers) for name, evaluation in chosen(comparison).items()}
    known = {name: agreement for name, agreement in found.items() if agreement}
    if not known:
        return Finding("Routers", "Which experts were chosen was not recorded, so nothing is known of the routers.")
    order = sorted(known, key=lambda name: -known[name][0])
    sentences = []
    for name in dict.fromkeys((order[0], order[-1])):
        mean, layer, least = known[name]
        sentences.append(
            f"In {name} routers choose the same experts as the reference for {percent(mean)} of tokens on average over "
            f"layers, for {percent(least)} in layer {layer}, the worst."
        )
    return Finding("Routers", " ".join(sentences))


def _engines(comparison: Comparison) -> Finding | None:
    if not comparison.cross:
        return None
    kld = kld_of(comparison)
    worst = max(comparison.cross, key=lambda cross: cross.kld.value)
    engines = f"{ENGINES.get(worst.engine, worst.engine)} and {ENGINES.get(worst.other, worst.other)}"
    apart = [c.file for c in comparison.cross if c.file in kld and c.kld.value > _AGREES * kld[c.file].value]
    text = (
        f"On the same bytes, engines are at most KLD {number(worst.kld.value)} apart ({engines} on {worst.file}, the "
        f"same likeliest token in {percent(worst.top1.value)} of places)."
    )
    if not apart:
        text += " That is less than a tenth of the file's distance from the reference, for every file."
    else:
        files = listed(list(dict.fromkeys(apart)), 4)
        text += f" More than a tenth of the file's own KLD, so that the engine matters to the result: {files}."
    return Finding("Engines", text)


def _speed(comparison: Comparison) -> Finding | None:
    timed = [(e.speed.decode, e) for e in comparison.evaluations if e.speed]
    if len(timed) < 2:
        return None
    timed.sort(key=lambda pair: -pair[0].median)
    rate, first = timed[0]
    text = (
        f"{first.file} in {ENGINES.get(first.engine, first.engine)} writes fastest: {number(rate.median)} tokens/s "
        f"(median; {number(rate.least)} to {number(rate.most)})."
    )
    close = sum(other.most >= rate.least for other, _ in timed[1:])
    n_others = len(timed) - 1
    if n_others == 1:
        overlap = f"The range of the other measurement {'overlaps' if close else 'does not overlap'} with that."
    elif close in (0, n_others):
        overlap = f"The ranges of {'all' if close else 'none'} of the {n_others} other measurements overlap with that."
    else:
        overlap = f"Of the ranges of the {n_others} other measurements, {close} overlap{'s' * (close == 1)} with that."
    return Finding("Speed", f"{text} {overlap}")


def _broken(comparison: Comparison) -> Finding | None:
    broken = [f"{e.file} in {ENGINES.get(e.engine, e.engine)}" for e in comparison.evaluations if not is_finite(e)]
    failed = list(comparison.failures or {})
    sentences = [f"Could not be judged: {listed(failed, 4)}."] if failed else []
    if broken:
        sentences.append(f"Gives no numbers (not finite): {listed(broken, 4)}.")
    return Finding("What failed", " ".join(sentences)) if sentences else None
