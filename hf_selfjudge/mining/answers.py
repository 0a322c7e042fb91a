"""Prompt -> answer, with everything of the target's forwards over it that mining needs.

In: prompts and a target. Out: for each prompt an [`Answer`]: the target's own greedy text, or a given one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from ..data.prompts import Prompt
from ..forward.branches import Keys
from ..forward.lockstep import Tally, run_in_lockstep
from ..forward.tap import ForwardTap
from ..models.tokens import decoding_greedily, eos_tokens, until_eos


@dataclass
class Answer:
    """
    An answer, and what the target computed along it.

    Args:
        prompt ([`Prompt`]): What is answered.
        ids (`torch.LongTensor` of shape `(prompt_length + answer_length,)`): Prompt and answer.
        prompt_length (`int`): Tokens of the prompt.
        finished (`bool`): Whether it ends with an EOS token.
        own (`bool`): Whether it is the target's greedy answer.
        cache (`Keys`): The target's keys and values of all tokens but the last.
        logprobs (`torch.FloatTensor` of shape `(answer_length,)`): Log-probability of each of the answer's tokens
            under the target, nats.
        best (`torch.FloatTensor` of shape `(answer_length,)`): Log-probability of the target's choice at each
            position, nats.
        choices (`torch.LongTensor` of shape `(answer_length, 1 + runners_up)`): The target's likeliest tokens at each
            position, the likeliest first.
    """

    prompt: Prompt
    ids: torch.LongTensor
    prompt_length: int
    finished: bool
    own: bool
    cache: Keys
    logprobs: torch.Tensor
    best: torch.Tensor
    choices: torch.LongTensor

    @property
    def tokens(self) -> torch.LongTensor:
        """The answer without the prompt, of shape `(answer_length,)`; ends with an EOS token if `finished`."""
        return self.ids[self.prompt_length :]


@torch.no_grad()
def target_answers(
    target: PreTrainedModel,
    prompts: Sequence[Prompt],
    ids: Sequence[torch.LongTensor],
    max_new_tokens: int,
    runners_up: int = 0,
    at_once: int | None = None,
    tally: Tally | None = None,
) -> list[Answer]:
    """
    The target's own greedy answers, several decoded at a time.

    Args:
        ids (`Sequence[torch.LongTensor]`): Tokens of each prompt, of shape `(1, prompt_length)`.
        max_new_tokens (`int`): Limit of an answer, tokens.
        runners_up (`int`): How many next choices of the target to keep at each position.
        at_once (`int`, *optional*): How many answers to decode at a time. By default all.
        tally ([`Tally`], *optional*): Counts the forwards.
    """

    def write(model: PreTrainedModel, prompt: Prompt, prompt_ids: torch.LongTensor) -> Answer:
        steps: list[tuple[torch.Tensor, torch.Tensor]] = []
        cache = DynamicCache()  # keeps every key, also where attention sees a window only
        with ForwardTap(model, lambda hidden, logits: steps.append(_likeliest(logits[0, -1:], runners_up))):
            output = decoding_greedily(model, max_new_tokens).generate(
                prompt_ids, attention_mask=torch.ones_like(prompt_ids), past_key_values=cache
            )
        length = prompt_ids.shape[1]
        tokens, finished = until_eos(output[0, length:], eos_tokens(target))
        best, choices = (torch.cat(rows)[: len(tokens)] for rows in zip(*steps, strict=True))
        whole = torch.cat([prompt_ids[0], tokens])
        return Answer(prompt, whole, length, finished, True, _keys(cache), best, best, choices)

    return run_in_lockstep([target], _calls(write, prompts, ids), at_once=at_once, tally=tally)


@torch.no_grad()
def read_answers(
    target: PreTrainedModel,
    prompts: Sequence[Prompt],
    ids: Sequence[torch.LongTensor],
    texts: Sequence[torch.LongTensor],
    runners_up: int = 0,
    tally: Tally | None = None,
) -> list[Answer]:
    """
    Given answers, which need not be the target's own: one forward over each.

    Args:
        ids (`Sequence[torch.LongTensor]`): Tokens of each prompt, of shape `(1, prompt_length)`.
        texts (`Sequence[torch.LongTensor]`): Tokens of each answer, of shape `(answer_length,)`.
        runners_up, tally: As for [`target_answers`].
    """

    def read(model: PreTrainedModel, prompt: Prompt, prompt_ids: torch.LongTensor, text: torch.LongTensor) -> Answer:
        tokens, finished = until_eos(text, eos_tokens(target))
        whole, forwards, cache = torch.cat([prompt_ids[0], tokens]), [], DynamicCache()
        with ForwardTap(model, lambda hidden, logits: forwards.append(logits[0, -len(tokens) :])):
            model(
                input_ids=whole[None, :-1],
                attention_mask=torch.ones_like(whole[None, :-1]),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=len(tokens),
            )
        (logits,) = forwards
        best, choices = _likeliest(logits, runners_up)
        logprobs = logits.float().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
        return Answer(prompt, whole, prompt_ids.shape[1], finished, False, _keys(cache), logprobs, best, choices)

    return run_in_lockstep([target], _calls(read, prompts, ids, texts), at_once=1, tally=tally)


def _calls(function: Callable, *columns: Sequence) -> list[Callable]:
    return [lambda model, row=row: function(model, *row) for row in zip(*columns, strict=True)]


def _keys(cache: DynamicCache) -> Keys:
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def _likeliest(logits: torch.Tensor, runners_up: int) -> tuple[torch.Tensor, torch.LongTensor]:
    """For each row of logits: the log-probability of the likeliest token, and the `1 + runners_up` likeliest."""
    logits = logits.float()
    choices = logits.topk(1 + runners_up).indices if runners_up else logits.argmax(-1, keepdim=True)
    return logits.amax(-1) - logits.logsumexp(-1), choices
