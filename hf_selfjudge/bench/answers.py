"""In: a method, a prompt, models. Out: an [`AnswerRecord`] of one answer, and what was measured on the way."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from ..data.prompts import Prompt
from ..decoding.judged_model import JudgedModel
from ..decoding.rules import JudgeRule, Rule
from ..decoding.stats import Stats
from ..forward.branches import Keys
from ..models.load import fingerprint
from ..models.tokens import eos_tokens, greedy, until_eos
from .methods import Method


STOCK_LENGTH = 5  # tokens that stock drafts where rules have "auto"


@dataclass
class AnswerRecord:
    """
    An answer, and what was measured while it was decoded: a line of `quality.jsonl` or `timing.jsonl`.

    Args:
        method (`str`): Name of the method.
        prompt (`str`): Id of the prompt.
        repeat (`int`): How many times this answer was decoded before.
        share (`float`, *optional*): Of a coin that is like a judge: the share of mismatches that it accepts.
        tokens (`list[int]`): The answer.
        finished (`bool`): Whether it ended before the limit.
        seconds (`float`, *optional*): Wall time of `generate`; not in mode quality, where answers share forwards.
        logprob (`float`, *optional*): Sum of the tokens' log-probabilities under the target, nats; in mode quality.
        lengths (`list[int]`): Tokens that each forward of the target added.
        draft_forwards (`int`): Forwards of the draft.
        stats ([`Stats`]): Of a method with a rule; empty otherwise. Without seconds in mode quality.
        made_with (`str`): Digest of the prompt's tokens, the judge, and the share of a coin.
    """

    method: str
    prompt: str
    repeat: int
    share: float | None
    tokens: list[int]
    finished: bool
    seconds: float | None
    logprob: float | None
    lengths: list[int]
    draft_forwards: int
    stats: Stats = field(default_factory=Stats)
    made_with: str = ""

    @classmethod
    def from_row(cls, row: dict) -> AnswerRecord:
        """From a line of the file: `asdict` of a record."""
        return cls(**row | {"stats": Stats(**row["stats"])})

    @property
    def key(self) -> tuple[str, str, int]:
        return self.method, self.prompt, self.repeat


def accepted_share(records: Iterable[AnswerRecord]) -> float:
    """Of the mismatches that a rule was asked about, the share that it accepted, in [0, 1]."""
    judged, asked = (sum(getattr(record.stats, name) for record in records) for name in ("judged", "asked"))
    return judged / asked if asked else 0.0


@dataclass(frozen=True)
class Job:
    """An answer to decode: `ids`, of shape `(1, prompt_length)`, are the prompt's tokens, `rule` is the method's. See
    [`AnswerRecord`]."""

    method: Method
    prompt: Prompt
    ids: torch.LongTensor
    repeat: int
    rule: Rule | None
    share: float | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        return self.method.name, self.prompt.id, self.repeat

    @functools.cached_property
    def made_with(self) -> str:
        judge = None
        if isinstance(self.rule, JudgeRule):
            judge = [fingerprint(self.rule.judge), self.rule.special_tokens, str(self.rule.threshold)]
        return hashlib.sha256(json.dumps([self.ids.tolist(), judge, self.share]).encode()).hexdigest()[:16]


class Recorder:
    """Stands between a call of `generate` and its model, a copy whose forward is replaced, and records what the
    forwards yield: `scored`, log-probabilities too. `prompt` is the model's cache of the prompt but for its last
    token, which is then not computed again."""

    def __init__(self, model: PreTrainedModel, prompt_length: int, prompt: Keys | None = None, scored: bool = False):
        self.prompt_length, self.scored = prompt_length, scored
        self.starts: list[int] = []  # for each forward, how many tokens the text had before its candidates
        self.tried: dict[int, tuple[int, float]] = {}  # position -> the last token there, and its log-probability
        self.logits: torch.Tensor | None = None  # of the last forward, whose input ended at `end`
        self.end = 0
        forward = model.forward

        @functools.wraps(forward)  # `generate` looks at the signature
        def recorded(**arguments) -> ModelOutput:
            cache = arguments["past_key_values"]
            if prompt is not None and not cache.get_seq_length():
                for index, (keys, values) in enumerate(prompt):
                    cache.update(keys[None], values[None], index)
                for name in ("input_ids", "position_ids"):
                    if arguments.get(name) is not None:
                        arguments[name] = arguments[name][..., prompt_length - 1 :]
            before = cache.get_seq_length()
            output = forward(**arguments)
            self.starts.append(max(before + 1, prompt_length))
            if scored:
                self._record(before, arguments["input_ids"][0].tolist(), output.logits[0])
            return output

        model.forward = recorded

    def _record(self, before: int, fed: list[int], logits: torch.Tensor) -> None:
        if before >= self.prompt_length:
            self._score(before, fed[0])
        for position in range(self.starts[-1], self.end):
            self.tried.pop(position, None)  # it followed another text
        self.logits, self.end = logits, before + len(fed)
        for position in range(self.starts[-1], self.end):
            self._score(position, fed[position - before])

    def _score(self, position: int, token: int) -> None:
        row = self.logits[position - 1 - self.end].float()
        self.tried[position] = token, float(row[token] - row.logsumexp(-1))

    def lengths(self, tokens: int) -> list[int]:
        """Tokens that each forward added to an answer of so many."""
        ends = [*self.starts[1:], self.prompt_length + tokens]
        return [end - start for start, end in zip(self.starts, ends, strict=True)] if self.starts else []

    def logprob(self, tokens: Sequence[int]) -> float:
        """Sum of the log-probabilities of an answer's tokens, nats."""
        for position, token in enumerate(tokens, start=self.prompt_length):
            if self.tried.get(position, (None,))[0] != token:  # the last one is never fed
                self._score(position, token)
        return sum(self.tried[self.prompt_length + index][1] for index in range(len(tokens)))


