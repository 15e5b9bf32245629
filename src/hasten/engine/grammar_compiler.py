"""Grammars compiled and followed on llguidance: which tokens may come next in an answer.

llguidance (https://github.com/guidance-ai/llguidance, MIT) walks the vocabulary's trie with a lexer of
regular expression derivatives and an Earley parser; a mask of 150,000 tokens takes it 0.02 to 0.2 ms. It
releases the interpreter lock while it compiles and while it makes masks.

llguidance follows references and rules by recursion: a chain of some thousand overflows the stack, which
ends a process without an exception. It also looks for a text that a lexeme matches, by a search without a
limit: eight expressions joined by `&`, 150 bytes, take minutes. No rule of ours on the text of a grammar is
sure to find all of these. So every grammar is compiled on trial first, in a process that may die of it
(`grammar_child`): with a smaller stack, less memory and a limit on processor time that grows with its size.
The first trial costs about 0.15 s, a later one what compiling the grammar costs.
"""

from __future__ import annotations

import functools
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from hasten.engine.grammar import Grammar, ThoughtLimit, source_of
from hasten.engine.grammar_child import COMPILE_STACK
from hasten.engine.grammar_trial import LIMITS, shared_trial
from hasten.errors import HastenError, MachineError, UsageError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    from hasten.models.tokenizer import Tokenizer


MaskRows = npt.NDArray[np.uint32]

_KEPT = 64  # compiled grammars a model keeps
_PROBE = 4  # tokens taken on trial: an expression that explodes does so within the first
_SLOW_S = 0.020  # processor time of one mask; a hundred times the usual
_TOO_MUCH = ("too big", "too many", "too complex", "toocomplex", "fuel", "current row", "too large")
_SIMPLER = "make it simpler: fewer alternatives, shorter repetitions"


@functools.cache
def _limits() -> LLParserLimits:
    """`LIMITS` as llguidance takes them."""
    from llguidance import LLParserLimits

    known: dict[str, Any] = {**LIMITS, "verbose_errors": False}
    return LLParserLimits(**known)


