"""Judged generation inside stock `generate(assistant_model=...)`.

In: a target, a rule, and whatever `generate` takes. Out: what `generate` returns, and [`Stats`]. A draft proposes, the
target verifies, and where its choice differs from the candidate the rule may accept the candidate all the same.

Nothing of the decoding loop is rewritten. [`JudgeCandidateGenerator`] wraps the candidate generator that transformers
built and so learns what was drafted; [`ForwardTap`] reads the verification forward; [`JudgeLogitsProcessor`] makes the
row of an accepted candidate one-hot, so that the stock comparison keeps it; [`KeptTokens`] sees what was kept, and
ends the text. The loop is `GenerationMixin._assisted_decoding` of transformers.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import threading
from collections.abc import Iterable, Mapping, Sequence

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import AssistedCandidateGenerator, CandidateGenerator
from transformers.generation.candidate_generator import (
    AssistedCandidateGeneratorDifferentTokenizers,
    EarlyExitCandidateGenerator,
    PromptLookupCandidateGenerator,
    UniversalSpeculativeDecodingGenerator,
)

from ..forward.tap import ForwardTap
from ..judge.judge import Judge
from ..judge.replay import ReplaySession
from ..models.cpu import pack_again
from ..models.pair import fit_vocabulary, same_tokens
from ..models.tokens import context_of
from .batch import generate_rows, merged
from .drafting import AutoLength, FastDraft, set_draft_length, stay_within_context
from .processors import ConstrainedScores, JudgeLogitsProcessor, Trial
from .rules import JudgeRule, Rule
from .stats import Stats
from .stopping import HeldStreamer, KeptTokens, without_last
from .verification import JudgeCandidateGenerator, Round


# Candidate generators whose drafts come without logits, and the one among their children whose drafts have them.
WITHOUT_LOGITS = (PromptLookupCandidateGenerator, AssistedCandidateGeneratorDifferentTokenizers)
WITH_LOGITS = UniversalSpeculativeDecodingGenerator
# Methods of the target that are overridden for the time of a call, in the order in which `generate` calls them.
OVERRIDDEN = ("_get_logits_processor", "_get_stopping_criteria", "_get_candidate_generator")


class JudgedModel:
    """
    A target with a rule that decides which mismatches to keep; `generate` and everything else as on the target itself.

    Args:
        target ([`~transformers.PreTrainedModel`]): The model whose quality counts. It is not changed.
        rule ([`Rule`]): What decides: a judge ([`JudgeRule`]) or one of the training-free rules.
        draft_length (`int` or `"auto"`, *optional*): Tokens that the draft proposes in a round, unless transformers'
            `assistant_confidence_threshold` ends it before; `"auto"` ends each draft where one more token would cost
            more than it is worth ([`AutoLength`]). By default what transformers itself is told:
            `draft.generation_config`, `prompt_lookup_num_tokens`, …
        special_tokens (`Iterable[int]`, *optional*): Tokens that are never accepted against the target, nor overruled,
            beside those that the rule and the generation config name; [`special_tokens`] of target and tokenizer for
            a rule that knows of none.

    Attributes:
        stats ([`Stats`]): Of the last call of `generate` that had a draft: this thread's own, or if it made none,
            anyone's (streaming calls run in a thread of their own).
        total ([`Stats`]): Of all calls.

    Raises:
        TypeError: If `target` is a wrapper (PEFT, compiled) instead of a transformers model, or `rule` is no rule.
        ValueError: If `rule` is a judge made for another target, or `draft_length` is neither.

    Example:

    ```python
    >>> judged = JudgedModel.from_pretrained(target, "me/qwen2.5-coder-1.5b-selfjudge")
    >>> judged.generate(**inputs, assistant_model=draft, max_new_tokens=64)
    >>> judged.stats.tokens_per_round
    ```
    """

    def __init__(
        self,
        target: PreTrainedModel,
        rule: Rule,
        draft_length: int | str | None = None,
        special_tokens: Iterable[int] = (),
    ):
        if not isinstance(target, PreTrainedModel):
            raise TypeError(
                f"`target` must be a transformers model, got {type(target).__name__}. Of a PEFT model pass "
                "`merge_and_unload()`, of a compiled model the original."
            )
        if not isinstance(rule, Rule):
            hint = " Wrap it: `JudgeRule(judge)`." if isinstance(rule, Judge) else " Use one of hf_selfjudge.rules."
            raise TypeError(f"`rule` must be a Rule, got {type(rule).__name__}.{hint}")
        numbered = isinstance(draft_length, int) and not isinstance(draft_length, bool) and draft_length > 0
        if draft_length not in (None, "auto") and not numbered:
            raise ValueError(f"`draft_length` must be a number of tokens, 'auto' or None, got {draft_length!r}.")
        rule.check_target(target)
        pack_again(target)
        self.target, self.rule, self.draft_length = target, rule, draft_length
        self.special_tokens = {*rule.special_tokens, *special_tokens}
        self.total = Stats()
        self._last, self._own, self._lock = Stats(), _Own(), threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        target: PreTrainedModel,
        judge: str | os.PathLike,
        *,
        threshold: float | str | None = None,
        allow_other_weights: bool = False,
        draft_length: int | str | None = None,
        **hub_kwargs,
    ) -> JudgedModel:
        """
        Put a judge from a folder or a Hub repo on a target.

        Args:
            threshold, allow_other_weights: See [`JudgeRule`].
            draft_length: See [`JudgedModel`].
            hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only` of [`Judge.from_pretrained`].
        """
        rule = JudgeRule(Judge.from_pretrained(judge, **hub_kwargs), threshold, allow_other_weights)
        return cls(target, rule, draft_length)

    @property
    def threshold(self) -> float | str:
        """Of the judge: a candidate is accepted if its probability of changing the meaning is below this, in [0, 1];
        or as text, `"0.03/token"`, below this for each token gained. See [`JudgeRule`]."""
        return self.rule.threshold

    @threshold.setter
    def threshold(self, value: float | str) -> None:
        _ = self.threshold  # a rule without one says so
        self.rule.threshold = value

    @property
    def stats(self) -> Stats:
        return self._own.stats or self._last

    def __getattr__(self, name: str):
        if name == "target":  # not set yet: copying or unpickling
            raise AttributeError(name)
        if name == "threshold":
            raise AttributeError(f"`threshold` is a judge's, and the rule is {self.rule}. Make another rule instead.")
        value = getattr(self.target, name)
        if not inspect.ismethod(value):
            return value

        @functools.wraps(value)
        def delegated(*args, **kwargs):
            result = value(*args, **kwargs)
            return self if result is self.target else result  # `.to(…)`, `.eval()`: still judged

        return delegated

    def save_pretrained(self, *args, **kwargs):
        """Refused: it would be the whole target."""
        raise NotImplementedError("Save or push the judge (`judged.rule.judge`) or the target (`judged.target`).")

    push_to_hub = save_pretrained

    def __call__(self, *args, **kwargs):
        """The target's own forward."""
        return self.target(*args, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *,
        rules: Sequence[Rule] | None = None,
        seeds: Sequence[int] | None = None,
        **kwargs,
    ):
        """
        Stock `generate`, with all its arguments. Where it decodes with a draft (`assistant_model`,
        `prompt_lookup_num_tokens`, …) the rule takes part; elsewhere the result is exactly the target's.

        Unlike stock it also takes several prompts with a draft, as `input_ids` and `attention_mask` padded on the
        left. Each row goes its own way, and its answer is the one it would get alone, unless the clock has a part in
        it (`draft_length="auto"` with sampling, or with a rule that accepts anything). `stats.rows` has the statistics
        of each. `streamer` is then a list, one for each row, and criteria and processors are asked about one row at a
        time, without its padding; each row has copies of the processors.

        Unlike stock, criteria are asked about each token that is kept, and the text ends with the first one that they
        end it at; a processor that remembers what it was asked sees each of these tokens once.

        Args:
            rules (`Sequence[Rule]`, *optional*): One for each row, instead of the model's own.
            seeds (`Sequence[int]`, *optional*): For each row, the seed of what is sampled; by default drawn from the
                global generator.

        Raises:
            TypeError: If the tokens or their mask are no tensors, or the draft is no model.
            ValueError: If the prompt is empty or longer than the target's context, the draft has another vocabulary
                and no tokenizers were given, the rule or `draft_length` cannot work with this draft, or a draft cannot
                be used with `guidance_scale`, a processor or the content of a cache; for several prompts also if they
                are padded on the right, or something is asked that works for one only.
        """
        ids = _token_ids(inputs, kwargs)
        kwargs = self._with_fitting_draft(kwargs)
        several = ids is not None and len(ids) > 1 and self._has_draft(generation_config, kwargs)
        if several or rules is not None or seeds is not None:
            return generate_rows(self, ids, generation_config, logits_processor, rules, seeds, kwargs)
        self._check(ids, kwargs)
        replay = self.rule.replay_on(self.target)
        round = Round(self.rule, self.special_tokens, None if replay is None else replay.start())
        last = JudgeLogitsProcessor(round)
        if (streamer := kwargs.get("streamer")) is not None:
            kwargs["streamer"] = streamer = HeldStreamer(streamer)
        kept: list[KeptTokens] = []
        generators: list[JudgeCandidateGenerator] = []
        # The overrides go on a shallow copy: it shares the weights, and other callers of the target do not see them.
        target = copy.copy(self.target)
        build_processors, build_criteria = target._get_logits_processor, target._get_stopping_criteria
        build_generator = target._get_candidate_generator

        def with_judge(**arguments) -> LogitsProcessorList:
            return LogitsProcessorList([*build_processors(**arguments), last])

        def token_by_token(**arguments) -> StoppingCriteriaList:
            kept.append(KeptTokens(build_criteria(**arguments), round, streamer))
            return kept[0]

        def wrap(**arguments) -> JudgeCandidateGenerator:
            processors, cache = arguments["logits_processor"], arguments["model_kwargs"]["past_key_values"]
            round.trial = Trial(processors)
            # The draft gets the target's processors, but not these.
            ours = (ConstrainedScores, JudgeLogitsProcessor)
            arguments["logits_processor"] = LogitsProcessorList(p for p in processors if not isinstance(p, ours))
            round.prepare(arguments["generation_config"], target.device)
            generators.append(self._wrap(build_generator(**arguments), round))
            _return_states(generators[0], arguments)
            if not target.config.is_encoder_decoder and arguments["model_kwargs"].get("inputs_embeds") is not None:
                _read_embeddings(generators[0])
            if cache.get_seq_length():
                _continue_cache(target, generators[0], arguments)
            kept[0].begin(cache)
            return generators[0]

        vars(target).update(zip(OVERRIDDEN, (with_judge, token_by_token, wrap), strict=True))
        processors = LogitsProcessorList([*(logits_processor or []), ConstrainedScores(round)])
        try:
            with ForwardTap(target, round.observe, None if replay is None else replay.entering):
                output = target.generate(inputs, generation_config, processors, **kwargs)
        finally:  # what refers to itself would keep caches until the next garbage collection
            _without_overrides(target)
            if generators and kept[0].cache is not None:
                kept[0].cache.undo()
        if not generators:
            return output
        if round.replaced:
            output.scores = round.own_scores(output.scores)
        self._remember(round.stats)
        # transformers keeps the length that this schedule arrived at, but does not look inside a wrapper for it.
        (inner,) = (generator.inner for generator in generators)
        if isinstance(inner, AssistedCandidateGenerator) and self.draft_length is None:
            config = inner.assistant_model.generation_config
            if config.num_assistant_tokens_schedule == "heuristic":
                config.num_assistant_tokens = inner.num_assistant_tokens
        return without_last(output, kept[0].dropped)

    def _wrap(self, inner: CandidateGenerator, round: Round) -> JudgeCandidateGenerator:
        """Decorate what transformers built; say now what could not work later."""
        if self.rule.needs_draft_logits and isinstance(inner, WITHOUT_LOGITS) and not isinstance(inner, WITH_LOGITS):
            raise ValueError(
                f"`rule` {type(self.rule).__name__} compares target and draft, but drafts of {type(inner).__name__} "
                "come without probabilities. Use a draft model with the target's tokenizer, or another rule."
            )
        if isinstance(inner, AssistedCandidateGenerator):
            # The target's criteria end the text. transformers would ask the draft for a tokenizer that it cannot give.
            inner.generation_config.stop_strings = None
            stay_within_context(inner)
        if isinstance(inner, AssistedCandidateGeneratorDifferentTokenizers):
            inner.logits_processor = LogitsProcessorList()  # they are about tokens of the target
        if isinstance(inner, EarlyExitCandidateGenerator):
            inner.assistant_model = _with_own_config(inner.assistant_model)
        length = AutoLength() if self.draft_length == "auto" else None
        fast = type(inner) is AssistedCandidateGenerator
        if fast:
            FastDraft(inner, length)
        elif length is not None:
            set_draft_length(inner, length.first)  # refuse now what cannot be set
        if isinstance(self.draft_length, int):
            set_draft_length(inner, self.draft_length)
        blind = length is not None and not fast
        return JudgeCandidateGenerator(inner, round, length, blind, context_of(self.target))

    def _has_draft(self, generation_config: GenerationConfig | None, kwargs: dict) -> bool:
        config = merged(self.target, generation_config)
        names = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "speculation_type")
        return any((config.to_dict() | kwargs).get(name) is not None for name in names)

    def on(self, target: PreTrainedModel) -> JudgedModel:
        """The same on another copy of the target, with statistics of its own."""
        other = copy.copy(self)
        other.target, other.total = target, Stats()
        other._last, other._own = Stats(), _Own()
        return other

    def remember_rows(self, rows: Sequence[Stats]) -> None:
        """Make what the rows of a batch did the statistics of the last call."""
        stats = Stats(rows=list(rows))
        for row in rows:
            stats.add(row)
        self._remember(stats)

    def _remember(self, stats: Stats) -> None:
        self._own.stats = self._last = stats
        with self._lock:
            self.total.add(stats)

    def _with_fitting_draft(self, kwargs: dict) -> dict:
        """The arguments of `generate`; where both tokenizers are given and are the same, with a draft whose tokens
        need no translation."""
        draft = kwargs.get("assistant_model")
        if draft is not None and not isinstance(draft, PreTrainedModel):
            raise TypeError(
                f"`assistant_model` must be a transformers model, got {type(draft).__name__}. Load it first; "
                "`load_model` returns the model and its tokenizer."
            )
        own, other = kwargs.get("tokenizer"), kwargs.get("assistant_tokenizer")
        if draft is None or own is None or other is None or not same_tokens(own, other):
            return kwargs
        fitted = fit_vocabulary(draft, self.target.config.get_text_config().vocab_size)
        return {name: value for name, value in kwargs.items() if name != "assistant_tokenizer"} | {
            "assistant_model": fitted
        }

    def _check(self, input_ids: torch.Tensor | None, kwargs: dict) -> None:
        config = self.target.config.get_text_config()
        if input_ids is not None and "inputs_embeds" not in kwargs and not config.is_encoder_decoder:
            length, context = input_ids.shape[-1], context_of(self.target)
            if length == 0:
                raise ValueError("`input_ids` is empty. Give at least one token.")
            if context is not None and length >= context:
                raise ValueError(
                    f"`input_ids` has {length} tokens, the target's context is {context}. Shorten the prompt."
                )
        draft = kwargs.get("assistant_model")
        if draft is None or draft.get_output_embeddings() is None:  # some drafts use the target's own embeddings
            return
        draft_size = draft.config.get_text_config().vocab_size
        if draft_size != config.vocab_size and kwargs.get("assistant_tokenizer") is None:
            raise ValueError(
                f"`assistant_model` has a vocabulary of {draft_size} tokens, the target one of {config.vocab_size}. "
                "Pass `tokenizer` and `assistant_tokenizer`: if they are the same, the vocabularies are padded "
                "differently and nothing else; if not, tokens are translated."
            )
        self.rule.check_draft(draft)


def _token_ids(inputs: torch.Tensor | None, kwargs: dict) -> torch.Tensor | None:
    """
    The prompts' tokens, if they are given.

    Raises:
        TypeError: If they or their mask are no tensor.
        ValueError: If they are not one row for each prompt.
    """
    given = {"inputs": inputs} | {name: kwargs.get(name) for name in ("input_ids", "attention_mask")}
    for name, value in given.items():
        if isinstance(value, Mapping):
            raise TypeError(
                f"`{name}` is a {type(value).__name__}, not a tensor. Pass what is in it: `generate(**encoding, …)`."
            )
        if value is not None and not isinstance(value, torch.Tensor):
            raise TypeError(
                f"`{name}` must be a tensor of shape `(prompts, tokens)`, got {type(value).__name__}. Tokenize with "
                "`return_tensors='pt'`."
            )
        if value is not None and (value.dim() < 2 or (value.dim() > 2 and name == "input_ids")):
            raise ValueError(
                f"`{name}` has shape {tuple(value.shape)}, expected `(prompts, tokens)`. For one prompt add a "
                f"dimension: `{name}[None]`."
            )
    return inputs if inputs is not None else kwargs.get("input_ids")


def _return_states(generator: JudgeCandidateGenerator, arguments: dict) -> None:
    """
    Where hidden states or attentions are returned, let the target read the prompt without candidates: stock assisted
    generation returns states of the prompt as those of the first candidates.

    Args:
        arguments (`dict`): Of `_get_candidate_generator`.

    Raises:
        ValueError: If it would return others than the target alone does.
    """
    config, kwargs = arguments["generation_config"], arguments["model_kwargs"]
    asked = [name for name in ("output_hidden_states", "output_attentions") if getattr(config, name)]
    if not config.return_dict_in_generate or not asked:
        return
    cache = kwargs["past_key_values"]
    reasons = {
        "attention has a window": config.output_attentions and any(cache.is_sliding),
        "the prompt is in `past_key_values` or `inputs_embeds`": cache.get_seq_length()
        or kwargs.get("inputs_embeds") is not None,
        "drafts are made of the target's states": generator.requires_model_outputs,
    }
    for reason, found in reasons.items():
        if found:
            raise ValueError(f"`{asked[-1]}` cannot be returned with a draft where {reason}. Decode without a draft.")
    generator.waits = True


def _read_embeddings(generator: JudgeCandidateGenerator) -> None:
    """
    Let the target read a prompt of embeddings first, without candidates: stock assisted generation leaves these out of
    its first forward, but not of what it makes of it.

    Raises:
        ValueError: If drafts come from a model: it cannot read them.
    """
    if not isinstance(generator.inner, PromptLookupCandidateGenerator):
        raise ValueError(
            "`inputs_embeds` are the target's own, and a draft model cannot read them. Pass `input_ids`, or draft "
            "with `prompt_lookup_num_tokens`."
        )
    generator.waits = True


def _continue_cache(target: PreTrainedModel, generator: JudgeCandidateGenerator, arguments: dict) -> None:
    """
    Let the first forward of `target`, a copy, read only what its cache does not hold yet. Stock assisted generation
    reads all of the prompt again, behind what the cache holds of it.

    Args:
        arguments (`dict`): Of `_get_candidate_generator`.

    Raises:
        ValueError: If the cache does not hold a part of this prompt.
    """
    cache, mask = (arguments["model_kwargs"].get(name) for name in ("past_key_values", "attention_mask"))
    held, length = cache.get_seq_length(), arguments["input_ids"].shape[1]
    masked = arguments["generation_config"]._mask_length if mask is None else mask.shape[-1]
    if target.config.is_encoder_decoder or "inputs_embeds" in arguments["model_kwargs"]:
        raise ValueError("`past_key_values` with tokens in it needs a decoder-only target and `input_ids`.")
    if held >= length or masked != length:
        raise ValueError(
            f"`past_key_values` holds {held} tokens, `input_ids` has {length} and `attention_mask` {masked}. With a "
            "draft, pass all tokens of the prompt, of which the cache holds all but the last at most."
        )
    if generator.requires_model_outputs or isinstance(generator.round.replaying, ReplaySession):
        reader = type(generator.inner).__name__ if generator.requires_model_outputs else "the judge's adapter"
        raise ValueError(
            f"`past_key_values` holds {held} tokens, which {reader} would have to see too. Start with an empty cache."
        )
    prepare = target.prepare_inputs_for_generation

    def behind_cache(ids: torch.LongTensor, **kwargs) -> dict:
        if kwargs.get("is_first_iteration") and kwargs.get("past_key_values") is cache:
            kwargs["next_sequence_length"] = ids.shape[1] - held
        return prepare(ids, **kwargs)

    target.prepare_inputs_for_generation = behind_cache


def _with_own_config(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares the weights. Early exit drafts with fewer layers by changing the config for a while; threads
    that verify must not see it, and an exception must not leave it so."""
    model = copy.copy(model)
    _without_overrides(model)
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.assistant_early_exit = None  # its own drafts would have drafts
    model._modules = dict(model._modules)
    base = copy.copy(getattr(model, model.base_model_prefix))
    setattr(model, model.base_model_prefix, base)
    model.config = base.config = copy.copy(base.config)
    return model


def _without_overrides(model: PreTrainedModel) -> None:
    """Give a copy of the target, or a copy of that, its class's own methods back."""
    for name in (*OVERRIDDEN, "prepare_inputs_for_generation"):
        vars(model).pop(name, None)


class _Own(threading.local):
    """The statistics of each thread's last call."""

    stats: Stats | None = None
