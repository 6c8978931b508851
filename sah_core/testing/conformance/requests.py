"""Checks over the calls of a request: state, randomness, layers, going back."""

from __future__ import annotations

import torch

from sah_core.attention import cannot_reorder
from sah_core.mask import Mask
from sah_core.masker import Masker

from .calls import (
    SEED,
    SHAPES,
    Idle,
    Run,
    Tokens,
    effective,
    same,
)
from .verdict import require, skip

MUCH = 0.15
"""Share of runs from which on a key's own count says something."""

RARE = 0.03
"""Probability below which a key is too rarely selected to be counted."""


def check_determinism(masker: Masker) -> None:
    """The same call gives the same mask, and nobody else's random numbers are used up."""
    change = "take random numbers from inputs.random, which depend on their place alone"
    state = torch.get_rng_state()
    try:
        for shape in SHAPES[:2]:
            masks = []
            for seed in (1, 2):
                torch.manual_seed(seed)
                before = torch.get_rng_state()
                masks.append(effective(*shape.run(masker)))
                require(
                    torch.equal(before, torch.get_rng_state()),
                    masker,
                    "it draws from torch's global generator",
                    change,
                )
            require(same(*masks), masker, f"with {shape.title} two runs differ", change)
    finally:
        torch.set_rng_state(state)
    if masker.capabilities.stochastic:
        seeded = []
        for seed in (SEED, SEED + 1):
            run = Run(masker, Tokens.random(203), seed=seed)
            run.context(198)
            seeded.append(effective(*run.question(198, 203)))
        sampled = bool(((seeded[0] > 0) & (seeded[0] < 1)).any())
        require(
            not (sampled and same(*seeded)),
            masker,
            "another seed of the pipeline gives the same sample",
            change,
        )


def check_probabilities(masker: Masker) -> None:
    """A sampled key has the probability with which it is selected."""
    if not masker.capabilities.stochastic:
        return  # check_shape holds it to probability 1
    tokens, runs = Tokens.random(24), 240
    chances = []
    for seed in range(runs):
        run = Run(masker, tokens, seed=seed)
        run.context(23)
        chances.append(effective(*run.question(23, 24)))
    chance = torch.stack(chances)
    if bool(((chance == 0) | (chance == 1)).all()):
        return  # a choice at random, not a sample that stands for the rest
    # of keys that count as 1 / p the expected count is 1
    weight = torch.where(chance > 0, 1 / chance.clamp(min=1e-9), 0.0)
    often = (chance > 0).float().mean(0) >= MUCH
    counts = [(weight[:, often].mT, "a key that it selects often")] if often.any() else []
    if float(chance[chance > 0].min()) >= RARE:  # else a few draws decide
        # a sampler may leave out the first and the last keys, which other steps select
        ever = (chance > 0).any(0)
        counts.append((weight[:, ever].mean(1)[None], "a key of all"))
    for count, title in counts:
        mean, error = count.mean(-1), count.std(-1) / runs**0.5
        excess = (mean - 1).abs() - 5 * error
        worst = int(excess.argmax())
        require(
            float(excess[worst]) <= 0.1,
            masker,
            f"over {runs} seeds {title}, weighted by probability, counts {float(mean[worst]):.2f} "
            "times instead of once",
            "give each sampled key the probability with which it is selected, over all seeds",
        )


def check_layers_are_independent(masker: Masker) -> None:
    """What one layer sees does not change what another selects, unless choices are shared."""
    if masker.capabilities.shares_layers:
        skip(masker, "it declares shares_layers")
    tokens, others = Tokens.random(120), Tokens.random(120, seed=3)
    alone = Run(masker, tokens)
    alone.context(115, layer=2)
    expected = effective(*alone.question(115, 120, layer=2))
    run = Run(masker, others)
    run.context(115, layer=1)
    run.question(115, 120, layer=1)
    run.tokens = tokens
    run.context(115, layer=2)
    run.tokens = others
    run.context(115, layer=3)
    run.question(115, 120, layer=3)
    run.tokens = tokens
    require(
        same(effective(*run.question(115, 120, layer=2)), expected),
        masker,
        "other layers change what layer 2 selects",
        "keep everything in inputs.state, or declare Capabilities(shares_layers=True)",
    )


