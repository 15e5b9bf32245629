"""Speculation: guesses what answers go on with, so that one step of the model confirms several tokens.

A guess is what followed the last time a text ended as it does now: in its own prompt and answer, or in a
recent request. It is found in suffix automata (native/draft.h), in O(1) a token. The model decides what of it
holds, so guesses never change a result; how many are made is up to the controller
(engine/draft_controller.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hasten import _native
from hasten.engine.draft_controller import KINDS, SOURCES, Acceptance, StepTimes, choose
from hasten.errors import UsageError

_MATCH_LEAST = 1  # tokens: a match of one is seldom worth a row, but that is the controller's to say


@dataclass
class Draft:
    """What is known of one sequence. Its prompt is looked through at its first proposal, not before."""

    prompt: Sequence[int]
    recent: _native.RecentTexts | None  # None: neither read nor joined
    text: _native.DraftText | None = None
    # odds of this answer's drafts over those of all answers, [SOURCES][kinds of evidence]
    lifts: list[list[float]] = field(default_factory=lambda: [[1.0] * KINDS for _ in range(SOURCES)])
    source: int = 0  # of the proposal: 0 the prompt, 1 recent texts, 2 the answer
    matched: int = 0  # tokens that the text has in common with the place that is copied from
    proposal: list[int] = field(default_factory=list)  # all of it, more than is drafted
    evidence: list[int] = field(default_factory=list)  # of each of its tokens

    def native(self) -> _native.DraftText:
        """The sequence's automaton, made when it is first needed: about 0.1 ms for 1,000 tokens of prompt."""
        if self.text is None:
            self.text = _native.DraftText(self.recent)
            self.text.append(self.prompt)
            self.prompt = ()
        return self.text


class Speculator:
    """Drafts for all sequences of an engine. Not for several threads at once; reads no clock.

    Args:
        most: tokens drafted for one sequence in a step at most; 0 drafts none.
        recent_tokens: finished requests are remembered up to so many tokens, about 100 bytes each.

    Raises:
        UsageError: a negative number.
    """

    def __init__(self, most: int = 15, recent_tokens: int = 1 << 16) -> None:
        if most < 0 or recent_tokens < 0:
            raise UsageError(
                f"{most} tokens drafted at most, {recent_tokens} remembered", hint="use 0 or more of each"
            )
        self.most = most
        self.times = StepTimes()
        self.acceptance = Acceptance()
        self._recent = _native.RecentTexts(recent_tokens)

    @property
    def recent_tokens(self) -> int:
        """Tokens of finished requests that are remembered."""
        return int(self._recent.tokens)

    @property
    def recent_bytes(self) -> int:
        """Memory they take."""
        return int(self._recent.bytes)

    def open(self, prompt: Sequence[int], *, shared: bool = True) -> Draft:
        """The state of a sequence that begins with `prompt`.

        Args:
            prompt: token ids.
            shared: False keeps the text to itself: it is not drafted from for others, nor others' for it. How
                fast an answer comes tells whether its text was seen before.
        """
        return Draft(tuple(prompt), self._recent if shared else None)

    def propose(self, drafts: Sequence[Draft | None], room: Sequence[int]) -> list[list[int]]:
        """Tokens to verify in this step, for each of the sequences that decode in it.

        Args:
            drafts: one a sequence; None for one that takes part without drafts.
            room: most draft tokens each may take.

        Returns:
            One list a sequence, often empty.
        """
        gains = [self._gains(*one) for one in zip(drafts, room, strict=True)]
        return [
            draft.proposal[:length] if draft is not None and length else []
            for draft, length in zip(drafts, choose(gains, self.times), strict=True)
        ]

    def _gains(self, draft: Draft | None, room: int) -> list[float]:
        """Look a sequence's proposal up; what its tokens promise."""
        if draft is None:
            return []
        draft.proposal = []
        most = min(room, self.most)
        if most <= 0:
            return []
        source, draft.matched, draft.proposal, draft.evidence = draft.native().propose(most, _MATCH_LEAST)
        draft.source = max(source - 1, 0)
        return self.acceptance.gains(draft.source, draft.matched, draft.evidence, draft.lifts[draft.source])

    def accept(self, draft: Draft, tokens: Sequence[int], drafted: int) -> None:
        """The answer got these tokens: the drafts that were confirmed and the one drawn after them.

        What was proposed is compared with them even where it was not verified: that is how it is learnt for
        free when drafts would pay again.

        Args:
            draft: the sequence.
            tokens: token ids, from one step; the first ones of an answer come from its prompt's step.
            drafted: how many drafts were verified: of the proposal, or more where a grammar forced them.
        """
        assert len(tokens) <= 1 + drafted, "an answer gets one token beside those that were verified"
        lifts = draft.lifts[draft.source]
        for place, (guess, token) in enumerate(zip(draft.proposal, tokens, strict=False)):
            matched, evidence = draft.matched + place, draft.evidence[place]
            lifts[evidence] = self.acceptance.learn(
                draft.source, matched, evidence, guess == token, lifts[evidence]
            )
            if guess != token:
                break
        draft.proposal = []
        if draft.text is None:
            draft.prompt = (*draft.prompt, *tokens)
        else:
            draft.text.append(tokens)

    def observe(self, rows: int, sequences: int, seconds: float) -> None:
        """A pure decode step took so long.

        Args:
            rows: tokens computed, drafts included.
            sequences: sequences they belong to; every one of them has a row at least.
            seconds: wall time, from the forward pass to the drawn tokens.
        """
        assert rows >= sequences > 0
        self.times.observe(rows, seconds)

    def close(self, draft: Draft, keep: bool = True) -> None:
        """The sequence is finished; with `keep` its text joins the recent requests."""
        if keep and draft.recent is not None and self._recent is draft.recent:
            self._recent.add(draft.native())
        draft.text, draft.prompt, draft.proposal = None, (), []
