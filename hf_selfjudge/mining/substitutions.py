"""Answer -> where the draft disagrees with the target, and with which token.

In: an [`Answer`], and a draft model or prompt lookup. Out: the [`Substitution`]s to look at.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from ..models.tokens import context_of
from .answers import Answer


@dataclass
class Substitution:
    """
    A token in the place of the target's choice.

    Args:
        position (`int`): Tokens of the answer before it.
        choice (`int`): The target's choice there.
        token (`int`): The substitute.
        kind (`str`): `"mismatch"`: the draft's first choice, which decoding meets; `"alternative"`: a later choice of
            the draft; `"runner-up"`: the target's own next choice, where it is none of these.
        draft_rank (`int`): Number of tokens that the draft prefers to the substitute.
        draft_logits (`torch.Tensor` of shape `(vocab_size,)`, *optional*): The draft's logits at this position, if it
            is a model.
    """

    position: int
    choice: int
    token: int
    kind: str
    draft_rank: int
    draft_logits: torch.Tensor | None = field(default=None, repr=False)

    def by_the_choice(self) -> Substitution:
        """The same with the target's choice as the substitute: what other substitutes are compared with."""
        return replace(self, token=self.choice)


@torch.no_grad()
def find_substitutions(
    draft: PreTrainedModel, answer: Answer, special_tokens: list[int], top: int, floor: float, runners_up: int
) -> list[Substitution]:
    """
    Run the draft once over the answer (teacher-forced) and compare its choices with the target's. Positions beyond
    the draft's context are left out: decoding goes on without the draft there.

    Args:
        special_tokens (`list[int]`): They are never accepted against the target, nor overruled, so that a mismatch
            with one on either side teaches nothing.
        top (`int`): Choices of the draft to look at, at each position.
        floor (`float`): Least probability of a choice of the draft, its first one excepted.
        runners_up (`int`): How many of the target's own next choices to add.

    Returns:
        `list[Substitution]` in the order of positions, at each of them in the draft's order.
    """
    read = answer.ids[:-1][: context_of(draft)]  # nothing follows the last token
    keep = len(read) - answer.prompt_length + 1  # the row before each token
    if keep < 1:
        return []
    choices = answer.choices[:keep, 0]
    logits = draft(read[None].to(draft.device), logits_to_keep=keep).logits[0, -keep:].to(choices.device)
    likely, proposed = logits.float().log_softmax(-1).topk(top)
    special, found = {*special_tokens}, []
    for position, choice in enumerate(choices.tolist()):
        if choice in special:
            continue
        seen = {choice, *special}
        ranked = zip(proposed[position].tolist(), likely[position].exp().tolist(), strict=True)
        for rank, (token, probability) in enumerate(ranked):
            if token not in seen and (rank == 0 or probability >= floor):
                kind = "alternative" if rank else "mismatch"
                found.append(Substitution(position, choice, token, kind, rank, logits[position]))
                seen.add(token)
        for token in answer.choices[position, 1 : 1 + runners_up].tolist():
            if token not in seen:
                rank = int((logits[position] > logits[position, token]).sum())
                found.append(Substitution(position, choice, token, "runner-up", rank, logits[position]))
    return found


def find_looked_up(answer: Answer, special_tokens: list[int], length: int) -> list[Substitution]:
    """
    The same for prompt lookup: where its proposals leave the answer, wherever a round may begin. `"mismatch"` is what
    lossless decoding meets, `"alternative"` what rounds that begin elsewhere would meet.

    Args:
        special_tokens (`list[int]`): As for [`find_substitutions`].
        length (`int`): Tokens that prompt lookup proposes in a round.
    """
    lookup = PromptLookupCandidateGenerator(num_output_tokens=length, max_length=len(answer.ids) + length)
    text, choices, special = answer.tokens.tolist(), answer.choices[:, 0].tolist(), {*special_tokens}
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
        # A proposal may follow the answer and differ from the target's choice: where a judge accepted that token.
        followed = zip(range(start, len(text)), proposed if same is None else proposed[: same + 1], strict=False)
        for position, token in followed:
            choice = choices[position]
            if token != choice and not special & {token, choice} and (met or (position, token) not in found):
                kind = "mismatch" if met else "alternative"
                found[position, token] = Substitution(position, choice, token, kind, 0)
    return sorted(found.values(), key=lambda substitution: substitution.position)


def sample_mismatches_first(found: list[Substitution], limit: int, *seed: int | str) -> list[Substitution]:
    """At most `limit` substitutions, in their order: mismatches first, then others if there is room."""
    mismatches = [substitution for substitution in found if substitution.kind == "mismatch"]
    others = [substitution for substitution in found if substitution.kind != "mismatch"]
    kept = sample(mismatches, limit, *seed)
    kept += sample(others, limit - len(kept), *seed)
    kept_ids = {id(substitution) for substitution in kept}
    return [substitution for substitution in found if id(substitution) in kept_ids]


def sample(items: Sequence, limit: int, *seed: int | str) -> list:
    """At most `limit` of the items, drawn evenly without replacement, in their order; the same for the same seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))
    return [items[i] for i in torch.randperm(len(items), generator=generator)[:limit].sort().values.tolist()]
