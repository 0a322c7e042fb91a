"""Several prompts, decoded side by side, each as if it were alone.

In: a batch padded on the left. Out: what `generate` returns for a batch. How its rows share forwards is in
`forward/lockstep.py`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from ..forward.lockstep import run_in_lockstep
from .auto_length import AutoLength
from .decode import decode_one
from .rules import Rule
from .stats import Stats
from .trial import copied


def decode_batch(
    target: PreTrainedModel,
    rules: Sequence[Rule],
    special_tokens: set[int],
    draft_length: int | str | None,
    ids: torch.LongTensor,
    seeds: Sequence[int] | None,
    generation_config: GenerationConfig | None = None,
    logits_processor: Sequence[LogitsProcessor] | None = None,
    streamer: Sequence[BaseStreamer] | None = None,
    attention_mask: torch.Tensor | None = None,
    assistant_model: PreTrainedModel | None = None,
    measured: AutoLength | None = None,
    **kwargs,
) -> tuple[torch.LongTensor | GenerateDecoderOnlyOutput, list[Stats]]:
    """Decode each row of `ids`, of shape `(rows, length)`, by [`decode_one`], whose arguments these are; `rules`,
    `seeds` and `streamer` have one for each row. Returns what `generate` returns, and the statistics of each row."""
    kwargs.pop("input_ids", None)
    config = with_defaults(target, generation_config)
    options = config.to_dict() | kwargs
    _check(target, ids, options, kwargs, {"rules": rules, "seeds": seeds, "streamer": streamer})
    prompts = _prompts(ids, attention_mask, options.get("pad_token_id"))
    if seeds is None and options.get("do_sample"):
        seeds = torch.randint(2**62, (len(ids),)).tolist()

    def decode_row(row: int, *stand_ins: PreTrainedModel) -> tuple:
        own = kwargs | {"attention_mask": torch.ones_like(prompts[row])}
        padding = ids.shape[1] - prompts[row].shape[1]
        stand_ins[-1].generation_config = row_config = copy.deepcopy(config)  # the stand-in's own
        for limit in ("max_length", "min_length"):  # these count the padding
            if own.get(limit):
                own[limit] -= padding
            elif getattr(row_config, limit):
                setattr(row_config, limit, getattr(row_config, limit) - padding)
        if (allowed := own.get("prefix_allowed_tokens_fn")) is not None:
            own["prefix_allowed_tokens_fn"] = lambda _, prefix: allowed(row, prefix)
        if assistant_model is not None:
            own["assistant_model"] = stand_ins[0]
        if streamer is not None:
            own["streamer"] = streamer[row]
        rule, processors = rules[row], copied(logits_processor or ())  # what they remember is of one row
        special = special_tokens.union(rule.special_tokens or ())
        own["measured"] = lengths[row]
        return decode_one(stand_ins[-1], rule, special, draft_length, prompts[row], processors, **own)

    # Rows measure the same forwards; what the first one learns is kept.
    lengths = [measured, *(copy.deepcopy(measured) for _ in prompts[1:])]
    models = [target] if assistant_model is None else [assistant_model, target]
    calls = [functools.partial(decode_row, row) for row in range(len(ids))]
    outputs, stats = zip(*run_in_lockstep(models, calls, seeds), strict=True)
    return _join(ids, prompts, outputs, options), [row or Stats() for row in stats]


def with_defaults(target: PreTrainedModel, generation_config: GenerationConfig | None) -> GenerationConfig:
    """The caller's config as `generate` completes it: what it leaves open is taken from the target's."""
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


def _check(target: PreTrainedModel, ids: torch.LongTensor, options: dict, kwargs: dict, for_each: dict) -> None:
    """Raise if an option works for one prompt only, or one of `for_each` has not one entry for each row."""
    if target.config.is_encoder_decoder:
        raise ValueError("A batch with a draft needs a decoder-only target. Decode one prompt at a time.")
    single = [
        *(n for n in ("output_attentions", "output_hidden_states", "assistant_early_exit") if options.get(n)),
        *(n for n in ("num_beams", "num_return_sequences") if (options.get(n) or 1) > 1),
        *(n for n in ("speculation_type", "past_key_values") if options.get(n) is not None),
        *(n for n in ("assistant_tokenizer",) if n in kwargs and options.get("do_sample")),
        *(name for name, value in kwargs.items() if isinstance(value, torch.Tensor)),
    ]
    if single:
        raise ValueError(
            f"`{'`, `'.join(single)}` cannot be used for a batch with a draft. Decode one prompt at a time."
        )
    for name, value in for_each.items():
        if value is not None and (not isinstance(value, Sequence) or len(value) != len(ids)):
            raise ValueError(f"`{name}` must be a list with one entry for each of the {len(ids)} rows, got {value!r}.")


def _join(
    ids: torch.LongTensor, prompts: list[torch.LongTensor], outputs: Sequence, options: dict
) -> torch.LongTensor | GenerateDecoderOnlyOutput:
    """A batch of answers, shorter ones filled up: tokens with padding, scores with zeros."""
    detailed = not isinstance(outputs[0], torch.Tensor)
    texts = [output.sequences if detailed else output for output in outputs]
    answers = [text[0, prompt.shape[1] :] for text, prompt in zip(texts, prompts, strict=True)]
    pad, end = options.get("pad_token_id"), options.get("eos_token_id")
    fill = pad if pad is not None else end if isinstance(end, int) else (end or [0])[0]
    sequences = torch.cat([ids, pad_sequence(answers, batch_first=True, padding_value=fill)], dim=-1)
    if not detailed:
        return sequences
    scores = {
        name: tuple(pad_sequence([torch.cat(output[name]) for output in outputs]).unbind())
        for name in ("scores", "logits")
        if outputs[0].get(name) is not None
    }
    return GenerateDecoderOnlyOutput(sequences=sequences, **scores)
