"""In: a pair, prompts, methods. Out: an [`AnswerRecord`] for each answer, written to a folder as soon as it ends.

Mode quality decodes many answers side by side, which is much faster and gives the same text and rounds. Mode timing
decodes one answer at a time and alternates between methods.
"""

from __future__ import annotations

import copy
import functools
import itertools
import platform
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import DynamicCache, PreTrainedModel

from ..data.prompts import Prompt, fitting
from ..decoding.judged_model import JudgedModel
from ..decoding.stats import Stats
from ..forward.branches import Keys
from ..forward.lockstep import run_in_lockstep
from ..judge.judge import Judge
from ..judge.lora import Replay
from ..models.cpu import precision
from ..models.load import fingerprint
from ..models.offload import is_offloaded
from ..models.pair import Pair
from ..models.tokens import context_of
from ..utils.files import JsonlLog, check_or_write_settings
from ..utils.names import absolute_if_folder
from ..utils.processes import this_process
from ..utils.progress import progress_bar
from .answers import AnswerRecord, Job, accepted_share, decode_answer
from .methods import Method


MODES = ("quality", "timing")
Keep = Callable[[AnswerRecord], None]  # what is done with a new answer


@dataclass(frozen=True)
class BenchConfig:
    """How answers are decoded: greedily, except for mismatches that a method accepts."""

    mode: str = field(default="quality", metadata={"help": "quality: many answers at a time. timing: one at a time."})
    max_new_tokens: int = field(default=128, metadata={"help": "Limit of an answer, tokens.", "min": 1})
    draft_length: int | str = field(
        default=5,
        metadata={"help": "Tokens to draft in a round, or 'auto' (in the bench with timing; not in `serve`)."},
    )
    repeats: int = field(default=1, metadata={"help": "With timing: how often each answer is decoded.", "min": 1})
    at_once: int = field(default=48, metadata={"help": "With quality: answers under way at a time.", "min": 1})

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"`mode` must be one of {', '.join(MODES)}, got {self.mode!r}.")
        length = self.draft_length
        if length != "auto" and (not isinstance(length, int) or length < 1):
            raise ValueError(f"`draft_length` must be a number of tokens, 1 or more, or 'auto', got {length!r}.")
        self.check_length("`draft_length`", length)
        if self.mode == "quality" and self.repeats > 1:
            raise ValueError("`repeats` in `mode` quality would decode the same text again. Use it with timing.")

    def check_length(self, name: str, length: int | str | None) -> None:
        """Raise if drafts of this length go by the clock where seconds mean nothing. `name` is what asks for it."""
        if self.mode == "quality" and length == "auto":
            raise ValueError(f"{name} 'auto' goes by the clock. Use it with `mode` timing, or give a number.")