class GrammarCompiler:
    """Grammars for one model's vocabulary. For several threads at once.

    Args:
        tokenizer: whose tokens the masks speak of; read at the first grammar (0.6 s for 150,000 tokens).
        vocab_size: V, rows of the model's head; ids that the tokenizer lacks are never allowed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._vocabulary: LLTokenizer | None = None
        self._kept: OrderedDict[Grammar, CompiledGrammar | UsageError] = OrderedDict()
        self._lock = threading.Lock()
        self._building = threading.Lock()  # the vocabulary, which takes longer than a look at what is kept

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """A grammar ready to start answers with; the last 64 are kept, refused ones too.

        It is compiled on trial first, in another process: see `GrammarTrial`. The work of masks is bounded
        by llguidance's own counters; a grammar whose masks each take longer than 20 ms of processor time all
        the same would hold up every answer of a step, and is refused too.

        Raises:
            UsageError: the grammar is not valid, uses what is not supported, matches nothing or is too big.
            MachineError: llguidance is not installed, or there is no room for the trial.
        """
        kept: CompiledGrammar | UsageError | None
        with self._lock:
            kept = self._kept.get(grammar)
            if kept is not None:
                self._kept.move_to_end(grammar)
        if kept is None:
            try:
                kept = self._compile(grammar)
            except UsageError as refused:
                kept = refused
            with self._lock:
                self._kept[grammar] = kept
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
        if isinstance(kept, UsageError):
            raise UsageError(kept.message, hint=kept.hint)
        return kept

    def knows(self, grammar: Grammar) -> bool:
        """Whether `compile` has its answer ready."""
        with self._lock:
            return grammar in self._kept

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise MachineError(
                f"structured output needs the package llguidance: {error}",
                hint='pip install "hasten[serve]"',
            ) from error

        source, vocabulary = source_of(grammar), self._get_vocabulary()
        reason = shared_trial().reason_against(source)
        if reason:
            raise _refusal(grammar, reason)

        def compiled() -> CompiledGrammar:
            matcher = LLMatcher(vocabulary, source, log_level=0, limits=_limits())
            if matcher.is_error():
                raise _refusal(grammar, matcher.get_error())
            made = CompiledGrammar(grammar, matcher, self._vocab_size, self._tokenizer.eos_ids)
            if grammar.thought is not None:
                made.thought = ThoughtLimit(grammar.thought, vocabulary, self._tokenizer.token_bytes().values)
            made.probe()
            return made

        try:
            return with_large_stack(compiled)
        except (HastenError, KeyboardInterrupt):
            raise
        except BaseException as panic:  # noqa: BLE001  a panic of the library, which is no Exception
            raise _refusal(grammar, f"the grammar library fails on it: {panic}") from None

    def _get_vocabulary(self) -> LLTokenizer:
        with self._building:
            if self._vocabulary is None:
                self._vocabulary = vocabulary_of(self._tokenizer, self._vocab_size)
            return self._vocabulary


class CompiledGrammar:
    """One grammar over one vocabulary; made by `GrammarCompiler.compile`."""

    def __init__(
        self, grammar: Grammar, matcher: LLMatcher, vocab_size: int, eos_ids: tuple[int, ...]
    ) -> None:
        self.grammar = grammar
        self.vocab_size = vocab_size
        self.eos_ids = frozenset(index for index in eos_ids if index < vocab_size)
        self._matcher = matcher
        self.thought: ThoughtLimit | None = None
        # llguidance cannot go back over lexemes that count tokens: no drafts are tried on them
        self.goes_back = grammar.kind not in ("lark", "structural") or "max_tokens=" not in grammar.source
        self.end_row: MaskRows = np.zeros((vocab_size + 31) // 32, np.uint32)
        for token in self.eos_ids:
            self.end_row[token >> 5] |= np.uint32(1 << (token & 31))

    def start(self) -> GrammarState:
        """The state before the first token of an answer; microseconds, the compiled parts are shared."""
        return GrammarState(self)

    def new_matcher(self) -> LLMatcher:
        """llguidance's matcher before the first token."""
        return self._matcher.deep_copy()

    def probe(self) -> None:
        """Take a few tokens on trial.

        Raises:
            UsageError: nothing matches, or the first steps are already too much work.
        """
        state = self.start()
        times = []
        for _ in range(_PROBE):
            started = time.thread_time()
            row = state.masks(())[0]
            times.append(time.thread_time() - started)
            if state.failure:
                raise state.failure
            if state.finished:
                return
            allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
            state.accept([int(allowed[-1])])
        if state.failure:
            raise state.failure
        if min(times) > _SLOW_S:
            raise _refusal(self.grammar, f"too many choices, each token takes {1000 * min(times):.0f} ms")


