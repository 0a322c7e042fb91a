"""Answer -> labels: what each substitution does to the target's own answer.

In: an [`Answer`]. Out: one row for each substitution, with its label and what a judge will see of it. No human label
and no reference answer is used (code is compared by the prompt's tests): the target finishes its answer after the
substitute, and the result is compared with its own first answer (SelfJudge, https://huggingface.co/papers/2510.02329).
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..forward.branches import packs
from ..judge.features import SCALARS, candidate_scalars
from ..judge.layers import LayerStates
from ..models.pair import Pair
from ..scoring.checks import CheckedAnswer, check_of
from ..scoring.meaning import reconvergence, says_no
from .answers import Answer
from .config import MiningConfig
from .rewrites import Continuation, continue_substitutions
from .substitutions import Substitution, find_looked_up, find_substitutions, sample_mismatches_first


def answers_at_once(config: MiningConfig, packed: bool) -> int:
    """Answers that are labelled at a time. If branches do not pack, each answer has one substitution under way."""
    return config.answers_at_once if packed else config.answer_batch


def label_answer(model: PreTrainedModel, pair: Pair, answer: Answer, config: MiningConfig) -> list[dict]:
    """
    Label the substitutions of one answer. If the answer is not the target's own, each substitution is compared with
    what the target makes of the answer with its own choice in that place.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target of the pair, or a stand-in that shares its forwards
            ([`run_in_lockstep`]).

    Returns:
        `list[dict]` in the order of positions: [`feature_row`] of each, with [`label_row`] if it was rewritten, and
        the number of `mismatches` in the answer.
    """
    if pair.draft is None:
        found = find_looked_up(answer, pair.special_tokens, config.lookup)
    else:
        options = (config.top, config.floor, config.runners_up)
        found = find_substitutions(pair.draft, answer, pair.special_tokens, *options)
    mismatches = sum(substitution.kind == "mismatch" for substitution in found)
    found = sample_mismatches_first(found, config.per_answer, config.seed, answer.prompt.id)
    for substitution in found:
        if substitution.draft_logits is not None:
            substitution.draft_logits = substitution.draft_logits.clone()  # the rest of the draft's logits is freed
    chosen = sample_mismatches_first(found, config.rewrites, config.seed, answer.prompt.id, "rewrite")
    chosen_ids = {id(substitution) for substitution in chosen}
    packed = packs(pair.target)
    layer_states = None if config.layer is None else LayerStates(pair.target, config.layer)

    def continuations(substitutions: list[Substitution], to_rewrite: list[bool]) -> list[Continuation]:
        room = max(1, config.forward_tokens // answers_at_once(config, packed))
        options = (config.window, room, packed, layer_states)
        return list(continue_substitutions(model, answer, substitutions, to_rewrite, *options))

    references: dict[int, Continuation] = {}
    if not answer.own:
        # Only where something is compared with them: a rewrite, or scores along a text that has another token there.
        text, rewritten = answer.tokens.tolist(), {substitution.position for substitution in chosen}
        choices = {
            s.position: s.by_the_choice() for s in found if s.position in rewritten or text[s.position] != s.choice
        }
        of_choices = continuations([*choices.values()], [position in rewritten for position in choices])
        references = {continuation.substitution.position: continuation for continuation in of_choices}
    rows = {}
    for continuation in continuations(found, [id(substitution) in chosen_ids for substitution in found]):
        reference = references.get(continuation.substitution.position)
        row = feature_row(continuation, reference) | {"mismatches": mismatches}
        if continuation.rewrite is not None:
            row |= label_row(model, pair.tokenizer, continuation, reference, config)
        rows[id(continuation.substitution)] = row
    return [rows[id(substitution)] for substitution in found]


def label_row(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    continuation: Continuation,
    reference: Continuation | None,
    config: MiningConfig,
) -> dict:
    """
    Compare a rewritten answer with the original one.

    Args:
        continuation ([`Continuation`]): With a rewrite.
        reference ([`Continuation`], *optional*): The target's own choice in that place, with a rewrite, which is then
            the original; `None` if the answer itself is.

    Returns:
        `dict` with the suffixes of both, and

    - `reconvergence`: share of the original suffix's 4-grams that the rewritten one has, in [0, 1];
    - `flipped`: whether the final number, or passing the tests, changed. `None` where the prompt is not checked so,
      one of the answers did not end (with tests: not even its code), has no number that can be read, or both fail the
      tests;
    - `says_no`: the target's own probability that the two do not say the same, in [0, 1]; `None` if it was not asked;
    - `changed`: the label in [0, 1]: `flipped` where it is known, else 1 − `reconvergence`.
    """
    answer, position = continuation.answer, continuation.substitution.position
    prompt, rewritten = answer.prompt, continuation.rewritten
    original = answer.tokens.tolist() if reference is None else reference.rewritten
    finished = (answer if reference is None else reference).finished
    share = reconvergence(original[position + 1 :], continuation.rewrite)
    before, after = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (original, rewritten))
    answers = CheckedAnswer(before, finished), CheckedAnswer(after, continuation.finished)
    same = check_of(prompt, config.allow_code).same(prompt, *answers)
    flipped = None if same is None else not same
    no = None
    if config.ask:
        no = 0.0 if before == after else says_no(model, tokenizer, prompt.text, before, after)
    return {
        "original_suffix": None if reference is None else reference.rewrite,
        "rewritten_suffix": continuation.rewrite,
        "rewrite_finished": continuation.finished,
        "reconvergence": share,
        "flipped": flipped,
        "says_no": no,
        "changed": float(flipped) if flipped is not None else 1.0 - share,
    }


def feature_row(continuation: Continuation, reference: Continuation | None = None) -> dict:
    """
    What a judge will see of a substitution, and the scores that need no rewrite.

    Args:
        reference ([`Continuation`], *optional*): The target's own choice in that place, if the answer is not its own.

    Returns:
        `dict`; among its keys the [`CHEAP_SCORES`](labels.py), each higher where the substitute is worse:

    - `margin`: log P(choice) − log P(substitute), nats;
    - `likelihood`: mean drop in log-probability of the next tokens of the answer, nats (suffix term of SelfJudge,
      https://huggingface.co/papers/2510.02329);
    - `confidence`: mean drop of the *largest* log-probabilities there, nats (SelfJudge's published code);
    - `kl_target_draft`, `kl_draft_target`: Kullback-Leibler divergences between target and draft where the token is
      chosen, nats; `None`, like `draft_logprob`, for prompt lookup.
    """
    answer, substitution = continuation.answer, continuation.substitution
    token, position = torch.tensor([substitution.token]), torch.tensor([substitution.position])
    logits = continuation.logits.cpu()
    scalars = candidate_scalars(logits[:1], token, logits[1:], position)
    behind = slice(substitution.position + 1, substitution.position + 1 + len(continuation.logprobs))
    logprobs, best = answer.logprobs[behind], answer.best[behind]
    if reference is not None:
        logprobs, best = reference.logprobs, reference.best
    return {
        "kind": substitution.kind,
        "position": substitution.position,
        "token": substitution.choice,
        "substitute": substitution.token,
        "draft_rank": substitution.draft_rank,
        "scalars": scalars[0].tolist(),
        "margin": float(scalars[0, SCALARS.index("margin")]),
        "likelihood": _mean(logprobs - continuation.logprobs),
        "confidence": _mean(best - continuation.best),
        **_draft_scores(logits[0].log_softmax(-1), substitution),
        "hidden_before": continuation.hidden[0].half().cpu().numpy(),
        "hidden_after": continuation.hidden[1].half().cpu().numpy(),
    }


def _draft_scores(logprobs: torch.Tensor, substitution: Substitution) -> dict[str, float | None]:
    """Compare the draft's distribution with the target's `logprobs` of shape `(vocab_size,)`."""
    if substitution.draft_logits is None:
        return dict.fromkeys(("draft_logprob", "kl_target_draft", "kl_draft_target"))
    draft_logprobs = substitution.draft_logits.cpu().float().log_softmax(-1)
    return {
        "draft_logprob": float(draft_logprobs[substitution.token]),
        "kl_target_draft": float((logprobs.exp() * (logprobs - draft_logprobs)).sum()),
        "kl_draft_target": float((draft_logprobs.exp() * (draft_logprobs - logprobs)).sum()),
    }


def _mean(drops: torch.Tensor) -> float | None:
    return float(drops.mean()) if len(drops) else None
