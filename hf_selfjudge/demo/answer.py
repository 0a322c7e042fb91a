"""In: a pair, a judge, a prompt. Out: the answer after each round, with who decided each token, and its parts as text
and tables.
"""

from __future__ import annotations

import difflib
import itertools
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..decoding.judged_model import JudgedModel
from ..decoding.rules import JudgeRule, Mismatches
from ..models.pair import Pair
from ..utils.text import pieces, token_text


NAMES = {"matched": "draft, matched", "judged": "draft, judged", "target": "target"}
SEED = 0  # of sampled answers


class Accepted(NamedTuple):
    """A mismatch that the judge accepted: the draft's token, the target's choice, and the judge's probability that the
    token changes the meaning."""

    token: int
    choice: int
    cost: float


@dataclass
class StreamedAnswer:
    """
    An answer so far.

    Args:
        ids (`list[int]`): Its tokens.
        sources (`list[str]`): Who decided each of them: `"matched"`, `"judged"` or `"target"`.
        accepted (`dict[int, Accepted]`): What the judge accepted, by its place in the answer.
        rounds (`int`): Rounds of decoding.
        seconds (`float`): Since decoding began.
    """

    ids: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    accepted: dict[int, Accepted] = field(default_factory=dict)
    rounds: int = 0
    seconds: float = 0.0

    @property
    def judged(self) -> dict[int, Accepted]:
        """The judged tokens, by their place."""
        return {place: self.accepted[place] for place, source in enumerate(self.sources) if source == "judged"}

    def add(self, kept: Sequence[int]) -> None:
        """Add the tokens that a round kept."""
        for token in kept:
            accepted = self.accepted.get(len(self.ids))
            judged = accepted is not None and accepted.token == token != accepted.choice
            self.sources.append("judged" if judged else "matched")
            self.ids.append(token)
        if self.sources[-1] == "matched":  # true unless the end of the text cut the round short
            self.sources[-1] = "target"
        self.rounds += 1


class RecordingRule(JudgeRule):
    """A judge's rule that records what it accepted, by the place in the answer."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.accepted: dict[int, Accepted] = {}

    def keep(self, mismatches: Mismatches) -> torch.BoolTensor:
        kept = super().keep(mismatches)
        columns = mismatches.positions, mismatches.tokens, mismatches.choices, self.log_odds(mismatches).sigmoid()
        rows = zip(kept.tolist(), *(column.tolist() for column in columns), strict=True)
        for _, position, *accepted in itertools.takewhile(lambda row: row[0], rows):
            self.accepted[position] = Accepted(*accepted)
        return kept


class _Rounds(queue.SimpleQueue):
    """A queue that `generate` can stream to: first the prompt, then the tokens that each round kept."""

    def end(self) -> None:
        """Nothing: statistics are not complete yet."""


def stream_answer(
    pair: Pair,
    rule: RecordingRule,
    ids: torch.LongTensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    like: JudgedModel | None = None,
) -> Iterator[StreamedAnswer]:
    """Decode an answer to `ids`, of shape `(1, prompt_length)`, in another thread, and yield it after each round.
    Closing the iterator stops decoding. Temperature 0 is greedy. Drafts are as long as those of the model `like`, and
    learn from its earlier calls."""
    judged = (like or JudgedModel(pair.target, rule, tokenizer=pair.tokenizer)).on(pair.target)
    judged.rule = rule
    rounds, stop, answer = _Rounds(), threading.Event(), StreamedAnswer(accepted=rule.accepted)
    options = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0, "repetition_penalty": 1.0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": 1.0, "top_k": 0}

    def stopped(input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), stop.is_set(), dtype=torch.bool, device=input_ids.device)

    def decode() -> None:
        try:
            if temperature > 0:
                torch.manual_seed(SEED)
            options.update(assistant_model=pair.draft, streamer=rounds, stopping_criteria=[stopped])
            judged.generate(ids, attention_mask=torch.ones_like(ids), **options)
            rounds.put(None)
        except BaseException as error:  # noqa: BLE001 (raised in the thread that waits for it)
            rounds.put(error)

    start = time.perf_counter()
    worker = threading.Thread(target=decode, name="decode", daemon=True)
    worker.start()
    try:
        for number, kept in enumerate(iter(rounds.get, None)):
            if isinstance(kept, BaseException):
                raise kept
            if number > 0:  # not the prompt
                answer.add(kept.flatten().tolist())
                answer.seconds = time.perf_counter() - start
                yield answer
        answer.sources = judged.stats.sources
    finally:
        stop.set()
        worker.join()


# -- how it is shown -------------------------------------------------------------------------------------------------


def coloured_parts(
    tokenizer: PreTrainedTokenizerBase, answer: StreamedAnswer, growing: bool = False
) -> list[tuple[str, str]]:
    """Parts of the text and who decided each, see [`pieces`]; neighbours of one source are one part."""
    runs = [(source, len([*same])) for source, same in itertools.groupby(answer.sources)]
    texts = pieces(tokenizer, answer.ids, [*itertools.accumulate(count for _, count in runs)], growing)
    return [(text, NAMES[source]) for text, (source, _) in zip(texts, runs, strict=True) if text]


def measured_line(answer: StreamedAnswer) -> str:
    """What has been measured so far, as a line of Markdown."""
    if not answer.rounds:
        return ""
    tokens, judged = len(answer.ids), answer.judged.values()
    return (
        f"{tokens} tokens in {answer.seconds:.1f} s: **{tokens / answer.seconds:.1f} tokens/s**, "
        f"**{tokens / answer.rounds:.2f} tokens a round**, {len(judged) / tokens:.0%} judged, cost so far "
        f"{sum(accepted.cost for accepted in judged):.2f}"
    )


def judged_rows(tokenizer: PreTrainedTokenizerBase, answer: StreamedAnswer) -> list[list[str]]:
    """Judged tokens as rows of a table: place, token, the target's choice, cost."""
    rows = []
    for place, (*tokens, cost) in answer.judged.items():
        texts = (repr(token_text(tokenizer, answer.ids[:place], token)) for token in tokens)
        rows.append([place + 1, *texts, round(cost, 3)])
    return rows


def marked_differences(
    tokenizer: PreTrainedTokenizerBase, first: Sequence[int], second: Sequence[int], growing: bool = False
) -> tuple[list[tuple[str, str | None]], list[tuple[str, str | None]]]:
    """The parts of two answers, given as tokens. Parts that only one of them has are marked; see [`pieces`]."""
    changes = difflib.SequenceMatcher(None, first, second, autojunk=False).get_opcodes()
    marks = [None if kind == "equal" else "differs" for kind, *_ in changes]
    left = pieces(tokenizer, first, [end for _, _, end, _, _ in changes], growing)
    right = pieces(tokenizer, second, [end for *_, end in changes], growing)
    return tuple([(text, mark) for text, mark in zip(side, marks, strict=True) if text] for side in (left, right))
