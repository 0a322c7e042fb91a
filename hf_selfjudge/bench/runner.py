"""Many ways of decoding the same prompts.

In: a pair, prompts, settings, a folder. Out: one line for each answer in that folder, written as it ends. `quality`
decodes many prompts and settings side by side, which gives the exact text and its rounds in a fraction of the time;
`timing` decodes one answer at a time, in turns. What the answers are worth is told elsewhere.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
import platform
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import DynamicCache, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from ..data.prompts import Prompt, fitting, none_fits
from ..decoding.judged_model import JudgedModel
from ..decoding.rules import Rule
from ..decoding.stats import Stats
from ..forward.branches import Keys
from ..forward.lockstep import run_in_lockstep
from ..judge.judge import Judge
from ..judge.replay import Replay
from ..models.cpu import precision
from ..models.load import fingerprint
from ..models.tokens import context_of, eos_tokens, greedy, until_eos
from ..utils.files import JsonlLog, check_or_write_settings
from ..utils.names import lasting
from .methods import ENSEMBLE, Setting


MODES = ("quality", "timing")
FREE = ("at_once", "repeats")  # what may differ when a run goes on
WITHOUT_RULE = ("greedy", "stock", "draft", ENSEMBLE)
STOCK_LENGTH = 5  # tokens that stock drafts where rules have "auto"


@dataclass(frozen=True)
class BenchConfig:
    """
    How answers are decoded: greedily, whatever decides about mismatches.

    Args:
        mode (`str`): `"quality"` or `"timing"`.
        max_new_tokens (`int`): Limit of an answer, tokens.
        draft_length (`int` or `"auto"`): Tokens that the draft proposes in a round. `"auto"` looks at the clock, and
            so is for `timing` alone; it applies to rules, while stock drafts 5.
        lookup (`bool`): Whether drafts come from prompt lookup instead of a model.
        repeats (`int`): Times that `timing` decodes each answer.
        at_once (`int`): Answers that `quality` has under way.
    """

    mode: str = "quality"
    max_new_tokens: int = 128
    draft_length: int | str = 5
    lookup: bool = False
    repeats: int = 1
    at_once: int = 48

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"`mode` must be one of {', '.join(MODES)}, got {self.mode!r}.")
        if self.mode == "quality" and self.draft_length == "auto":
            raise ValueError("`draft_length` 'auto' goes by the clock. Use it with `mode` timing, or give a number.")
        if self.mode == "quality" and self.repeats > 1:
            raise ValueError("`repeats`: in `mode` quality the same text would come again. Use it with timing.")


@dataclass(frozen=True)
class Job:
    """An answer to decode: of one setting, to one prompt, for the `repeat`-th time."""

    setting: Setting
    prompt: Prompt
    ids: torch.LongTensor
    repeat: int = 0
    share: float | None = None  # of a coin that is like another setting

    @property
    def key(self) -> tuple[str, str, int]:
        return self.setting.name, self.prompt.id, self.repeat


class Recorder:
    """
    Stands between a call of `generate` and its model, and notes what the forwards tell.

    Args:
        model ([`~transformers.PreTrainedModel`]): A copy whose forward may be replaced.
        prompt_length (`int`): Tokens of the prompt.
        prompt (`Keys`, *optional*): The model's cache of all of them but the last: they are not computed again.
        scored (`bool`): Whether to note log-probabilities.
    """

    def __init__(self, model: PreTrainedModel, prompt_length: int, prompt: Keys | None = None, scored: bool = False):
        self.prompt_length, self.scored = prompt_length, scored
        self.known: list[int] = []  # tokens that were there before each forward's candidates
        self.told: dict[int, tuple[int, float]] = {}  # place -> the token last tried there, and its log-probability
        self.rows: torch.Tensor | None = None  # logits of the last forward, up to the `end` of what it was fed
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
            self._note(before, arguments["input_ids"][0].tolist(), output.logits[0])
            return output

        model.forward = recorded

    def _note(self, before: int, fed: list[int], logits: torch.Tensor) -> None:
        self.known.append(max(before + 1, self.prompt_length))
        if not self.scored:
            return
        if before >= self.prompt_length:
            self._tell(before, fed[0])
        for place in range(self.known[-1], self.end):
            self.told.pop(place, None)  # behind another text
        self.rows, self.end = logits, before + len(fed)
        for place in range(self.known[-1], self.end):
            self._tell(place, fed[place - before])

    def _tell(self, place: int, token: int) -> None:
        row = self.rows[place - 1 - self.end].float()
        self.told[place] = token, float(row[token] - row.logsumexp(-1))

    def lengths(self, tokens: int) -> list[int]:
        """Tokens that each forward added to an answer of so many."""
        ends = [*self.known[1:], self.prompt_length + tokens]
        return [end - start for start, end in zip(self.known, ends, strict=True)]

    def logprob(self, tokens: Sequence[int]) -> float:
        """Sum of the log-probabilities of an answer's tokens, nats."""
        for place, token in enumerate(tokens, start=self.prompt_length):
            if self.told.get(place, (None,))[0] != token:  # the last one is never fed
                self._tell(place, token)
        return sum(self.told[place][1] for place in range(self.prompt_length, self.prompt_length + len(tokens)))