def decode(
    pair: Pair,
    prompts: Sequence[Prompt],
    methods: Sequence[Method],
    judges: Mapping[str, Judge],
    config: BenchConfig,
    folder: Path | None = None,
    drafts: Mapping[str, PreTrainedModel] | None = None,
) -> list[AnswerRecord]:
    """
    Answer every prompt with every method, with a progress bar. Prompts that are too long are left out; [`fitting`]
    says which. Under `accelerate launch` the processes of a machine share the prompts, if there is a `folder`; all of
    them return all answers.

    Args:
        judges (`Mapping[str, Judge]`): The judges by the folder or id that `methods` name.
        folder (`Path`, *optional*): Each answer is written to `MODE.jsonl` there when it ends. Started again, the
            bench goes on, also with more prompts or methods.
        drafts (`Mapping[str, PreTrainedModel]`, *optional*): In mode timing, drafts that `methods` name.

    Returns:
        `list[AnswerRecord]`: In the order of repeats, prompts and methods.

    Raises:
        ValueError: If `folder` holds answers of other models, limits, prompts or judges; if a prompt cannot be
            encoded; or if, in mode timing, a coin imitates a judge that mode quality has not measured in this folder.
        TooLong: If no prompt fits.
    """
    for method in methods:
        config.check_length(f"`rule` {method.name!r}:", method.length)
    process = this_process()
    with process.main_process_first():
        log = None if folder is None else _open(folder, pair, config)
    process.wait_for_everyone()  # none writes while another one reads, and repairs, the file
    prompts, tokens, _ = fitting(pair.tokenizer, prompts, readable_context(pair, methods), config.max_new_tokens)
    texts = [(prompt, ids.to(pair.target.device)) for prompt, ids in zip(prompts, tokens, strict=True)]

    # One judged model for each method: a judge is checked against its target once, and measured times are kept.
    def with_rule(method: Method, share: float | None = None) -> JudgedModel | None:
        rule = method.rule(judges, share)
        length = method.length or config.draft_length
        return None if rule is None else JudgedModel(pair.target, rule, length, pair.tokenizer)

    coins = [method for method in methods if method.like is not None]
    judged = {method: with_rule(method) for method in methods if method.like is None}
    written = {record.key: record for record in _records(log)}
    done: dict[tuple, AnswerRecord] = {}
    in_order = itertools.product(range(config.repeats), prompts, methods)
    keys = [(method.name, prompt.id, repeat) for repeat, prompt, method in in_order]
    own = texts if log is None else texts[process.process_index :: process.num_processes]

    steps = len(own) * len(methods) * config.repeats
    with progress_bar(steps, f"Decode ({config.mode})", shown=process.is_main_process) as bar:

        def keep(record: AnswerRecord) -> None:
            if log is not None:
                log.add(asdict(record))
            done[record.key] = record
            bar.update()

        if config.mode == "timing":
            measured = () if folder is None else _records(JsonlLog(folder / "quality.jsonl"))
            stages = [methods]
        else:  # a coin that imitates a judge comes after it
            measured, stages = done.values(), [[*judged], coins]
        for stage in stages:
            shares = {coin: _coin_share(coin, written.values(), measured) for coin in coins if coin in stage}
            judged |= {coin: with_rule(coin, share) for coin, share in shares.items()}
            jobs = [
                Job(method, prompt, ids, repeat, judged[method], shares.get(method))
                for repeat, (prompt, ids), method in itertools.product(range(config.repeats), own, stage)
            ]
            for job in jobs:
                if job.key in written:
                    done[job.key] = _checked(written[job.key], job, log)
                    bar.update()
            jobs = [job for job in jobs if job.key not in written]
            if config.mode == "quality":
                _side_by_side(jobs, pair, config, keep)
            else:
                _in_turns(jobs, pair, config, drafts or {}, keep)
            if log is not None and process.num_processes > 1:
                everyone = _of_everyone(process, log)
                done |= {key: everyone[key] for key in keys if key in everyone}
    return [done[key] for key in keys]


def readable_context(pair: Pair, methods: Sequence[Method]) -> int | None:
    """Context, in tokens, that the models of all methods have, so that all answer the same prompts; `None` if there is
    no limit. The draft's context counts only if it answers alone."""
    alone = [context_of(pair.draft)] if any(method.family == "draft" for method in methods) else []
    return min((context for context in (pair.context, *alone) if context is not None), default=None)


def _coin_share(coin: Method, written: Iterable[AnswerRecord], measured: Iterable[AnswerRecord]) -> float:
    """The share that a coin accepts: the same as in answers already `written`, or that of its judge in `measured`."""
    known = [record.share for record in written if record.method == coin.name]
    if known:
        return known[-1]
    answers = [record for record in measured if record.method == coin.like.name]
    if not answers:
        raise ValueError(
            f"`rule` {coin.name!r}: how often {coin.like.name} accepts is not known here yet. Run the bench in "
            "`mode` quality first, with the same `output`."
        )
    return round(accepted_share(answers), 4)


