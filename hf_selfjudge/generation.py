"""Judged generation inside stock `generate(assistant_model=...)`.

In: a target, a judge, and whatever `generate` takes. Out: what `generate` returns, and [`Stats`]. A draft proposes,
the target verifies, and where its choice differs from the candidate the judge may accept the candidate all the same.

Nothing of the decoding loop is rewritten. [`JudgeCandidateGenerator`] wraps the candidate generator that transformers
built and so learns what was drafted and what was kept; [`HiddenTap`] reads the verification forward;
[`JudgeLogitsProcessor`] makes the row of an accepted candidate one-hot, so that the stock comparison keeps it. The
loop is `GenerationMixin._assisted_decoding` of transformers.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation import CandidateGenerator
from transformers.utils import logging

from .features import candidate_scalars
from .hidden import HiddenTap
from .judge import Judge


logger = logging.get_logger(__name__)


@dataclass
class Stats:
    """
    What one call of `generate` did. `matched + judged + target` is the number of tokens produced.

    Args:
        rounds (`int`): Drafts, each with one target forward.
        drafted (`int`): Candidates, tokens.
        matched (`int`): Candidates kept because the target chose them too, tokens.
        judged (`int`): Candidates kept because the judge accepted them, tokens.
        target (`int`): Tokens that the target itself added: the correction or the bonus of each round.
        logprob_given_up (`float`): Log-probability that judged tokens have less than the target's choices, nats.
        sources (`list[str]`): Who decided each token: `"matched"`, `"judged"` or `"target"`.
    """

    rounds: int = 0
    drafted: int = 0
    matched: int = 0
    judged: int = 0
    target: int = 0
    logprob_given_up: float = 0.0
    sources: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens produced."""
        return self.matched + self.judged + self.target

    @property
    def tokens_per_round(self) -> float:
        """Tokens produced for each target forward, the bonus token included; 0 before the first round."""
        return self.tokens / self.rounds if self.rounds else 0.0

    @property
    def judged_share(self) -> float:
        """Share of the tokens that the judge accepted against the target's choice."""
        return self.judged / self.tokens if self.tokens else 0.0