def answer(
    job: Job,
    models: Sequence[PreTrainedModel],
    config: BenchConfig,
    rule: Rule | None,
    tokenizer: PreTrainedTokenizerBase,
    keys: Sequence[Keys | None],
) -> dict:
    """
    Decode one answer.

    Args:
        models (`Sequence[PreTrainedModel]`): The draft, unless drafts come from prompt lookup, and the target: copies
            whose forwards may be replaced.
        rule ([`Rule`], *optional*): What the setting decides with, if it has a rule.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the target.
        keys (`Sequence[Keys]`): Of the prompt, for each of `models`.

    Returns:
        `dict`, a line of the bench's files.
    """
    ids, family = job.ids, job.setting.family
    quality = config.mode == "quality"
    recorders = [
        Recorder(model, ids.shape[1], known, scored=quality and model is models[-1])
        for model, known in zip(models, keys, strict=True)
    ]
    target, how, drafts = models[-1], greedy(models[-1], config.max_new_tokens), {}
    if family not in ("greedy", "draft") and not config.lookup:
        drafts = {"assistant_model": models[0]}
    elif family != "greedy" and config.lookup:
        how.prompt_lookup_num_tokens = STOCK_LENGTH if config.draft_length == "auto" else config.draft_length
    if family == ENSEMBLE:
        (how.assistant_ensemble_weight,) = job.setting.values
    model, stats = (models[0] if family == "draft" else target), Stats()
    model.generation_config = how  # what `how` leaves open is not filled in from the model's own
    if rule is not None:
        model = JudgedModel(target, rule, config.draft_length, tokenizer)
    since = time.perf_counter()
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **drafts)
    seconds = time.perf_counter() - since
    tokens, finished = until_eos(output[0, ids.shape[1] :], eos_tokens(target))
    own = recorders[-1]
    lengths = own.lengths(len(tokens)) if own.known else []
    if quality and family == "draft":  # the target has not seen it yet
        read = output[:, :-1]
        places = torch.arange(read.shape[1], device=read.device)[None]
        mask = torch.ones_like(read)
        target(input_ids=read, attention_mask=mask, position_ids=places, past_key_values=DynamicCache())
    if rule is not None:
        stats = model.stats
    return {
        "setting": job.setting.name,
        "prompt": job.prompt.id,
        "repeat": job.repeat,
        "share": job.share,
        "tokens": tokens.tolist(),
        "finished": finished,
        "seconds": None if quality else seconds,
        "logprob": own.logprob(tokens.tolist()) if quality else None,
        "lengths": lengths,  # of each forward of the target
        "draft_forwards": len(recorders[0].known) if len(recorders) > 1 else 0,
        **{name: getattr(stats, name) for name in ("drafted", "matched", "asked", "judged", "target", "bonus")},
    }


