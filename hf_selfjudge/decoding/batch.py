"""Judged generation for several prompts: rows that are decoded side by side, each as if it were alone.

In: a batch padded on the left. Out: what `generate` returns for a batch. How rows share forwards is told in
`together.py`; here a batch is taken apart and put together again.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from ..forward.lockstep import run_in_lockstep
from .processors import copied
from .rules import Rule


if TYPE_CHECKING:
    from .judged_model import JudgedModel


def generate_rows(
    judged: JudgedModel,
    ids: torch.LongTensor,
    generation_config: GenerationConfig | None,
    logits_processor: LogitsProcessorList | None,
    rules: Sequence[Rule] | None,
    seeds: Sequence[int] | None,
    kwargs: dict,
) -> torch.LongTensor | GenerateDecoderOnlyOutput:
    """`judged.generate` for `ids` of shape `(rows, length)`; see there."""
    target, rows = judged.target, range(len(ids))
    rest = {name: value for name, value in kwargs.items() if name not in ("input_ids", "attention_mask")}
    draft, streamers = rest.pop("assistant_model", None), rest.pop("streamer", None)
    config = merged(target, generation_config)
    asked = config.to_dict() | rest
    _check(judged, len(ids), asked, rest, {"rules": rules, "seeds": seeds, "streamer": streamers})
    prompts = _prompts(ids, kwargs.get("attention_mask"), asked.get("pad_token_id"))
    if seeds is None and asked.get("do_sample"):
        seeds = torch.randint(2**62, (len(ids),)).tolist()

    def answer(row: int, *models):
        single = judged.on(models[-1])
        if rules is not None:
            single.rule = rules[row]
            single.special_tokens = {*judged.special_tokens, *rules[row].special_tokens}
        options = dict(rest)
        padding = ids.shape[1] - prompts[row].shape[1]
        row_config = copy.deepcopy(config)
        for limit in ("max_length", "min_length"):  # these count the padding
            if options.get(limit):
                options[limit] -= padding
            elif getattr(row_config, limit):
                setattr(row_config, limit, getattr(row_config, limit) - padding)
        if (allowed := options.get("prefix_allowed_tokens_fn")) is not None:
            options["prefix_allowed_tokens_fn"] = lambda _, prefix: allowed(row, prefix)
        if draft is not None:
            options["assistant_model"] = models[0]
        if streamers is not None:
            options["streamer"] = streamers[row]
        single.target.generation_config = row_config  # the stand-in's own
        options["attention_mask"] = torch.ones_like(prompts[row])
        processors = copied(logits_processor or ())  # what they remember is a row's own
        return single.generate(prompts[row], None, processors, **options), single.stats

    models = [target] if draft is None else [draft, target]
    calls = [lambda *stand_ins, row=row: answer(row, *stand_ins) for row in rows]
    outputs, stats = zip(*run_in_lockstep(models, calls, seeds), strict=True)
    judged.remember_rows(stats)
    return _join(ids, prompts, outputs, asked)


def merged(target: PreTrainedModel, generation_config: GenerationConfig | None) -> GenerationConfig:
    """What stock makes of the caller's config: what it leaves open is taken from the target's."""
    config = copy.deepcopy(target.generation_config if generation_config is None else generation_config)
    config.update(**target.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    return config


def _prompts(ids: torch.LongTensor, mask: torch.Tensor | None, pad: int | None) -> list[torch.LongTensor]:
    """The rows without their padding, each of shape `(1, length)`."""
    if mask is None:
        if pad is not None and (ids[:, 0] == pad).any():
            raise ValueError(
                "`attention_mask` is missing, and a row begins with padding. Pass what the tokenizer gave."
            )
        mask = torch.ones_like(ids)
    mask = mask.long()
    if mask.shape != ids.shape:
        raise ValueError(f"`attention_mask` has shape {tuple(mask.shape)}, `input_ids` {tuple(ids.shape)}.")
    if not mask.any(-1).all():
        empty = (~mask.any(-1)).nonzero()[0].item()
        raise ValueError(f"Row {empty} of `input_ids` is empty. Give each row at least one token.")
    if (mask.diff(dim=-1) < 0).any():
        raise ValueError("`input_ids` is padded on the right. Load the tokenizer with `padding_side='left'`.")
    return [row[present.bool()][None] for row, present in zip(ids, mask, strict=True)]


def _check(judged: JudgedModel, rows: int, asked: dict, rest: dict, for_each: dict) -> None:
    """
    Raises:
        ValueError: If what is asked of a batch works for one prompt only, or something has not one entry a row.
        TypeError: If one of the rules is none.
    """
    if judged.target.config.is_encoder_decoder:
        raise ValueError("A batch with a draft needs a decoder-only target. Ask for one prompt at a time.")
    alone = [name for name in ("output_attentions", "output_hidden_states", "assistant_early_exit") if asked.get(name)]
    alone += [name for name in ("num_beams", "num_return_sequences") if (asked.get(name) or 1) > 1]
    alone += [name for name in ("speculation_type", "past_key_values") if asked.get(name) is not None]
    alone += ["assistant_tokenizer"] if "assistant_tokenizer" in rest and asked.get("do_sample") else []
    alone += [name for name, value in rest.items() if isinstance(value, torch.Tensor)]
    if alone:
        raise ValueError(
            f"`{'`, `'.join(alone)}` cannot be asked of a batch with a draft. Ask for one prompt at a time."
        )
    for name, value in for_each.items():
        if value is not None and (not isinstance(value, Sequence) or len(value) != rows):
            raise ValueError(f"`{name}` must be a list with one entry for each of the {rows} rows, got {value!r}.")
    for rule in for_each["rules"] or ():
        if not isinstance(rule, Rule):
            raise TypeError(f"`rules` must be of class Rule, got {type(rule).__name__}.")
        rule.check_target(judged.target)


def _join(
    ids: torch.LongTensor, prompts: list[torch.LongTensor], outputs: Sequence, asked: dict
) -> torch.LongTensor | GenerateDecoderOnlyOutput:
    """A batch of answers, shorter ones filled up: tokens with padding, scores with zeros."""
    details = not isinstance(outputs[0], torch.Tensor)
    answers = [
        (output.sequences if details else output)[0, prompt.shape[1] :]
        for output, prompt in zip(outputs, prompts, strict=True)
    ]
    pad, end = asked.get("pad_token_id"), asked.get("eos_token_id")
    fill = pad if pad is not None else end if isinstance(end, int) else (end or [0])[0]
    new = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=fill)
    sequences = torch.cat([ids, new], dim=-1)
    if not details:
        return sequences
    scores = {}
    for name in ("scores", "logits"):
        if outputs[0].get(name) is not None:
            rows = torch.nn.utils.rnn.pad_sequence([torch.cat(output[name]) for output in outputs])
            scores[name] = tuple(rows.unbind())
    return GenerateDecoderOnlyOutput(sequences=sequences, **scores)