class Round:
    """The state of one call: the candidates under verification, the verification forward, and the statistics."""

    def __init__(self, judge: Judge, threshold: float):
        self.judge = judge
        self.limit = torch.logit(torch.tensor(threshold, dtype=torch.float64)).item()
        self.stats = Stats()
        self.prompt_length: int | None = None
        self.verifying = False

    def prepare(self, config: GenerationConfig, device: torch.device) -> None:
        """Take what the call decodes with from its final `config`."""
        self.do_sample = config.do_sample
        eos = torch.tensor([] if config.eos_token_id is None else config.eos_token_id, dtype=torch.long).flatten()
        self.special = torch.cat([torch.tensor(self.judge.info.special_tokens, dtype=torch.long), eos]).to(device)

    def draft(self) -> None:
        """The draft is at work; forwards and logits until [`begin`] are not a verification."""
        self.verifying = False

    def begin(self, start: int, candidates: torch.LongTensor) -> None:
        """`candidates` of shape `(k,)` are about to be verified behind `start` tokens."""
        if self.prompt_length is None:
            self.prompt_length = start
        self.start, self.candidates, self.judged = start, candidates, {}
        self.hidden = self.logits = None
        self.verifying, self.rejected = True, False

    def observe(self, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """Keep the last `k + 1` rows of the verification forward: row `i` chooses candidate `i`."""
        if self.verifying:
            rows = len(self.candidates) + 1
            self.hidden, self.logits = hidden[0, -rows:], logits[0, -rows:]

    def accepts(self, row: int, scores: torch.Tensor) -> bool:
        """Whether the judge accepts candidate `row` although the target's choice in `scores`, of shape `(vocab_size,)`
        and with all constraints applied, is another token."""
        candidate = self.candidates[row]
        pair = torch.stack([scores.argmax(), candidate])
        if self.rejected or pair[0] == pair[1]:
            return False
        # Under greedy decoding nothing behind a rejected candidate counts; sampling may keep what the judge rejects.
        self.rejected = not self.do_sample
        # A masked token is never accepted; a special token is neither accepted nor overruled.
        if scores[candidate] == -torch.inf or torch.isin(pair, self.special).any():
            return False
        scalars = candidate_scalars(
            scores[None], candidate[None], self.logits[None, row + 1].to(scores.device),
            torch.tensor([self.start + row - self.prompt_length], device=scores.device),
        )  # fmt: skip
        device = self.judge.head.weight.device
        odds = self.judge(scalars.to(device), self.hidden[None, row : row + 2].to(device))
        if odds.item() < self.limit:
            self.judged[row], self.rejected = scalars[0, 0].item(), False
            return True
        return False

    def end(self, kept: torch.LongTensor) -> None:
        """Count what the round kept: `kept` of shape `(n,)` are the tokens it added."""
        drafted = len(self.candidates)
        agreed = (kept[:drafted] == self.candidates[: len(kept)]).tolist()
        sources = [
            "target" if not same else "judged" if i in self.judged else "matched" for i, same in enumerate(agreed)
        ]
        sources += ["target"] * (len(kept) - len(sources))
        stats = self.stats
        stats.rounds += 1
        stats.drafted += drafted
        stats.matched += sources.count("matched")
        stats.judged += sources.count("judged")
        stats.target += sources.count("target")
        stats.logprob_given_up += sum(self.judged[i] for i, source in enumerate(sources) if source == "judged")
        stats.sources += sources


class JudgeCandidateGenerator(CandidateGenerator):
    """
    Wraps the candidate generator that transformers built, whichever it is, and tells the round what was drafted
    (`get_candidates`) and what was kept (`update_candidate_strategy`).

    Args:
        inner ([`~transformers.generation.CandidateGenerator`]): The one to wrap.
        round ([`Round`]): State of the call.
    """

    def __init__(self, inner: CandidateGenerator, round: Round):
        self.inner, self.round = inner, round

    @property
    def requires_model_outputs(self) -> bool:
        return self.inner.requires_model_outputs

    @property
    def model_kwargs_overrides(self) -> dict:
        return self.inner.model_kwargs_overrides

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs) -> tuple[torch.LongTensor, torch.Tensor | None]:
        self.round.draft()
        candidate_ids, logits = self.inner.get_candidates(input_ids, **kwargs)
        start = input_ids.shape[1]
        self.round.begin(start, candidate_ids[0, start:].to(input_ids.device))
        return candidate_ids, logits

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        self.round.end(input_ids[0, self.round.start :])
        self.inner.update_candidate_strategy(input_ids, scores, num_matches)


class JudgeLogitsProcessor(LogitsProcessor):
    """
    Makes the row of an accepted candidate one-hot on it.

    transformers calls the processors once for each row of a verification, with the candidates before it as input; the
    caller's processors stand behind the penalties and constraints and before temperature and filters, so the judge
    sees final constraints. Outside a verification (plain decoding, drafting, the bonus row) it changes nothing.

    Args:
        round ([`Round`]): State of the call.
    """

    def __init__(self, round: Round):
        self.round = round

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        round = self.round
        if not round.verifying or round.logits is None:
            return scores
        row = input_ids.shape[1] - round.start
        if row >= len(round.candidates) or not round.accepts(row, scores[0]):
            return scores
        accepted = torch.full_like(scores, -torch.inf)
        accepted[0, round.candidates[row]] = 0.0
        return accepted


