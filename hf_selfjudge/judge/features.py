"""The scalar features of a candidate, from one verification forward.

In: the target's logits at the candidate's place and after it. Out: a few scalars for each candidate. Mining and
decoding call the same function, so that a judge sees in use what it saw in training. The hidden states, which it sees
too, are read by `forward/tap.py`, or at another layer by `layers.py`.
"""

from __future__ import annotations

import torch


SCALARS = ("margin", "candidate_logprob", "entropy", "log_rank", "entropy_after", "top_logprob_after", "log_position")
STATES = ("hidden_before", "hidden_after")  # the target's hidden state before the candidate, and after it


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


def entropy(logprobs: torch.Tensor) -> torch.Tensor:
    """Shannon entropy in nats of log-probabilities of shape `(..., vocab_size)`; masked tokens add nothing."""
    return torch.special.entr(logprobs.exp()).sum(-1)
