"""In: a pair, a rule, a prompt. Out: the answer after each round, with who decided each token, and its parts as text,
tables and pictures.
"""

from __future__ import annotations

import difflib
import itertools
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..decoding.judged_model import JudgedModel
from ..decoding.rules import Candidate, JudgeRule, Rule
from ..models.pair import Pair
from ..utils.text import pieces, token_text


NAMES = {"matched": "draft, matched", "judged": "draft, judged", "target": "target"}


@dataclass(frozen=True)
class Token:
    """
    A token of an answer.

    Args:
        id (`int`): In the vocabulary.
        source (`str`): Who decided it: `"matched"`, `"judged"` or `"target"`.
        choice (`int`, *optional*): Of a judged token: the target's own choice.
        cost (`float`, *optional*): Of a judged token: the judge's probability that it changes the meaning; for a rule
            without a judge how much less likely the target finds it, nats.
    """

    id: int
    source: str
    choice: int | None = None
    cost: float | None = None


@dataclass
class StreamedAnswer:
    """An answer so far: its tokens, how many each round kept, and seconds since it began."""

    tokens: list[Token] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def judged(self) -> list[Token]:
        return [token for token in self.tokens if token.source == "judged"]

    def add(self, kept: Sequence[int], accepted: dict[int, Token]) -> None:
        """Add what a round kept. The last token is the target's own, unless the end of the text cut off the round."""
        for index, token in enumerate(kept):
            judged = accepted.get(len(self.tokens))
            if judged is None or judged.id != token or judged.choice == token:
                judged = Token(token, "target" if index == len(kept) - 1 else "matched")
            self.tokens.append(judged)
        self.rounds.append(len(kept))


class RecordingRule(Rule):
    """A rule that remembers what it accepted: by position in the answer, the token as a judged one."""

    def __init__(self, rule: Rule):
        self.rule, self.accepted = rule, {}
        self.special_tokens, self.needs_draft_logits = rule.special_tokens, rule.needs_draft_logits

    def check_target(self, target: PreTrainedModel) -> None:
        self.rule.check_target(target)

    def replay_on(self, target: PreTrainedModel):
        return self.rule.replay_on(target)

    def accept(self, candidate: Candidate) -> bool:
        accepted = self.rule.accept(candidate)
        if accepted:
            judging = isinstance(self.rule, JudgeRule)
            cost = self.rule.log_odds(candidate).sigmoid() if judging else candidate.margin
            choice = candidate.final_scores.argmax().item()
            self.accepted[candidate.position] = Token(candidate.token, "judged", choice, cost.item())
        return accepted


class _Rounds(BaseStreamer):
    """Hands what each round kept to another thread; an exception, or `None` at the end."""

    def __init__(self):
        self.queue: queue.Queue[list[int] | BaseException | None] = queue.Queue()
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt:
            self.queue.put(value.flatten().tolist())
        self.prompt = False

    def end(self) -> None:
        pass


def stream_answer(
    pair: Pair, rule: Rule, ids: torch.LongTensor, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> Iterator[StreamedAnswer]:
    """Decode an answer to `ids`, of shape `(1, prompt_length)`, in a thread of its own, and yield it after each round.
    Closing the iterator stops it. Temperature 0 is greedy; `seed` is of sampling."""
    recording, streamer, stop, answer = RecordingRule(rule), _Rounds(), threading.Event(), StreamedAnswer()
    judged = JudgedModel(pair.target, recording, tokenizer=pair.tokenizer)
    options = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0, "repetition_penalty": 1.0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": 1.0, "top_k": 0}

    def stopped(input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), stop.is_set(), dtype=torch.bool, device=input_ids.device)

    def decode() -> None:
        try:
            if temperature > 0:
                torch.manual_seed(seed)
            options.update(assistant_model=pair.draft, streamer=streamer, stopping_criteria=[stopped])
            judged.generate(ids, attention_mask=torch.ones_like(ids), **options)
            streamer.queue.put(None)
        except BaseException as error:  # noqa: BLE001 (raised in the thread that waits for it)
            streamer.queue.put(error)

    start = time.perf_counter()
    worker = threading.Thread(target=decode, name="decode", daemon=True)
    worker.start()
    try:
        while (kept := streamer.queue.get()) is not None:
            if isinstance(kept, BaseException):
                raise kept
            answer.add(kept, recording.accepted)
            answer.seconds = time.perf_counter() - start
            yield answer
        # A draft that the end of the text cuts off is followed by no token of the target.
        decided = zip(answer.tokens, judged.stats.sources, strict=True)
        answer.tokens[:] = [replace(token, source=source) for token, source in decided]
    finally:
        stop.set()
        worker.join()


# -- how it is shown -------------------------------------------------------------------------------------------------


def coloured_parts(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Token], growing: bool = False
) -> list[tuple[str, str]]:
    """Parts of the text and who decided each, see [`pieces`]; neighbours of one source are one part."""
    runs = [(source, len([*same])) for source, same in itertools.groupby(token.source for token in tokens)]
    ends = [*itertools.accumulate(count for _, count in runs)]
    texts = pieces(tokenizer, [token.id for token in tokens], ends, growing)
    return [(text, NAMES[source]) for text, (source, _) in zip(texts, runs, strict=True) if text]


def measured_line(answer: StreamedAnswer) -> str:
    """What has been measured so far, as a line of Markdown."""
    tokens, rounds, judged = len(answer.tokens), len(answer.rounds), answer.judged
    if not rounds:
        return ""
    cost = sum(token.cost for token in judged)
    return (
        f"{tokens} tokens in {answer.seconds:.1f} s: **{tokens / answer.seconds:.1f} tokens/s**, "
        f"**{tokens / rounds:.2f} tokens a round**, {len(judged) / tokens:.0%} judged, cost so far {cost:.2f}"
    )


def judged_rows(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Token]) -> list[list[str]]:
    """Judged tokens as rows of a table: place, token, the target's choice, cost."""
    ids, rows = [token.id for token in tokens], []
    for index, token in enumerate(tokens):
        if token.source == "judged":
            texts = (repr(token_text(tokenizer, ids[:index], each)) for each in (token.id, token.choice))
            rows.append([index + 1, *texts, round(token.cost, 3)])
    return rows


def marked_differences(
    tokenizer: PreTrainedTokenizerBase, first: Sequence[Token], second: Sequence[Token], growing: bool = False
) -> tuple[list[tuple[str, str | None]], list[tuple[str, str | None]]]:
    """The parts of two answers, with those that only one of them has marked; see [`pieces`]."""
    a, b = ([token.id for token in tokens] for tokens in (first, second))
    changes = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    marks = [None if kind == "equal" else "differs" for kind, *_ in changes]
    left = pieces(tokenizer, a, [end for _, _, end, _, _ in changes], growing)
    right = pieces(tokenizer, b, [end for *_, end in changes], growing)
    return tuple([(text, mark) for text, mark in zip(side, marks, strict=True) if text] for side in (left, right))


def plot_rounds(rounds: dict[str, Sequence[int]]) -> Figure:
    """For each named answer one bar for each round: how many tokens it kept."""
    figure = Figure(figsize=(8, 1.3 * len(rounds) + 0.6))
    axes = figure.subplots(len(rounds), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axis, (name, kept) in zip(axes, rounds.items(), strict=True):
        axis.bar(range(1, len(kept) + 1), kept, width=0.8)
        axis.set_ylabel(name)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes[0].set_title("A bar for each round: how many tokens it kept", fontsize="medium")
    axes[-1].set_xlabel("round")
    figure.tight_layout()
    return figure
