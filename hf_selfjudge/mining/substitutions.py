"""In: an [`Answer`], and a draft model or prompt lookup. Out: [`Substitution`]s, where the draft disagrees with the
target."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from ..models.tokens import common_prefix, context_of
from .answers import Answer


@dataclass(eq=False)
class Substitution:
    """
    A token in the place of the target's choice.

    Args:
        position (`int`): Tokens of the answer before it.
        choice (`int`): The target's choice there.
        token (`int`): The substitute.
        kind (`str`): `"mismatch"`: the draft's first choice, which decoding meets; `"alternative"`: a later choice of
            the draft; `"runner-up"`: the target's own next choice, if it is neither of these.
        draft_rank (`int`): Number of tokens that the draft prefers to the substitute.
        draft_logits (`torch.Tensor` of shape `(vocab_size,)`, *optional*): Of a draft model at this position.
        to_rewrite (`bool`): Whether the target is to finish the answer after the substitute.
        drafted (`list[int]`): Where the text leaves the answer before the substitute: its tokens from there to the
            substitute, drafted in the same round.
    """

    position: int
    choice: int
    token: int
    kind: str
    draft_rank: int
    draft_logits: torch.Tensor | None = field(default=None, repr=False)
    to_rewrite: bool = False
    drafted: list[int] = field(default_factory=list)

    def before(self, answer: Answer) -> list[int]:
        """The tokens of the answer's text before the substitute."""
        return [*answer.tokens[: self.position - len(self.drafted)].tolist(), *self.drafted]


@torch.no_grad()
def find_substitutions(
    draft: PreTrainedModel, answer: Answer, special_tokens: list[int], top: int, floor: float, runners_up: int
) -> list[Substitution]:
    """
    Run the draft once over the answer (teacher-forced) and compare its choices with the target's. Positions beyond the
    draft's context are left out: there, decoding continues without the draft.

    Args:
        special_tokens (`list[int]`): No rule may accept or overrule them, so mismatches with them are left out.
        top, floor, runners_up: See [`MiningConfig`].
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
    The same for prompt lookup, which proposes `length` tokens in a round: where its proposals differ from the answer,
    wherever a round may begin. A `"mismatch"` is one that lossless decoding meets, an `"alternative"` one that only
    other rounds would meet.
    """
    lookup = PromptLookupCandidateGenerator(num_output_tokens=length, max_length=len(answer.ids) + length)
    text, choices, special = answer.tokens.tolist(), answer.choices[:, 0].tolist(), {*special_tokens}
    found: dict[tuple[int, int], Substitution] = {}
    next_round = 0
    for start in range(len(text)):
        known = answer.ids[None, : answer.prompt_length + start]
        proposed = lookup.get_candidates(known)[0][0, known.shape[1] :].tolist()
        same, met = common_prefix(proposed, text[start:]), start == next_round
        if met:
            next_round = min(start + same, len(text)) + 1
        # Where a judge accepted a token, a proposal may match the answer but differ from the target's choice.
        for position, token in zip(range(start, len(text)), proposed[: same + 1], strict=False):
            choice = choices[position]
            if token != choice and not special & {token, choice} and (met or (position, token) not in found):
                kind = "mismatch" if met else "alternative"
                found[position, token] = Substitution(position, choice, token, kind, 0)
    return sorted(found.values(), key=lambda substitution: substitution.position)


def sample_mismatches_first(found: list[Substitution], limit: int, *seed: int | str) -> list[Substitution]:
    """At most `limit` substitutions, in their order: mismatches first, then others if there is room."""
    kept = sample([substitution for substitution in found if substitution.kind == "mismatch"], limit, *seed)
    others = [substitution for substitution in found if substitution.kind != "mismatch"]
    kept = {*kept, *sample(others, limit - len(kept), *seed)}
    return [substitution for substitution in found if substitution in kept]


def sample(items: Sequence, limit: int, *seed: int | str) -> list:
    """At most `limit` of the items, drawn evenly without replacement, in their order; the same for the same seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))
    return [items[i] for i in torch.randperm(len(items), generator=generator)[:limit].sort().values.tolist()]
