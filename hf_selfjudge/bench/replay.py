"""In: labels that were mined in rounds, and rules. Out: a [`Grid`] of what each rule makes of these rounds: how many
tokens it keeps, and whether the final answer is still that of lossless decoding. Nothing is decoded: what follows each
number of kept mismatches was tried when the labels were mined. Rounds are looked at one by one, so it is not known how
changes add up over an answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow
import torch

from ..decoding.rules import Mismatches, Rule
from ..judge.features import SCALARS, STATES
from ..mining.label_files import mining_of
from ..utils.progress import tracked
from .tradeoff import Grid


COLUMNS = ("substitute", "token", "position", "scalars", "kl_target_draft", *STATES)  # of labels
ORACLE = "oracle"  # keeps as many mismatches as leave the final answer unchanged


@dataclass(frozen=True, eq=False)
class Recorded(Mismatches):
    """Mismatches from the rows of their labels. Tokens that are as likely as a candidate do not count in its rank;
    `divergence` is NaN for drafts of prompt lookup."""

    tokens: torch.LongTensor
    choices: torch.LongTensor
    positions: torch.LongTensor
    matches_after: torch.LongTensor
    last: torch.BoolTensor
    scalars: torch.FloatTensor
    hidden: torch.Tensor
    divergence: torch.FloatTensor
    vocab_size: int

    @property
    def ranks(self) -> torch.LongTensor:
        return self.scalars[:, SCALARS.index("log_rank")].expm1().round().long() + 1

    @property
    def surest(self) -> torch.FloatTensor:
        return (self.margin + self.scalars[:, SCALARS.index("candidate_logprob")]).exp()


@dataclass(frozen=True, eq=False)
class RecordedRound:
    """
    A round, and what follows it.

    Args:
        mismatches ([`Recorded`], *optional*): Those of the draft; `None` if there is none.
        tokens (`list[int]`): How many tokens the round adds if none, one, … or all of them are kept.
        unchanged (`list[bool]`): Whether the final answer is then that of lossless decoding.
    """

    prompt_id: str
    category: str
    mismatches: Recorded | None
    tokens: list[int]
    unchanged: list[bool]

    def kept(self, rule: Rule) -> int:
        """How many mismatches a rule keeps: those before the first that it does not."""
        return 0 if self.mismatches is None else int(rule.keep(self.mismatches).cumprod(0).sum())


def read_rounds(labels: datasets.Dataset, answers: pyarrow.Table) -> list[RecordedRound]:
    """
    The rounds of labels, but for those of prompts whose final answer is not known.

    Args:
        labels (`datasets.Dataset`): From [`load_labels`].
        answers (`pyarrow.Table`): From [`load_answers`].

    Raises:
        ValueError: If there are no rounds, their final answers are not known, or there are no hidden states.
    """
    if labels.data.column(STATES[0]).null_count:
        raise ValueError("`labels` have no hidden states. Add them: `hf-selfjudge add-layer LABELS --layer …`.")
    found = defaultdict(list)
    for place, row in enumerate(labels.select_columns(["source", "answer", "position", "round_flipped"])):
        found[row["source"], row["answer"]].append((row["position"], row["round_flipped"], place))
    rounds, mining = [], mining_of(labels)
    rows = labels.select_columns([*COLUMNS]).with_format("numpy")
    columns = ["source", "answer", "prompt_id", "category", "drafted", "answer_ids", "known"]
    answers = answers.select(columns).to_pylist()
    known = {(answer["source"], answer["prompt_id"]) for answer in answers if answer["known"]}
    for answer in answers:
        if answer["drafted"] is None or (answer["source"], answer["prompt_id"]) not in known:
            continue
        end = len(answer["answer_ids"])
        ends_text = bool({*answer["answer_ids"][-1:]} & {*mining["end_tokens"]})
        mismatches = sorted(found[answer["source"], answer["answer"]])
        positions, flipped, places = zip(*mismatches, strict=True) if mismatches else ((), (), ())
        reached = [*positions, end]
        # After the candidates that are kept, the target adds a token, but none after the end of the text.
        added = [place + 1 - (end - answer["drafted"]) for place in positions]
        added.append(answer["drafted"] + (not ends_text))
        rounds.append(
            RecordedRound(
                answer["prompt_id"],
                answer["category"],
                _recorded(rows[[*places]], reached, mining["vocab_size"]) if places else None,
                added,
                [True, *(changed is False for changed in flipped)],  # one that can no longer be read has changed
            )
        )
    if not rounds:
        raise ValueError(
            "`labels` hold no round of an answer whose final answer is known. Mine them with `--rounds`, on prompts "
            "with a check."
        )
    return rounds


def _recorded(rows: dict, reached: Sequence[int], vocab_size: int) -> Recorded:
    """The mismatches of one round. `reached` are their positions, and the end of the draft."""
    columns = {name: torch.from_numpy(np.stack([*column])) for name, column in rows.items()}
    return Recorded(
        tokens=columns["substitute"],
        choices=columns["token"],
        positions=columns["position"],
        matches_after=torch.tensor(reached).diff() - 1,
        last=torch.tensor([False] * (len(reached) - 2) + [True]),
        scalars=columns["scalars"],
        hidden=torch.stack([columns[name] for name in STATES], dim=1),
        divergence=columns["kl_target_draft"],
        vocab_size=vocab_size,
    )


def replay(
    rounds: Sequence[RecordedRound], rules: Sequence[Rule], names: Sequence[str], curves: Sequence[str]
) -> Grid:
    """
    What each rule makes of the rounds.

    Args:
        rules (`Sequence[Rule]`): Any, [`Lossless`] among them.
        names, curves (`Sequence[str]`): Of each rule, as in [`Grid`].

    Returns:
        [`Grid`], with a last row for [`ORACLE`], of the tokens that the rounds of each prompt add; the number of
        rounds; and as score `unchanged` the share of them after which the final answer is that of lossless decoding.
    """
    prompts = {each.prompt_id: each.category for each in rounds}
    columns = {prompt: column for column, prompt in enumerate(prompts)}
    tokens, counts, unchanged = np.zeros((3, len(rules) + 1, len(prompts)))
    for each in tracked(rounds, "Replay"):
        column = columns[each.prompt_id]
        harmless = [kept for kept, same in enumerate(each.unchanged) if same]
        for row, kept in enumerate([*map(each.kept, rules), harmless[-1]]):
            tokens[row, column] += each.tokens[kept]
            unchanged[row, column] += each.unchanged[kept]
        counts[:, column] += 1
    scores = {"unchanged": unchanged / counts}
    return Grid([*names, ORACLE], [*curves, ORACLE], np.array([*prompts.values()]), tokens, counts, scores)
