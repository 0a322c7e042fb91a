"""In: prompts and a target. Out: for each prompt an [`Answer`], either the target's own greedy text or a given one,
with what mining needs of the target's forwards over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import DynamicCache, PreTrainedModel

from ..data.prompts import Prompt
from ..forward.branches import Keys
from ..forward.lockstep import Tally, run_in_lockstep
from ..forward.tap import ForwardTap
from ..judge.features import entropy
from ..models.tokens import decoding_greedily, eos_tokens, until_eos


@dataclass
class Answer:
    """
    An answer, and what the target computed along it.

    Args:
        ids (`torch.LongTensor` of shape `(prompt_length + answer_length,)`): Prompt and answer.
        finished (`bool`): Whether it ends with an EOS token.
        own (`bool`): Whether it is the target's greedy answer.
        cache (`Keys`): The target's keys and values of all tokens but the last.
        logprobs, best (`torch.FloatTensor` of shape `(answer_length,)`): Log-probabilities under the target, nats: of
            the answer's tokens, and of the target's choices.
        entropies (`torch.FloatTensor` of shape `(answer_length,)`): Of the target's distribution at each position,
            nats.
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
    entropies: torch.Tensor
    choices: torch.LongTensor

    @property
    def tokens(self) -> torch.LongTensor:
        """The answer without the prompt, of shape `(answer_length,)`; ends with an EOS token if `finished`."""
        return self.ids[self.prompt_length :]

    @property
    def text(self) -> list[int]:
        """The same as a list."""
        return self.tokens.tolist()

    def row(self, number: int) -> dict:
        """A row of [`ANSWER_FEATURES`]."""
        return {
            "answer": number,
            "drafted": None,
            "prompt_id": self.prompt.id,
            "category": self.prompt.category,
            "check": self.prompt.check,
            "prompt_ids": self.ids[: self.prompt_length].tolist(),
            "answer_ids": self.text,
            "own": self.own,
            "finished": self.finished,
            "choice_logprobs": self.best.half().tolist(),
            "entropies": self.entropies.half().tolist(),
        }


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
    The target's own greedy answers.

    Args:
        ids (`Sequence[torch.LongTensor]`): Tokens of each prompt, of shape `(1, prompt_length)`.
        runners_up (`int`): How many next choices of the target to keep at each position.
        at_once (`int`, *optional*): How many answers to decode at a time. By default all.
    """

    def write(model: PreTrainedModel, prompt: Prompt, prompt_ids: torch.LongTensor) -> Answer:
        steps: list[tuple[torch.Tensor, ...]] = []
        cache = DynamicCache()  # keeps all keys, even if attention sees only a window
        with ForwardTap(model, lambda hidden, logits: steps.append(_likeliest(logits[0, -1:], runners_up))):
            output = decoding_greedily(model, max_new_tokens).generate(
                prompt_ids, attention_mask=torch.ones_like(prompt_ids), past_key_values=cache
            )
        length = prompt_ids.shape[1]
        tokens, finished = until_eos(output[0, length:], eos_tokens(target))
        best, entropies, choices = (torch.cat(rows)[: len(tokens)] for rows in zip(*steps, strict=True))
        whole = torch.cat([prompt_ids[0], tokens])
        return Answer(prompt, whole, length, finished, True, _keys(cache), best, best, entropies, choices)

    calls = [partial(write, prompt=prompt, prompt_ids=row) for prompt, row in zip(prompts, ids, strict=True)]
    return run_in_lockstep([target], calls, at_once=at_once, tally=tally)


@torch.no_grad()
def read_answers(
    target: PreTrainedModel,
    prompts: Sequence[Prompt],
    ids: Sequence[torch.LongTensor],
    texts: Sequence[torch.LongTensor],
    runners_up: int = 0,
    tally: Tally | None = None,
) -> list[Answer]:
    """Given answers, with tokens `texts` of shape `(answer_length,)`, which need not be the target's own: one forward
    over each. The other arguments are those of [`target_answers`]."""

    def read(model: PreTrainedModel, prompt: Prompt, prompt_ids: torch.LongTensor, text: torch.LongTensor) -> Answer:
        tokens, finished = until_eos(text, eos_tokens(target))
        whole, cache = torch.cat([prompt_ids[0], tokens]), DynamicCache()
        read = {"input_ids": whole[None, :-1], "attention_mask": torch.ones_like(whole[None, :-1])}
        output = model(**read, past_key_values=cache, use_cache=True, logits_to_keep=len(tokens))
        logits = output.logits[0, -len(tokens) :]
        likeliest = _likeliest(logits, runners_up)
        logprobs = logits.float().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
        return Answer(prompt, whole, prompt_ids.shape[1], finished, False, _keys(cache), logprobs, *likeliest)

    rows = zip(prompts, ids, texts, strict=True)
    calls = [partial(read, prompt=prompt, prompt_ids=row, text=text) for prompt, row, text in rows]
    return run_in_lockstep([target], calls, at_once=1, tally=tally)


def _keys(cache: DynamicCache) -> Keys:
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def _likeliest(logits: torch.Tensor, runners_up: int) -> tuple[torch.Tensor, torch.Tensor, torch.LongTensor]:
    """For each row of logits: the log-probability of the likeliest token, the entropy, and the `1 + runners_up`
    likeliest tokens."""
    logprobs = logits.float().log_softmax(-1)
    choices = logprobs.topk(1 + runners_up).indices if runners_up else logprobs.argmax(-1, keepdim=True)
    return logprobs.amax(-1), entropy(logprobs), choices
