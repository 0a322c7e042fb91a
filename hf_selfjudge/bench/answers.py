"""In: a method, a prompt, models. Out: an [`AnswerRecord`]: one answer and what was measured while decoding it."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import ModelOutput

from ..data.prompts import Prompt
from ..decoding.judged_model import JudgedModel
from ..decoding.rules import JudgeRule
from ..decoding.stats import Stats
from ..forward.branches import Keys
from ..models.load import fingerprint
from ..models.pair import with_lengths
from ..models.tokens import eos_tokens, greedy, until_eos
from .methods import Method


@dataclass
class AnswerRecord:
    """
    One answer and what was measured while it was decoded: a line of `quality.jsonl` or `timing.jsonl`.

    Args:
        method, prompt (`str`): Name of the method, and id of the prompt.
        repeat (`int`): How often this answer was decoded before.
        share (`float`, *optional*): For a coin that imitates a judge, the share of mismatches that it accepts.
        tokens (`list[int]`): The answer.
        finished (`bool`): Whether it ended before the limit.
        seconds (`float`, *optional*): Wall time of `generate`, in mode timing.
        logprob (`float`, *optional*): Sum of the tokens' log-probabilities under the target, nats, in mode quality.
        lengths (`list[int]`): Tokens that each forward of the target added.
        draft_forwards (`int`): Forwards of the draft.
        stats ([`Stats`]): Empty if the method has no rule; without seconds in mode quality.
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

    @property
    def key(self) -> tuple[str, str, int]:
        return self.method, self.prompt, self.repeat


def accepted_share(records: Iterable[AnswerRecord]) -> float:
    """The share of mismatches that a rule accepted, among those it was asked about, in [0, 1]."""
    judged, asked = (sum(getattr(record.stats, name) for record in records) for name in ("judged", "asked"))
    return judged / asked if asked else 0.0


@dataclass(frozen=True)
class Job:
    """An answer to decode. `ids`, of shape `(1, prompt_length)`, are the prompt's tokens; `judged` is the target with
    the method's rule, if it has one."""

    method: Method
    prompt: Prompt
    ids: torch.LongTensor
    repeat: int
    judged: JudgedModel | None
    share: float | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        return self.method.name, self.prompt.id, self.repeat

    @functools.cached_property
    def made_with(self) -> str:
        judge = None
        if self.judged is not None and isinstance(rule := self.judged.rule, JudgeRule):
            judge = [fingerprint(rule.judge), rule.special_tokens, str(rule.threshold)]
        return hashlib.sha256(json.dumps([self.ids.tolist(), judge, self.share]).encode()).hexdigest()[:16]


class Recorder:
    """Replaces the forward of a model (a copy) and records how many tokens each forward adds to the text; with
    `scored` also their log-probabilities. `prompt` is the model's cache of the prompt without its last token, which is
    then not computed again."""

    def __init__(self, model: PreTrainedModel, prompt_length: int, prompt: Keys | None = None, scored: bool = False):
        self.prompt_length = prompt_length
        self.starts: list[int] = []  # for each forward, the length of the text before its candidates
        self.logprob = 0.0  # of the tokens scored so far, nats
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
            before, fed = cache.get_seq_length(), arguments["input_ids"][0]
            start = max(before + 1, prompt_length)
            if scored and self.starts:  # the last round kept some candidates, and then the token that is fed first now
                kept = self.candidates[: start - self.starts[-1] - 1]
                self.score(torch.cat([kept, fed[:1]]))
            output = forward(**arguments)
            self.starts.append(start)
            if scored:
                self.candidates = fed[start - before :]
                self.logits = output.logits[0, -len(self.candidates) - 1 :].clone()  # a rule may change them
            return output

        model.forward = recorded

    def score(self, tokens: torch.LongTensor) -> None:
        """Add the log-probabilities of the tokens that the last forward added, of shape `(n,)`."""
        logprobs = self.logits[: len(tokens)].float().log_softmax(-1)
        self.logprob += logprobs.gather(-1, tokens[:, None]).sum().item()

    def lengths(self, tokens: int) -> list[int]:
        """How many tokens each forward added to an answer of `tokens` tokens."""
        return [end - start for start, end in itertools.pairwise([*self.starts, self.prompt_length + tokens])]


def decode_answer(
    job: Job,
    models: Sequence[PreTrainedModel],
    max_new_tokens: int,
    draft_length: int | str,
    prompt_keys: Sequence[Keys | None] | None = None,
) -> AnswerRecord:
    """
    Decode one answer, greedily except for mismatches that the method accepts. See [`BenchConfig`].

    Args:
        models (`Sequence[PreTrainedModel]`): The draft (unless drafts come from prompt lookup) and the target: copies
            whose forwards and generation configs may be replaced.
        draft_length (`int` or `str`): That of the method ([`Method`]), or of the bench.
        prompt_keys (`Sequence[Keys]`, *optional*): In mode quality, the cache of the prompt for each of `models`. The
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
            options.prompt_lookup_num_tokens = 5 if draft_length == "auto" else draft_length
        else:
            drafts, options.prompt_lookup_num_tokens = {"assistant_model": models[0]}, job.method.lookup
            models[0].generation_config = with_lengths(models[0].generation_config, draft_length)
    if family == "ensemble":
        (options.assistant_ensemble_weight,) = job.method.arguments
    model = models[0] if family == "draft" else target
    model.generation_config = options  # else `generate` fills unset options from the model's own
    if job.judged is not None:
        model = job.judged.on(target)
    start = time.perf_counter()
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **drafts)
    seconds = time.perf_counter() - start
    answer, finished = until_eos(output[0, ids.shape[1] :], eos_tokens(target))
    tokens, recorder, logprob = answer.tolist(), recorders[-1], None
    lengths, draft_forwards = recorder.lengths(len(tokens)), 0 if lookup else len(recorders[0].starts)
    stats = Stats() if job.judged is None else replace(model.stats)
    if quality:
        seconds, stats.draft_seconds, stats.verify_seconds, stats.rule_seconds = None, 0.0, 0.0, 0.0
        if family == "draft":  # the target has not seen the answer yet
            text = output[:, :-1]
            positions, mask = torch.arange(text.shape[1], device=text.device)[None], torch.ones_like(text)
            target(input_ids=text, attention_mask=mask, position_ids=positions, past_key_values=DynamicCache())
        recorder.score(answer[recorder.starts[-1] - ids.shape[1] :])
        logprob = recorder.logprob
    measured = (tokens, finished, seconds, logprob, lengths, draft_forwards, stats)  # in the order of the record
    return AnswerRecord(*job.key, job.share, *measured, job.made_with)