def check_chunked_append(masker: Masker) -> None:
    """Keys that come in chunks of any size give the mask that they give at once."""
    tokens = Tokens.random(131)
    for rows in (1, 5):
        end = 126
        whole = Run(masker, tokens)
        whole.context(end)
        expected = effective(*whole.question(end, end + rows))
        for chunks in ((1,) * end, (50, 1, 1, 17, 57), (125, 1)):
            run = Run(masker, tokens)
            run.context(end, chunks)
            require(
                same(effective(*run.question(end, end + rows)), expected),
                masker,
                f"a context in chunks of {', '.join(map(str, chunks[:5]))}, ... keys gives another "
                "mask than the context at once",
                "let append depend on the keys and their positions, not on how they come",
            )
    # after the context keys come as a question, then one by one
    question, single = Run(masker, tokens), Run(masker, tokens)
    if question.session.listens:
        return  # what attention tells a masker depends on the rows that it was computed for
    for run in (question, single):
        run.context(120)
    question.question(120, 130)
    for position in range(120, 130):
        single.question(position, position + 1)
    require(
        same(effective(*question.question(130, 131)), effective(*single.question(130, 131))),
        masker,
        "ten keys of a question give another mask afterwards than ten single tokens",
        "let append depend on the keys and their positions, not on how they come",
    )


def check_snapshot_and_restore(masker: Masker) -> None:
    """A state that went back to the end of the context answers as a fresh one."""
    context = Tokens.random(140)
    run = Run(masker, context)
    run.context(101)
    run.question(101, 102)
    base = run.session.snapshot()
    for seed in (1, 2, 1):
        tokens = context.followed_by(Tokens.random(140, seed=seed), 102)
        fresh = Run(masker, tokens)
        fresh.context(101)
        fresh.question(101, 102)
        run.session.restore(base)
        run.tokens = tokens
        for begin, end in ((102, 120), *((n, n + 1) for n in range(120, 140))):
            require(
                same(effective(*run.question(begin, end)), effective(*fresh.question(begin, end))),
                masker,
                f"after restore, key {begin} on, it selects other keys than a fresh state",
                "let restore(snapshot()) bring back everything that the snapshot saw",
            )


def check_reorder(masker: Masker) -> None:
    """A state whose sequences change places goes on as a fresh one of sequences in these places."""
    if not masker.is_stateful():
        skip(masker, "it keeps no state")
    for first in (None, (0, 41, 9)):
        tokens = Tokens.random(140, batch=3, first=first)
        run = Run(masker, tokens)
        run.context(101)
        run.question(101, 102)
        for kept in run.session.layers.values():
            reason = cannot_reorder(masker, kept.states.get(1))
            if reason:
                skip(masker, f"{reason}, and it is refused with beams")
        end = 102
        # among beams some go on several times and others not at all; batches shrink and grow
        for places in ((1, 2, 0), (2, 2, 0), (1, 0), (1, 0, 0, 1)):
            rows = torch.tensor(places)
            run.session.reorder(rows)
            tokens = run.tokens = tokens.taken(rows)
            fresh = Run(masker, tokens)
            fresh.context(101)
            fresh.question(101, 102)
            for begin in range(102, end):
                fresh.question(begin, begin + 1)
            for begin in range(end, end + 9):
                require(
                    same(
                        effective(*run.question(begin, begin + 1)),
                        effective(*fresh.question(begin, begin + 1)),
                    ),
                    masker,
                    f"after reorder({list(places)}), with {'' if first else 'no '}padding, it "
                    "selects other keys than a fresh state over the sequences in that order",
                    "let reorder(rows) take everything that belongs to a sequence, its first real "
                    "key included, by index_select(0, rows)",
                )
            end += 9


def check_same_masker_twice(masker: Masker) -> None:
    """One instance may stand twice in a pipeline and serve two requests at once."""
    change = "keep everything in inputs.state, which each step of each request has for itself"
    tokens = [Tokens.random(140, seed=seed) for seed in (0, 1)]
    alone = []
    for sequence in tokens:
        run = Run(masker, sequence)
        run.context(130)
        alone.append([effective(*run.question(end - 1, end)) for end in range(131, 141)])
    both = [Run(masker, sequence) for sequence in tokens]
    for run in both:
        run.context(130)
    for index, end in enumerate(range(131, 141)):
        for run, expected in zip(both, alone, strict=True):
            require(
                same(effective(*run.question(end - 1, end)), expected[index]),
                masker,
                "two requests at a time change what it selects",
                change,
            )
    if masker.capabilities.stochastic or both[0].session.listens:
        return  # a pipeline has at most one sampler, and tells each step of the mask of all
    firsts: list[Mask] = []
    once, twice = Run(masker, tokens[0]), Run(masker, tokens[0], then=[masker])
    # a second step behind the mask of the first one, which is not in its pipeline
    second = Run(masker, tokens[0], lambda _: firsts[-1], behind=[Idle()])
    for run in (once, twice, second):
        run.context(130)
    for end in range(131, 141):
        firsts.append(once.question(end - 1, end)[0])
        require(
            same(
                effective(*twice.question(end - 1, end)), effective(*second.question(end - 1, end))
            ),
            masker,
            "the second of two in a pipeline selects otherwise than it does behind the same mask",
            change,
        )