class GrammarState:
    """How far one answer has come in its grammar. One thread at a time."""

    def __init__(self, compiled: CompiledGrammar) -> None:
        self._compiled = compiled
        self._matcher = compiled.new_matcher()
        self._accepted: list[int] = []
        self._ended = False
        self.failure: UsageError | None = None  # why the answer cannot go on
        self._thinks = compiled.thought is not None

    @property
    def finished(self) -> bool:
        """Whether only an end token is left, or has come; an empty match shows with its first mask."""
        return self._ended or (self._matcher.is_stopped() and not self._matcher.is_error())

    def masks(self, drafts: Sequence[int]) -> MaskRows:
        """Which tokens may come now, and after each draft.

        Args:
            drafts: tokens that may come next, in order. The first that the grammar forbids, or that ends the
                answer, cuts the rest.

        Returns:
            uint32 [1 + k, ceil(V / 32)], k <= len(drafts); bit i of word w is token 32 w + i. End tokens are
            allowed exactly where the grammar is matched, and nothing else is where it can only end. Where the
            answer cannot go on there is one empty row, and `failure` says why: the grammar needs more work
            than its limits allow, no token spells what it asks, or a token came that it forbids.
        """
        drafts = drafts if self._compiled.goes_back else ()
        limit = self._compiled.thought
        if self._thinks and limit is not None:
            drafts = drafts[: max(0, limit.most - 1 - len(self._accepted))]  # the next row may force the end
        rows: MaskRows = np.zeros((1 + len(drafts), (self._compiled.vocab_size + 31) // 32), np.uint32)
        reason = "" if self.failure else self._fill(rows[0])
        if reason:
            self.failure = _refusal(self._compiled.grammar, reason)
        if self.failure:
            rows[0] = 0
            return rows[:1]
        if self._thinks and limit is not None and limit.is_due(self._accepted):
            _leave_alone(rows[0], limit.next_closing(self._accepted))
        if np.array_equal(rows[0], self._compiled.end_row):
            self._ended = True
        used = 0
        while used < len(drafts) and self._take(rows[used], drafts[used], rows[used + 1]):
            used += 1
        if self._matcher.is_error():
            self._restore()
        elif used:
            self._matcher.rollback(used)
        return rows[: used + 1]

    def accept(self, tokens: Sequence[int]) -> None:
        """Go on by tokens that came, an end token among them perhaps.

        A token that no mask allowed is kept as `failure`.
        """
        for token in tokens:
            if token in self._compiled.eos_ids:
                self._ended = True
            if self._ended or self.failure:
                return
            if not self._matcher.try_consume_tokens([int(token)]):
                reason = self._matcher.get_error() or f"token {token} is not allowed here"
                self.failure = _refusal(self._compiled.grammar, reason)
                return
            self._accepted.append(int(token))
            if self._thinks and (limit := self._compiled.thought) is not None:
                self._thinks = not limit.is_over(self._accepted)

    def forced(self) -> list[int]:
        """Tokens that the grammar leaves no choice about from here on, in order: drafts that cost nothing."""
        if self.finished or self.failure or self._matcher.is_error() or not self._compiled.goes_back:
            return []
        return self._matcher.compute_ff_tokens()

    def _fill(self, row: MaskRows) -> str:
        """Write one mask; the reason where there is none."""
        if self.finished:
            row[:] = self._compiled.end_row
            return ""
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self._matcher.is_error():
            return self._matcher.get_error()
        return "" if row.any() else "NoExtension"

    def _take(self, row: MaskRows, token: int, after: MaskRows) -> bool:
        """Consume a draft that `row` allows and write the mask after it; False cuts the drafts here."""
        if not 0 <= token < self._compiled.vocab_size or token in self._compiled.eos_ids or self._ended:
            return False
        if not int(row[token >> 5]) >> (token & 31) & 1:
            return False
        if not self._matcher.try_consume_tokens([int(token)]):
            return False
        if self._fill(after):
            if not self._matcher.is_error():
                self._matcher.rollback(1)
            return False
        return True

    def _restore(self) -> None:
        """A draft used its work up; the state before it is built again from the accepted tokens."""
        self._matcher = self._compiled.new_matcher()
        self._matcher.consume_tokens(self._accepted)


def _leave_alone(row: MaskRows, token: int) -> None:
    """Allow this token and no other, where it is allowed: inside a character of several tokens it is not, and
    the character comes to its end first."""
    only = np.uint32(1 << (token & 31))
    if row[token >> 5] & only:
        row[:] = 0
        row[token >> 5] = only


def _refusal(grammar: Grammar, reason: str) -> UsageError:
    """llguidance's words as an error of ours: what is wrong and what to do."""
    what = {
        "json_schema": "the JSON schema",
        "json_object": "the JSON object",
        "regex": "the regular expression",
        "lark": "the grammar",
        "choice": "the choice",
        "structural": "the grammar of tools, thought and format",
    }[grammar.kind]
    first = " ".join(re.split("<state>|<backtrace>", reason)[0].replace("<non-verbose/>", "").split())
    if len(first) > 300:
        first = first[:200] + " ... " + first[-80:]
    if "NoExtension" in first:
        return UsageError(
            f"{what} cannot be matched: nothing, or no token of this model, may come next",
            hint="look for contradictions and for references that only lead back to themselves",
        )
    if any(sign in first.lower() for sign in _TOO_MUCH):
        return UsageError(f"{what} needs too much work: {first}", hint=_SIMPLER)
    return UsageError(
        f"{what} cannot be used: {first}",
        hint="leave out what is named, or see https://github.com/guidance-ai/llguidance/tree/main/docs",
    )


_APART = "\x02"


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int) -> LLTokenizer:
    """Build the trie over all tokens.

    Args:
        tokenizer: gives the bytes of its tokens.
        vocab_size: V; ids from the tokenizer's own size on have no bytes and are never allowed.
    """
    from llguidance import LLTokenizer

    tokens = tokenizer.token_bytes()
    values = (tokens.values + [b""] * (vocab_size - len(tokens.values)))[:vocab_size]
    ends = [index for index in tokenizer.eos_ids if index < vocab_size]
    special = [index for index in tokens.special if index < vocab_size]
    wrapper: Any = _Vocabulary(tokenizer, values, special, ends)
    return LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=ends or None)