def decode(
    target: PreTrainedModel,
    draft: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: Sequence[Setting],
    judges: Mapping[str, Judge],
    config: BenchConfig,
    folder: Path,
) -> list[dict]:
    """
    Answer every prompt with every setting, with a progress bar. Each answer is written to `MODE.jsonl` in `folder` as
    it ends; started again, the bench goes on there, and other prompts or settings may be added. Prompts that are too
    long for [`readable`] are left out ([`fitting`] tells which).

    Args:
        draft ([`~transformers.PreTrainedModel`], *optional*): `None` with `config.lookup`.
        judges (`Mapping[str, Judge]`): By the folder or id that `settings` name.

    Returns:
        `list[dict]`: The lines of these prompts and settings, in the order of repeats, prompts and settings.

    Raises:
        ValueError: If `folder` holds answers of other models, limits, prompts or judges; if a coin shall be like a
            judge in `timing` that `quality` has not measured in this folder; if a prompt cannot be encoded.
        TooLong: If no prompt fits.
    """
    _claim(folder, target, draft, tokenizer, config)
    lines = JsonlLog(folder / f"{config.mode}.jsonl")
    # One of each: what a judge has to try on its target is tried once, and before anything stands between them.
    rules = {setting: setting.rule(judges) for setting in settings if setting.judge is not None}
    for rule in rules.values():
        rule.check_target(target)
    context = readable(target, draft, settings)
    prompts, ids, left_out = fitting(tokenizer, prompts, context, config.max_new_tokens)
    if not prompts:
        raise none_fits(len(left_out), context, config.max_new_tokens)
    ids = [row.to(target.device) for row in ids]
    models = [target] if draft is None else [draft, target]
    first, later = [s for s in settings if s.like is None], [s for s in settings if s.like is not None]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("answers"))
    total = len(prompts) * len(settings) * config.repeats
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task(f"Decode ({config.mode})", total=total)
        done: dict[tuple, dict] = {}

        def go(jobs: list[Job]) -> None:
            made = {job.key: _made_with(job, rules) for job in jobs}
            done.update(_found(lines, made))
            progress.update(bar, completed=len(done))

            def keep(line: dict) -> None:
                line |= {"made_with": made[_key(line)]}
                lines.add(line)
                done[_key(line)] = line
                progress.advance(bar)

            jobs = [job for job in jobs if job.key not in done]
            (_side_by_side if config.mode == "quality" else _in_turns)(jobs, models, rules, tokenizer, config, keep)

        if config.mode == "timing":
            measured = _shares(JsonlLog(folder / "quality.jsonl"), later, lines)
            go(_jobs(settings, prompts, ids, config, measured))
        else:
            go(_jobs(first, prompts, ids, config, {}))
            go(_jobs(later, prompts, ids, config, _shares(done.values(), later, lines)))
    return [done[job.key] for job in _jobs(settings, prompts, ids, config, dict.fromkeys(settings))]


def readable(target: PreTrainedModel, draft: PreTrainedModel | None, settings: Sequence[Setting]) -> int | None:
    """Tokens that the models of all settings can attend to, so that all answer the same prompts: the draft's context
    counts where it answers alone. `None` if there is no limit."""
    alone = [draft] if any(setting.family == "draft" for setting in settings) else []
    contexts = [context_of(model) for model in (target, *alone)]
    return min((context for context in contexts if context is not None), default=None)


def accepted_share(lines: Sequence[dict]) -> float:
    """Of the mismatches that a rule was asked about, the share that it accepted, in [0, 1]."""
    asked = sum(line["asked"] for line in lines)
    return sum(line["judged"] for line in lines) / asked if asked else 0.0


def _jobs(
    settings: Sequence[Setting],
    prompts: Sequence[Prompt],
    ids: Sequence[torch.LongTensor],
    config: BenchConfig,
    shares: Mapping[Setting, float],
) -> list[Job]:
    return [
        Job(setting, prompt, row, repeat, shares.get(setting))
        for repeat in range(config.repeats)
        for prompt, row in zip(prompts, ids, strict=True)
        for setting in settings
    ]


def _shares(lines: Iterable[dict], coins: Sequence[Setting], before: Iterable[dict]) -> dict[Setting, float]:
    """What each coin is thrown with: as `before` in this folder, or as often as its judge accepts in `lines`."""
    thrown = {line["setting"]: line["share"] for line in before}
    shares = {coin: thrown[coin.name] for coin in coins if coin.name in thrown}
    for coin in [coin for coin in coins if coin not in shares]:
        like = [line for line in lines if line["setting"] == coin.like.name]
        if not like:
            raise ValueError(
                f"`rule` {coin.name!r}: how often {coin.like.name} accepts is not known here yet. Run the bench in "
                "`mode` quality first, with the same `output`."
            )
        shares[coin] = round(accepted_share(like), 4)
    return shares


