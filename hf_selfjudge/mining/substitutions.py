"""Prompt -> answer -> where the draft disagrees.

In: prompts, a target and a draft. Out: for each prompt an [`Answer`] (the target's greedy text, or another, with the
target's cache of it) and the [`Substitution`]s to look at. Knows nothing of what they do.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from ..data.prompts import Prompt
from ..forward.branches import Keys
from ..forward.lockstep import Tally, run_in_lockstep
from ..forward.tap import ForwardTap
from ..models.tokens import context_of, decoding_greedily, eos_tokens, until_eos


@dataclass
class Answer:
    """
    An answer, as the target sees it.

    Args:
        prompt ([`Prompt`]): What was asked.
        ids (`torch.LongTensor` of shape `(prompt_length + answer_length,)`): Prompt and answer.
        prompt_length (`int`): Tokens of the prompt.
        finished (`bool`): Whether it ends with an EOS.
        own (`bool`): Whether it is the target's greedy answer.
        cache (`Keys`): The target's, of all tokens but the last.
        logprobs (`torch.FloatTensor` of shape `(answer_length,)`): Of the answer's tokens under the target, nats.
        best (`torch.FloatTensor` of shape `(answer_length,)`): Of the target's choices, nats.
        choices (`torch.LongTensor` of shape `(answer_length, 1 + runners_up)`): What the target would say at each
            place, likeliest first.
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
        """The answer alone, of shape `(answer_length,)`; ends with EOS if `finished`."""
        return self.ids[self.prompt_length :]


