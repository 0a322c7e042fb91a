"""In: an [`Answer`]. Out: one row for each substitution, with its label and what a judge will see of it. The target
finishes its answer after the substitute, and the result is compared with its first answer (SelfJudge,
https://huggingface.co/papers/2510.02329). No human label or reference answer is used, except tests of code."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from ..forward.branches import packs
from ..judge.features import AFTER, AHEAD, BEFORE, SCALARS, candidate_scalars
from ..judge.layers import LayerStates
from ..models.pair import Pair
from ..scoring.asking import Asked
from ..scoring.checks import CheckedAnswer, check_of
from ..scoring.meaning import reconvergence
from .answers import Answer
from .config import MiningConfig
from .rewrites import Continuation, continue_substitutions
from .rounds import Round, find_rounds
from .substitutions import Substitution, find_looked_up, find_substitutions, sample, sample_mismatches_first


def answers_at_once(config: MiningConfig, packed: bool) -> int:
    """Answers that are labelled at a time: more if branches do not pack, because each then has one at a time."""
    return config.answers_at_once if packed else config.answer_batch


def label_answer(model: PreTrainedModel, pair: Pair, answer: Answer, config: MiningConfig) -> list[dict]:
    """
    Label the substitutions of one answer. If the answer is not the target's own, each substitution is compared with
    how the answer continues after the target's own choice at that position.

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
    seed = config.seed, answer.prompt.id
    found = sample_mismatches_first(found, config.per_answer, *seed)
    for substitution in found:
        if substitution.draft_logits is not None:
            substitution.draft_logits = substitution.draft_logits.clone()  # frees the rest of the draft's logits
    for substitution in sample_mismatches_first(found, config.rewrites, *seed, "rewrite"):
        substitution.to_rewrite = True
    packed = packs(pair.target)
    room = max(1, config.forward_tokens // answers_at_once(config, packed))
    layer_states = None if config.layer is None else LayerStates(pair.target, config.layer)
    options = (config.window, room, packed, layer_states)
    references: dict[int, Continuation] = {}
    if not answer.own:
        # They are needed for a rewrite, and for scores where the text has another token than the target's choice.
        text, rewritten = answer.tokens.tolist(), {s.position for s in found if s.to_rewrite}
        choices = {
            s.position: replace(s, token=s.choice, to_rewrite=s.position in rewritten)
            for s in found
            if s.position in rewritten or text[s.position] != s.choice
        }
        for reference in continue_substitutions(model, answer, [*choices.values()], *options):
            references[reference.substitution.position] = reference
    rows, asked = {}, Asked(model, pair.tokenizer)
    for continuation in continue_substitutions(model, answer, found, *options):
        reference = references.get(continuation.substitution.position)
        row = feature_row(continuation, reference) | {"mismatches": mismatches}
        if continuation.rewrite is not None:
            row |= label_row(asked, continuation, reference or answer, config)
        rows[continuation.substitution] = row
    return [rows[substitution] for substitution in found]


def label_rounds(
    model: PreTrainedModel, pair: Pair, answer: Answer, config: MiningConfig
) -> list[tuple[Round, list[dict]]]:
    """
    Draft rounds in the target's own answer, and label their mismatches. Each is rewritten with those before it in the
    round kept, and compared with the rewrite in which it is not. `model` is as for [`label_answer`].

    Returns:
        `list[tuple[Round, list[dict]]]`: each round, and the rows of its mismatches: [`feature_row`], [`label_row`],
        `hidden_ahead` ([`round_states`](../judge/features.py)), and as `round_flipped` what `flipped` would be if
        compared with the answer itself.
    """
    packed = packs(pair.target)

    def choose(starts: list[int]) -> list[int]:
        return sample(starts, config.rounds, config.seed, answer.prompt.id)

    length = config.lookup or config.round_length
    layer_states = None if config.layer is None else LayerStates(pair.target, config.layer)
    rounds = find_rounds(model, pair.draft, answer, pair.special_tokens, length, choose, packed, layer_states)
    found = {each: each.mismatches() for each in rounds}
    room = max(1, config.forward_tokens // answers_at_once(config, packed))
    every = [substitution for mismatches in found.values() for substitution in mismatches]
    rewritten = continue_substitutions(model, answer, every, config.window, room, packed, layer_states)
    done = {continuation.substitution: continuation for continuation in rewritten}
    parts, asked = [], Asked(model, pair.tokenizer)
    for round, mismatches in found.items():
        rows, original = [], answer
        for substitution in mismatches:
            position, continuation = substitution.position, done[substitution]
            if original.text[: position + 1] != [*substitution.before(answer), substitution.choice]:
                round.cut(position - round.start)  # in another forward, rounding gave the target another choice
                break
            row = feature_row(continuation) | label_row(asked, continuation, original, config)
            own = original is answer
            flipped = row["flipped"] if own else _flipped(asked, answer, continuation, config)
            # The row's answer is the round, so that the suffix of the answer itself is written down, too.
            suffix = {"original_suffix": original.text[position + 1 :]}
            rows.append(row | suffix | {"mismatches": len(mismatches), "round_flipped": flipped})
            original = continuation
        for row in rows:  # the round has its end now
            ahead = round.ahead(row["position"] - round.start)
            row[AHEAD] = row[AFTER] if ahead is None else ahead.half().cpu().numpy()
        parts.append((round, rows))
    return parts


def has_result(model: PreTrainedModel, pair: Pair, answer: Answer, config: MiningConfig) -> bool:
    """Whether an answer has a result that those of others can be compared with. `model` is as for [`label_answer`]."""
    asked, prompt = Asked(model, pair.tokenizer), answer.prompt
    own = CheckedAnswer(*_texts(asked, answer), answer.finished)
    return check_of(prompt, config.allow_code, asked.replies).same(prompt, own, own) is not None


def label_row(asked: Asked, continuation: Continuation, original: Answer | Continuation, config: MiningConfig) -> dict:
    """
    Compare a rewritten answer with the original one: the answer itself, or another continuation of it that has the
    target's choice in the place of the substitute.

    Returns:
        `dict` with the suffixes of both (`None` for that of the answer itself), and

    - `reconvergence`: share of the original suffix's 4-grams that the rewritten one has, in [0, 1];
    - `flipped`: whether the final answer, or passing the tests, changed. `None` if the prompt has no such check, an
      answer did not end (with tests: not even its code) or has no readable final answer;
    - `says_no`: the target's own probability that the two do not say the same, in [0, 1]; `None` if it was not asked;
    - `changed`: the label in [0, 1]: `flipped` where it is known, else 1 − `reconvergence`.
    """
    answer = continuation.answer
    suffix = original.text[continuation.substitution.position + 1 :]
    share = reconvergence(suffix, continuation.rewrite)
    flipped, no = _flipped(asked, original, continuation, config), None
    if config.ask:
        no = asked.says_no(answer.prompt.text, *_texts(asked, original, continuation))
    return {
        "original_suffix": None if original is answer else suffix,
        "rewritten_suffix": continuation.rewrite,
        "rewrite_finished": continuation.finished,
        "reconvergence": share,
        "flipped": flipped,
        "says_no": no,
        "changed": 1.0 - share if flipped is None else float(flipped),
    }


def _flipped(
    asked: Asked, original: Answer | Continuation, continuation: Continuation, config: MiningConfig
) -> bool | None:
    """See [`label_row`]."""
    prompt, finished = continuation.answer.prompt, (original.finished, continuation.finished)
    answers = map(CheckedAnswer, _texts(asked, original, continuation), finished)
    same = check_of(prompt, config.allow_code, asked.replies).same(prompt, *answers)
    return None if same is None else not same


def _texts(asked: Asked, *answers: Answer | Continuation) -> list[str]:
    return [asked.tokenizer.decode(each.text, skip_special_tokens=True) for each in answers]


def feature_row(continuation: Continuation, reference: Continuation | None = None) -> dict:
    """
    What a judge will see of a substitution, and the scores that need no rewrite, as compared with `reference` (which
    has the target's own choice) or else with the answer.

    Returns:
        `dict`; among its keys the [`CHEAP_SCORES`](label_files.py), each higher where the substitute is worse:

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
    after = slice(substitution.position + 1, substitution.position + 1 + len(continuation.logprobs))
    logprobs, best = answer.logprobs[after], answer.best[after]
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
        **dict(zip((BEFORE, AFTER), continuation.hidden.half().cpu().numpy(), strict=True)),
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