class _Vocabulary:
    """The attributes that llguidance reads of a `TokenizerWrapper`."""

    is_tokenizer_wrapper = True

    def __init__(
        self, tokenizer: Tokenizer, values: Sequence[bytes], special: Sequence[int], ends: Sequence[int]
    ) -> None:
        self.tokens = values
        self.special_token_ids = special
        self.eos_token_id = ends[0] if ends else 0
        self.bos_token_id = tokenizer.bos_id
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """Ids that spell exactly this text, as inside an answer: llguidance breaks where bytes are added."""
        ids = self._tokenizer.encode(text, add_special=False)
        if self._spells(ids, text):
            return ids
        # SentencePiece puts a space before a text. A control character, which joins no other, takes it.
        ids = self._tokenizer.encode(_APART + text, add_special=False)
        for start, index in enumerate(ids):
            if self.tokens[index].endswith(_APART.encode()):
                ids = ids[start + 1 :]
                break
        return ids if self._spells(ids, text) else self._longest(text.encode())

    def _spells(self, ids: Sequence[int], text: str) -> bool:
        return b"".join(self.tokens[i] for i in ids if i < len(self.tokens)) == text.encode()

    def _longest(self, raw: bytes) -> list[int]:
        """Longest tokens first, for tokenizers that change what they encode; stops where none fits."""
        ids: list[int] = []
        while raw:
            for size in range(min(len(raw), self._most), 0, -1):
                if raw[:size] in self._by_bytes:
                    ids.append(self._by_bytes[raw[:size]])
                    raw = raw[size:]
                    break
            else:
                return ids
        return ids

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        special = frozenset(self.special_token_ids)
        return {value: i for i, value in enumerate(self.tokens) if value and i not in special}

    @cached_property
    def _most(self) -> int:
        return max(map(len, self._by_bytes), default=0)


_T = TypeVar("_T")
_STACK = 4 * COMPILE_STACK  # of the thread that compiles what the trial has passed
_stack_size = threading.Lock()


def with_large_stack(work: Callable[[], _T]) -> _T:
    """Run `work` on a thread with four times the stack of a trial; memory is only used where it is touched.

    Raises:
        MachineError: there is no room for the thread. What `work` raises.
    """
    result: Future[_T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as wrong:  # noqa: BLE001  passed on
            result.set_exception(wrong)

    with _stack_size:
        before = threading.stack_size(_STACK)
        try:
            threading.Thread(target=run, name="hasten-grammar-stack", daemon=True).start()
        except RuntimeError as error:
            raise MachineError(
                f"no memory for a thread that reads grammars: {error}",
                hint="raise the limit on address space",
            ) from None
        finally:
            threading.stack_size(before)
    return result.result()


def _forget() -> None:
    """After a fork: a thread that does not exist here may have held it."""
    global _stack_size
    _stack_size = threading.Lock()


os.register_at_fork(after_in_child=_forget)