@dataclass
class Substitution:
    """
    Another token in the place of the target's choice.

    Args:
        position (`int`): In the answer.
        choice (`int`): The target's token there.
        token (`int`): The other one.
        kind (`str`): `"mismatch"`: the draft's first choice, what decoding meets; `"alternative"`: a later choice of
            the draft; `"runner-up"`: the target's own next choice, where the draft has none of these.
        draft_rank (`int`): Tokens that the draft prefers to it.
        draft_logits (`torch.Tensor` of shape `(vocab_size,)`, *optional*): The draft's, at this place, if it is a
            model.
    """

    position: int
    choice: int
    token: int
    kind: str
    draft_rank: int
    draft_logits: torch.Tensor | None = field(default=None, repr=False)

    def own(self) -> Substitution:
        """The target's choice in its own place: what the others are compared with."""
        return replace(self, token=self.choice)


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
    The target's own greedy answers, decoded side by side.

    Args:
        ids (`Sequence[torch.LongTensor]`): The prompts' tokens, `(1, prompt_length)` each.
        runners_up (`int`): How many next choices of the target to note at each place.
        at_once (`int`, *optional*): Answers under way at a time.
    """

    def write(model: PreTrainedModel, prompt: Prompt, row: torch.LongTensor) -> Answer:
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        cache = DynamicCache()  # keeps every key, also where attention sees a window only
        with ForwardTap(model, lambda hidden, logits: seen.append(_likeliest(logits[0, -1:], runners_up))):
            output = decoding_greedily(model, max_new_tokens).generate(
                row, attention_mask=torch.ones_like(row), past_key_values=cache
            )
        tokens, finished = until_eos(output[0, row.shape[1] :], eos_tokens(target))
        best, choices = (torch.cat(rows)[: len(tokens)] for rows in zip(*seen, strict=True))
        return Answer(
            prompt, torch.cat([row[0], tokens]), row.shape[1], finished, True, _keys(cache), best, best, choices
        )

    return run_in_lockstep([target], _calls(write, prompts, ids), at_once=at_once, tally=tally)


@torch.no_grad()
def read_answers(
    target: PreTrainedModel,
    prompts: Sequence[Prompt],
    ids: Sequence[torch.LongTensor],
    answers: Sequence[torch.LongTensor],
    runners_up: int = 0,
    tally: Tally | None = None,
) -> list[Answer]:
    """
    Answers that the target did not write itself, or not greedily: one forward over each.

    Args:
        answers (`Sequence[torch.LongTensor]`): `(answer_length,)` each.
    """

    def read(model: PreTrainedModel, prompt: Prompt, row: torch.LongTensor, answer: torch.LongTensor) -> Answer:
        tokens, finished = until_eos(answer, eos_tokens(target))
        whole, rows, cache = torch.cat([row[0], tokens]), [], DynamicCache()
        with ForwardTap(model, lambda hidden, logits: rows.append(logits[0, -len(tokens) :])):
            model(
                input_ids=whole[None, :-1],
                attention_mask=torch.ones_like(whole[None, :-1]),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=len(tokens),
            )
        best, choices = _likeliest(rows[0], runners_up)
        logprobs = rows[0].float().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
        return Answer(prompt, whole, row.shape[1], finished, False, _keys(cache), logprobs, best, choices)

    return run_in_lockstep([target], _calls(read, prompts, ids, answers), at_once=1, tally=tally)


def _calls(function, *columns) -> list:
    return [lambda model, row=row: function(model, *row) for row in zip(*columns, strict=True)]


def _keys(cache: DynamicCache) -> Keys:
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def _likeliest(logits: torch.Tensor, runners_up: int) -> tuple[torch.Tensor, torch.LongTensor]:
    """Of rows of logits: the log-probability of the likeliest token, and the likeliest tokens."""
    logits = logits.float()
    choices = logits.topk(1 + runners_up).indices if runners_up else logits.argmax(-1, keepdim=True)
    return logits.amax(-1) - logits.logsumexp(-1), choices


@torch.no_grad()
def find_substitutions(
    draft: PreTrainedModel, answer: Answer, never: list[int], top: int, floor: float, runners_up: int
) -> list[Substitution]:
    """
    Run the draft once over the answer (teacher-forced): what it would say instead of the target's choices. Nothing
    is found beyond the draft's context, where decoding goes on without it.

    Args:
        never (`list[int]`): Special tokens. They are never accepted against the target, nor overruled, so a mismatch
            with one on either side teaches nothing.
        top (`int`): Choices of the draft to look at, at each place.
        floor (`float`): Probability below which a choice of the draft other than its first one is left out.
        runners_up (`int`): The target's own next choices to add.

    Returns:
        `list[Substitution]` in the order of positions, at each of them in the draft's order.
    """
    read = answer.ids[:-1][: context_of(draft)]  # the last token is followed by none
    keep = len(read) - answer.prompt_length + 1  # the row before each token
    if keep < 1:
        return []
    choices = answer.choices[:keep, 0]
    logits = draft(read[None].to(draft.device), logits_to_keep=keep).logits[0, -keep:].to(choices.device)
    likely, proposed = logits.float().log_softmax(-1).topk(top)
    special = {*never}
    found = []
    for position, choice in enumerate(choices.tolist()):
        if choice in special:
            continue
        seen = {choice, *special}
        for rank, (token, logprob) in enumerate(
            zip(proposed[position].tolist(), likely[position].exp().tolist(), strict=True)
        ):
            if token not in seen and (rank == 0 or logprob >= floor):
                kind = "alternative" if rank else "mismatch"
                found.append(Substitution(position, choice, token, kind, rank, logits[position]))
                seen.add(token)
        for token in answer.choices[position, 1 : 1 + runners_up].tolist():
            if token not in seen:
                rank = int((logits[position] > logits[position, token]).sum())
                found.append(Substitution(position, choice, token, "runner-up", rank, logits[position]))
    return found


def find_looked_up(answer: Answer, never: list[int], length: int) -> list[Substitution]:
    """
    The same for prompt lookup: where its proposals leave the answer, wherever a round may begin. `"mismatch"` is what
    lossless decoding meets, `"alternative"` what rounds that begin elsewhere would.

    Args:
        length (`int`): Tokens that it proposes in a round.
    """
    lookup = PromptLookupCandidateGenerator(num_output_tokens=length, max_length=len(answer.ids) + length)
    text, choices, special = answer.tokens.tolist(), answer.choices[:, 0].tolist(), {*never}
    found: dict[tuple[int, int], Substitution] = {}
    next_round = 0
    for start in range(len(text)):
        known = answer.ids[None, : answer.prompt_length + start]
        proposed = lookup.get_candidates(known)[0][0, known.shape[1] :].tolist()
        rest = text[start:]
        same = next((i for i, pair in enumerate(zip(proposed, rest, strict=False)) if pair[0] != pair[1]), None)
        met = start == next_round
        if met:
            next_round = start + 1 + (min(len(proposed), len(rest)) if same is None else same)
        # Where it follows the answer, it differs from the target's choice if a judge accepted that.
        followed = zip(range(start, len(text)), proposed if same is None else proposed[: same + 1], strict=False)
        for position, token in followed:
            choice = choices[position]
            if token != choice and not special & {token, choice} and (met or (position, token) not in found):
                kind = "mismatch" if met else "alternative"
                found[position, token] = Substitution(position, choice, token, kind, 0)
    return sorted(found.values(), key=lambda substitution: substitution.position)


def sample(items: Sequence, limit: int, *seed: int | str) -> list:
    """At most `limit` of the items, evenly without replacement, in their order; the same for the same seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))
    return [items[i] for i in torch.randperm(len(items), generator=generator)[:limit].sort().values.tolist()]


def batched(items: Sequence, size: int) -> Iterator[Sequence]:
    """Consecutive chunks of at most `size` items."""
    return (items[i : i + size] for i in range(0, len(items), size))