class JudgedModel:
    """
    A target with a judge; `generate` and everything else as on the target itself.

    Args:
        target ([`~transformers.PreTrainedModel`]): The model whose quality counts. It is not changed.
        judge ([`Judge`]): Made for this target.
        threshold (`float`, *optional*): Overrides the judge's own. 0 never accepts (lossless), 1 always does.
        allow_other_weights (`bool`, *optional*, defaults to `False`): Use the judge on other weights of the same
            shape.

    Attributes:
        stats ([`Stats`]): Of the last call of `generate` that had a draft.

    Raises:
        TypeError: If `target` is a wrapper (PEFT, compiled) instead of a transformers model.
        ValueError: If `judge` was made for another target, or `threshold` is not in [0, 1].

    Example:

    ```python
    >>> judged = JudgedModel.from_pretrained(target, "me/qwen2.5-coder-1.5b-selfjudge")
    >>> judged.generate(**inputs, assistant_model=draft, max_new_tokens=64)
    >>> judged.stats.tokens_per_round
    ```
    """

    def __init__(
        self, target: PreTrainedModel, judge: Judge, threshold: float | None = None, allow_other_weights: bool = False
    ):
        if not isinstance(target, PreTrainedModel):
            raise TypeError(
                f"`target` must be a transformers model, got {type(target).__name__}. Of a PEFT model pass "
                "`merge_and_unload()`, of a compiled model the original."
            )
        judge.check_target(target, allow_other_weights)
        self.target, self.judge = target, judge.to(target.get_output_embeddings().weight.device).eval()
        self.threshold = judge.info.threshold if threshold is None else threshold
        self.stats = Stats()

    @classmethod
    def from_pretrained(
        cls,
        target: PreTrainedModel,
        judge: str | os.PathLike,
        *,
        threshold: float | None = None,
        allow_other_weights: bool = False,
        **hub_kwargs,
    ) -> JudgedModel:
        """
        Put a judge from a folder or a Hub repo on a target.

        Args:
            hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only` of [`Judge.from_pretrained`].
        """
        return cls(target, Judge.from_pretrained(judge, **hub_kwargs), threshold, allow_other_weights)

    @property
    def threshold(self) -> float:
        """A candidate is accepted if its probability of changing the meaning is below this, in [0, 1]."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"`threshold` must be in [0, 1] (0 is lossless, 1 accepts every candidate), got {value}.")
        self._threshold = float(value)

    def __getattr__(self, name: str):
        if name == "target":  # not set yet: copying or unpickling
            raise AttributeError(name)
        return getattr(self.target, name)

    def __call__(self, *args, **kwargs):
        """The target's own forward."""
        return self.target(*args, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs,
    ):
        """
        Stock `generate`, with all its arguments. Where it decodes with a draft (`assistant_model`,
        `prompt_lookup_num_tokens`, …) the judge takes part; elsewhere the result is exactly the target's.

        Raises:
            ValueError: If the prompt is empty or longer than the target's context, or the draft has another vocabulary
                and no tokenizers were given.
        """
        self._check(inputs if inputs is not None else kwargs.get("input_ids"), kwargs)
        round = Round(self.judge, self.threshold)
        # The override goes on a shallow copy: it shares the weights, and other callers of the target do not see it.
        target = copy.copy(self.target)
        build = target._get_candidate_generator

        def wrap(**arguments) -> JudgeCandidateGenerator:
            round.prepare(arguments["generation_config"], target.device)
            return JudgeCandidateGenerator(build(**arguments), round)

        target._get_candidate_generator = wrap
        processors = LogitsProcessorList([*(logits_processor or []), JudgeLogitsProcessor(round)])
        with HiddenTap(target, round.observe):
            output = target.generate(inputs, generation_config, processors, **kwargs)
        if round.stats.rounds:
            self.stats = round.stats
        return output

    def _check(self, input_ids: torch.Tensor | None, kwargs: dict) -> None:
        config = self.target.config.get_text_config()
        if input_ids is not None and "inputs_embeds" not in kwargs and not config.is_encoder_decoder:
            length, context = input_ids.shape[-1], config.to_dict().get("max_position_embeddings")
            if length == 0:
                raise ValueError("`input_ids` is empty. Give at least one token.")
            if context is not None and length >= context:
                raise ValueError(
                    f"`input_ids` has {length} tokens, the target's context is {context}. Shorten the prompt."
                )
        draft = kwargs.get("assistant_model")
        if draft is None:
            return
        draft_size = draft.config.get_text_config().vocab_size
        if draft_size != config.vocab_size and kwargs.get("assistant_tokenizer") is None:
            raise ValueError(
                f"`assistant_model` has a vocabulary of {draft_size} tokens, the target one of {config.vocab_size}. "
                "Use a draft with the target's tokenizer, or pass `tokenizer` and `assistant_tokenizer`."
            )
        if draft.config.name_or_path != self.judge.info.draft:
            logger.warning_once(
                f"The judge was trained on mismatches of {self.judge.info.draft}, the draft is "
                f"{draft.config.name_or_path}. It works with any draft; how well was measured with the former only."
            )