def _side_by_side(jobs, models, rules, tokenizer, config, keep) -> None:
    """Many answers at a time. A prompt is read once, when its first answer begins, and forgotten with its last."""
    # The draft alone takes a forward for each token, and forwards of the draft go first: let nobody wait for a few.
    jobs = sorted(jobs, key=lambda job: job.setting.family != "draft")
    left = Counter(job.prompt.id for job in jobs)
    read: dict[str, list[Keys]] = {}

    def call(job: Job, *stand_ins: PreTrainedModel) -> None:
        if job.prompt.id not in read:
            read[job.prompt.id] = [_keys(model, job.ids[:, :-1]) for model in models]
        keys = read[job.prompt.id]
        left[job.prompt.id] -= 1
        if not left[job.prompt.id]:
            del read[job.prompt.id]
        rule = _rule(job, rules)
        if rule is not None and isinstance(rule.replay_on(models[-1]), Replay):
            keys = [*keys[:-1], None]  # the adapter has to see the prompt too
        keep(answer(job, stand_ins, config, rule, tokenizer, keys))

    run_in_lockstep(models, [functools.partial(call, job) for job in jobs], at_once=config.at_once)


def _in_turns(jobs, models, rules, tokenizer, config, keep) -> None:
    """One answer at a time, behind a short one of each setting, so that none pays for first touches. Which setting
    comes first changes from prompt to prompt."""
    nothing = [None] * len(models)

    def one(job: Job, how: BenchConfig) -> dict:
        return answer(job, [copy.copy(model) for model in models], how, _rule(job, rules), tokenizer, nothing)

    for job in {job.setting: job for job in reversed(jobs)}.values():
        one(job, replace(config, max_new_tokens=8))
    for turn, (_, group) in enumerate(itertools.groupby(jobs, lambda job: (job.repeat, job.prompt.id))):
        group = deque(group)
        group.rotate(-turn)
        for job in group:
            keep(one(job, config))


def _rule(job: Job, rules: Mapping[Setting, Rule]) -> Rule | None:
    if job.setting.family in WITHOUT_RULE:
        return None
    return rules[job.setting] if job.setting in rules else job.setting.rule({}, job.share)


@torch.no_grad()
def _keys(model: PreTrainedModel, ids: torch.LongTensor) -> Keys | None:
    """The model's cache of `ids` of shape `(1, length)`, every key of it; `None` if they exceed its context, as they
    may that of a draft."""
    context, cache = context_of(model), DynamicCache()
    if context is not None and ids.shape[1] > context:
        return None
    if ids.shape[1]:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, logits_to_keep=1)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def _key(line: dict) -> tuple[str, str, int]:
    return line["setting"], line["prompt"], line["repeat"]


def _made_with(job: Job, rules: Mapping[Setting, Rule]) -> str:
    """A digest of the prompt's tokens, the judge (its weights, and its threshold), and the share of a coin."""
    judge = None
    if job.setting in rules:
        rule = rules[job.setting]
        threshold = [rule.threshold.json()] if job.setting.values else rule.threshold.json()
        judge = [fingerprint(rule.judge), rule.special_tokens, threshold]
    return hashlib.sha256(json.dumps([job.ids.tolist(), judge, job.share], default=str).encode()).hexdigest()[:16]


def _found(lines: JsonlLog, made: dict[tuple, str]) -> dict[tuple, dict]:
    """Answers that are there already."""
    found = {_key(line): line for line in lines if _key(line) in made}
    for key, line in found.items():
        if line["made_with"] != made[key]:
            raise ValueError(
                f"`output`: {lines.path} has an answer of {key[0]!r} to prompt {key[1]!r}, but the prompt or the "
                "judge has changed since. Choose another folder."
            )
    return found


def _claim(
    folder: Path,
    target: PreTrainedModel,
    draft: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    config: BenchConfig,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "target": lasting(target.config.name_or_path),
        "target_fingerprint": fingerprint(target),
        "draft": None if draft is None else lasting(draft.config.name_or_path),
        "draft_fingerprint": None if draft is None else fingerprint(draft),
        "dtype": precision(target),
        "draft_dtype": None if draft is None else precision(draft),
        **{name: value for name, value in asdict(config).items() if name not in FREE},
    }
    made_on = {
        "versions": {name: version(name) for name in ("hf-selfjudge", "transformers", "torch")},
        "machine": machine(),
    }
    # Seconds of another machine are not to be mixed with these; its text is the same, to rounding.
    compared, noted = (settings | made_on, {}) if config.mode == "timing" else (settings, made_on)
    check_or_write_settings(folder / f"{config.mode}.json", compared, noted)


def machine() -> str:
    """The class of machine that figures were measured on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