def decode_answer(
    job: Job,
    models: Sequence[PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    draft_length: int | str,
    prompt_keys: Sequence[Keys | None] | None = None,
) -> AnswerRecord:
    """
    Decode one answer, greedily but for what the method decides about mismatches. See [`BenchConfig`].

    Args:
        models (`Sequence[PreTrainedModel]`): The draft, unless drafts come from prompt lookup, and the target: copies
            whose forwards may be replaced.
        prompt_keys (`Sequence[Keys]`, *optional*): In mode quality, for each of `models` its cache of the prompt. The
            answer is then scored instead of timed.
    """
    ids, family, target = job.ids, job.method.family, models[-1]
    quality, lookup = prompt_keys is not None, len(models) == 1
    recorders = [
        Recorder(model, ids.shape[1], keys, scored=quality and model is target)
        for model, keys in zip(models, prompt_keys or [None] * len(models), strict=True)
    ]
    options, drafts = greedy(target, max_new_tokens), {}
    if family not in ("greedy", "draft"):
        if lookup:
            options.prompt_lookup_num_tokens = STOCK_LENGTH if draft_length == "auto" else draft_length
        else:
            drafts = {"assistant_model": models[0]}
    if family == "ensemble":
        (options.assistant_ensemble_weight,) = job.method.arguments
    model = models[0] if family == "draft" else target
    model.generation_config = options  # what `options` leave open is not filled in from the model's own
    if job.rule is not None:
        model = JudgedModel(target, job.rule, draft_length, tokenizer)
    start = time.perf_counter()
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **drafts)
    seconds = time.perf_counter() - start
    answer, finished = until_eos(output[0, ids.shape[1] :], eos_tokens(target))
    tokens, recorder, logprob = answer.tolist(), recorders[-1], None
    lengths, draft_forwards = recorder.lengths(len(tokens)), 0 if lookup else len(recorders[0].starts)
    stats = Stats() if job.rule is None else replace(model.stats)
    if quality:
        seconds, stats.draft_seconds, stats.verify_seconds, stats.rule_seconds = None, 0.0, 0.0, 0.0
        if family == "draft":  # the target has not seen the answer yet
            text = output[:, :-1]
            positions, mask = torch.arange(text.shape[1], device=text.device)[None], torch.ones_like(text)
            target(input_ids=text, attention_mask=mask, position_ids=positions, past_key_values=DynamicCache())
        logprob = recorder.logprob(tokens)
    measured = (tokens, finished, seconds, logprob, lengths, draft_forwards, stats)  # in the order of the record
    return AnswerRecord(*job.key, job.share, *measured, job.made_with)
