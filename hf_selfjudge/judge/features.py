"""The features of a candidate, from one verification forward.

In: the target's logits at the candidate's place and after it, and its hidden states, which are read by
`forward/tap.py`, or at another layer by `layers.py`. Out: a few scalars and states for each candidate. Mining and
decoding call the same functions, so that a judge sees in use what it saw in training.
"""

from __future__ import annotations

import torch


SCALARS = ("margin", "candidate_logprob", "entropy", "log_rank", "entropy_after", "top_logprob_after", "log_position")
# The target's hidden state before the candidate, after it, and ahead of it: see `round_states`.
STATES = BEFORE, AFTER, AHEAD = ("hidden_before", "hidden_after", "hidden_ahead")


def candidate_scalars(
    logits: torch.Tensor,  # (candidates, vocab_size): row i, where the candidate is chosen
    candidates: torch.LongTensor,  # (candidates,)
    logits_after: torch.Tensor,  # (candidates, vocab_size): row i + 1, after the candidate
    positions: torch.LongTensor,  # (candidates,): tokens of the answer before the candidate
) -> torch.Tensor:
    """
    The features named in `SCALARS`, for each candidate.

    - `margin`: log P(choice) − log P(candidate), nats, 0 or more;
    - `candidate_logprob`, `top_logprob_after`: nats;
    - `entropy`, `entropy_after`: of the target's distribution before and after the candidate, nats;
    - `log_rank`: log(1 + number of tokens that the target prefers to the candidate);
    - `log_position`: log(1 + position in the answer).

    Tokens that a constraint has masked (−inf) count as probability 0.

    Returns:
        `torch.FloatTensor` of shape `(candidates, len(SCALARS))`.
    """
    logprobs, logprobs_after = logits.float().log_softmax(-1), logits_after.float().log_softmax(-1)
    chosen = logprobs.gather(-1, candidates[:, None]).squeeze(-1)
    return torch.stack(
        [
            logprobs.amax(-1) - chosen,
            chosen,
            entropy(logprobs),
            (logprobs > chosen[:, None]).sum(-1).log1p(),
            entropy(logprobs_after),
            logprobs_after.amax(-1),
            positions.float().log1p(),
        ],
        dim=-1,
    )


def round_states(hidden: torch.Tensor, rows: torch.LongTensor, ends: torch.LongTensor) -> torch.Tensor:
    """
    The hidden states named in `STATES`, for each candidate:

    - `hidden_before`, `hidden_after`: before and after it;
    - `hidden_ahead`: the mean of those after the candidates that follow it in its draft, before the first
      special token; `hidden_after` if none follows.

    Args:
        hidden (`torch.Tensor` of shape `(length, hidden_size)`): Of a forward over one or several drafts.
        rows (`torch.LongTensor` of shape `(n,)`): The row before each candidate.
        ends (`torch.LongTensor` of shape `(n,)`): The row after the last candidate of its draft that counts.

    Returns:
        `torch.Tensor` of shape `(n, len(STATES), hidden_size)`.
    """
    index, after = torch.arange(len(hidden), device=hidden.device), hidden[rows + 1]
    follows = (index > rows[:, None] + 1) & (index <= ends[:, None])
    return torch.stack([hidden[rows], after, means(hidden[None], follows[None], after[None])[0]], dim=1)


def means(hidden: torch.Tensor, chosen: torch.BoolTensor, otherwise: torch.Tensor) -> torch.Tensor:
    """
    Means of some rows of a text.

    Args:
        hidden (`torch.Tensor` of shape `(batch, length, hidden_size)`): The rows.
        chosen (`torch.BoolTensor` of shape `(batch, n, length)`): Which of them belong to each mean.
        otherwise (`torch.Tensor` of shape `(batch, n, hidden_size)`): The result where there are none.
    """
    text, mean, row = chosen.nonzero(as_tuple=True)
    # Only rows that belong to it touch a mean, and they are summed in fp32.
    sums = torch.zeros_like(otherwise, dtype=torch.float).flatten(0, 1)
    sums = sums.index_add(0, text * chosen.shape[1] + mean, hidden[text, row].float()).view_as(otherwise)
    count = chosen.sum(-1, keepdim=True)
    return torch.where(count > 0, (sums / count.clamp(min=1)).to(otherwise.dtype), otherwise)


def entropy(logprobs: torch.Tensor) -> torch.Tensor:
    """Shannon entropy in nats of log-probabilities of shape `(..., vocab_size)`; masked tokens add nothing."""
    return torch.special.entr(logprobs.exp()).sum(-1)