def _side_by_side(jobs: list[Job], pair: Pair, config: BenchConfig, keep: Keep) -> None:
    """Decode many answers at a time. The cache of a prompt is kept from its first answer to its last. Those of the
    draft alone do not count: they come first for all prompts, whose caches would fill the memory."""
    # Forwards of the draft go first. Where it answers alone, it needs one for each token: others must not wait for it.
    jobs = sorted(jobs, key=lambda job: job.method.family != "draft")
    left = Counter(job.prompt.id for job in jobs if job.method.family != "draft")
    read: dict[str, list[Keys | None]] = {}

    def call(job: Job, *models: PreTrainedModel) -> None:
        keys = read.get(job.prompt.id) or [_prompt_keys(model, job.ids[:, :-1]) for model in pair.models]
        if job.method.family != "draft":
            read[job.prompt.id] = keys
            left[job.prompt.id] -= 1
            if not left[job.prompt.id]:
                del read[job.prompt.id]
        if job.judged is not None and isinstance(job.judged.rule.replay_on(pair.target), Replay):
            keys = [*keys[:-1], None]  # an adapter has to see the prompt too
        length = job.method.length or config.draft_length
        keep(decode_answer(job, models, config.max_new_tokens, length, keys))

    run_in_lockstep(pair.models, [functools.partial(call, job) for job in jobs], at_once=config.at_once)


def _in_turns(jobs: list[Job], pair: Pair, config: BenchConfig, drafts: Mapping, keep: Keep) -> None:
    """Decode one answer at a time. Each method first decodes a short answer, so that none pays for the first access to
    the weights. Which method comes first changes with each prompt, since the speed of a shared machine changes."""

    def answer(job: Job, max_new_tokens: int) -> AnswerRecord:
        draft = pair.draft if job.method.draft is None else drafts[job.method.draft]
        models = [copy.copy(model) for model in (draft, pair.target) if model is not None]
        return decode_answer(job, models, max_new_tokens, job.method.length or config.draft_length)

    for job in {job.method: job for job in reversed(jobs)}.values():
        answer(job, 8)
    for turn, (_, group) in enumerate(itertools.groupby(jobs, lambda job: (job.repeat, job.prompt.id))):
        in_order = deque(group)
        in_order.rotate(-turn)
        for job in in_order:
            keep(answer(job, config.max_new_tokens))


@torch.no_grad()
def _prompt_keys(model: PreTrainedModel, ids: torch.LongTensor) -> Keys | None:
    """The model's cache of `ids`, of shape `(1, length)`; `None` if they exceed its context, as a draft's may be
    shorter."""
    context, cache = context_of(model), DynamicCache()
    if context is not None and ids.shape[1] > context:
        return None
    if ids.shape[1]:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, logits_to_keep=1)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def _checked(record: AnswerRecord, job: Job, log: JsonlLog) -> AnswerRecord:
    """The record of a job that was done before; a `ValueError` if it was another one."""
    if record.made_with != job.made_with:
        raise ValueError(
            f"`output`: {log.path} has an answer of {job.method.name!r} to prompt {job.prompt.id!r}, but the prompt "
            "or the judge has changed since. Choose another folder."
        )
    return record


def _of_everyone(process: PartialState, log: JsonlLog) -> dict[tuple, AnswerRecord]:
    """The answers of all processes, when each has done its part. None goes on before all have read them."""
    process.wait_for_everyone()
    answers = {record.key: record for record in _records(JsonlLog(log.path))}
    process.wait_for_everyone()
    return answers


def _records(log: JsonlLog | None) -> list[AnswerRecord]:
    try:
        return [AnswerRecord(**row | {"stats": Stats(**row["stats"])}) for row in log or ()]
    except (KeyError, TypeError) as error:
        raise ValueError(f"`output`: {log.path} was written by another version. Choose another folder.") from error


def _open(folder: Path, pair: Pair, config: BenchConfig) -> JsonlLog:
    """The answers in `folder`. Writes how they are decoded, or checks that it is the same."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in asdict(config).items() if name not in ("at_once", "repeats")}
    for name, model in (("target", pair.target), ("draft", pair.draft)):
        settings[name] = None if model is None else absolute_if_folder(model.config.name_or_path)
        settings[f"{name}_fingerprint"] = None if model is None else fingerprint(model)
        settings[f"{name}_dtype"] = None if model is None else precision(model) + ", offloaded" * is_offloaded(model)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    versions = {name: version(name) for name in ("hf-selfjudge", "transformers", "torch")}
    # Seconds of another machine must not be mixed with these; its text is the same, apart from rounding.
    free = () if config.mode == "timing" else ("versions", "machine")
    path = folder / f"{config.mode}.json"
    check_or_write_settings(path, settings | {"versions": versions, "machine": machine}, {}, free)
    return JsonlLog(path.with_suffix(".jsonl"))
