"""Rows of labels -> batches to train a judge on.

In: labels, as mining wrote them. Out: features of substitutions one below the other; or for training through the model
whole answers, with their substitutes behind them.
"""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import numpy as np
import torch
from torch.nn.functional import pad

from .features import STATES
from .judge_config import SCORES, JudgeConfig


IGNORED = -100.0  # label of what is padding


def soft_labels(labels: datasets.Dataset, args: JudgeConfig) -> np.ndarray:
    """
    The probability that the meaning changes, as `args.label` has it, in [0, 1]; NaN where it is not known. Shape
    `(rows,)`.

    Raises:
        ValueError: If it is known of no row, or there is none.
    """
    if not len(labels):
        raise ValueError("`labels` are empty. Mine some.")
    column = "reconvergence" if args.label == "lost" else args.label
    values = np.array(labels[column][:], dtype=float)
    if np.isnan(values).all():
        raise ValueError(f"`labels`: {args.label!r} is known of no row. Mine with `rewrites` above 0.")
    if args.label == "lost":
        return 1 - values
    if args.label in SCORES:
        threshold = np.nanmedian(values) if args.label_threshold is None else args.label_threshold
        return np.where(np.isnan(values), np.nan, values > threshold)
    return values


def layer_of(labels: datasets.Dataset) -> int | None:
    """
    How many of the target's layers are below the hidden states of labels; `None`: all, as they were mined.

    Raises:
        ValueError: If rows differ in it.
    """
    found = labels.unique("layer") if "layer" in labels.column_names else []
    if len(found) > 1:
        raise ValueError(f"`labels` have hidden states of different layers ({found}). Take those of one.")
    return found[0] if found else None


class Substitutions(torch.utils.data.Dataset):
    """
    Rows of labels in memory.

    Args:
        labels (`datasets.Dataset`): As [`load_labels`] gives them.
        known (`np.ndarray`): The label of each row; rows with NaN are left out.
    """

    def __init__(self, labels: datasets.Dataset, known: np.ndarray):
        keep = np.flatnonzero(~np.isnan(known))
        rows = labels.select(keep).with_format("numpy")
        self.labels = torch.from_numpy(known[keep]).float()
        self.scalars = torch.from_numpy(np.stack(rows["scalars"][:]))
        self.hidden = torch.from_numpy(np.stack([np.stack(rows[name][:]) for name in STATES], axis=1))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name)[index] for name in ("scalars", "hidden", "labels")}


@dataclass
class DataCollatorForSubstitutions:
    """
    Data collator for mined features: puts the rows of a batch one below the other.

    Examples:

    ```python
    >>> import torch
    >>> from hf_selfjudge.collators import DataCollatorForSubstitutions

    >>> collator = DataCollatorForSubstitutions()
    >>> examples = [
    ...     {"scalars": torch.tensor([0.5, 1.0]), "hidden": torch.zeros(2, 1), "labels": torch.tensor(1.0)},
    ...     {"scalars": torch.tensor([0.1, 2.0]), "hidden": torch.ones(2, 1), "labels": torch.tensor(0.0)},
    ... ]
    >>> collator(examples)
    {'scalars': tensor([[0.5000, 1.0000],
            [0.1000, 2.0000]]), 'hidden': tensor([[[0.],
             [0.]],
    <BLANKLINE>
            [[1.],
             [1.]]]), 'labels': tensor([1., 0.])}
    ```
    """

    def __call__(self, examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


@dataclass
class DataCollatorForJudge:
    """
    Data collator for training through the model: each row is a prompt with its answer, and behind it the substitutes,
    each at the place of the token that it replaces. A substitute sees what is before that place, and itself.

    Args:
        pad_token_id (`int`): Token to pad with.

    Examples:

    ```python
    >>> from hf_selfjudge.collators import DataCollatorForJudge

    >>> collator = DataCollatorForJudge(pad_token_id=0)
    >>> two = {"input_ids": [5, 6, 7], "places": [1, 2], "substitutes": [8, 9], "scalars": [[0.5], [1]]}
    >>> one = {"input_ids": [5, 6], "places": [1], "substitutes": [4], "scalars": [[0.2]]}
    >>> batch = collator([two | {"labels": [1, 0]}, one | {"labels": [0.5]}])
    >>> batch["input_ids"]
    tensor([[5, 6, 7, 8, 9],
            [5, 6, 0, 4, 0]])
    >>> batch["position_ids"]
    tensor([[0, 1, 2, 1, 2],
            [0, 1, 2, 1, 0]])
    >>> batch["sees"].int()
    tensor([[[1, 0, 0, 0, 0],
             [1, 1, 0, 0, 0],
             [1, 1, 1, 0, 0],
             [1, 0, 0, 1, 0],
             [1, 1, 0, 0, 1]],
    <BLANKLINE>
            [[1, 0, 0, 0, 0],
             [1, 1, 0, 0, 0],
             [1, 1, 1, 0, 0],
             [1, 0, 0, 1, 0],
             [0, 0, 0, 0, 1]]], dtype=torch.int32)
    >>> batch["places"]
    tensor([[1, 2],
            [1, 0]])
    >>> batch["labels"]
    tensor([[   1.0000,    0.0000],
            [   0.5000, -100.0000]])
    ```
    """

    pad_token_id: int

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)
        most = max(len(example["places"]) for example in examples)

        def padded(name: str, length: int, value: float = 0, dtype: torch.dtype = torch.long) -> torch.Tensor:
            rows = [torch.tensor(example[name], dtype=dtype) for example in examples]
            short = [length - len(row) for row in rows]
            return torch.stack(
                [pad(r, (0, 0) * (r.dim() - 1) + (0, n), value=value) for r, n in zip(rows, short, strict=True)]
            )

        places = padded("places", most)
        text = torch.arange(longest).expand(len(examples), -1)
        sees = torch.zeros(len(examples), longest + most, longest + most, dtype=torch.bool)
        sees[:, :longest, :longest] = text[:, None] <= text[..., None]
        sees[:, longest:, :longest] = text[:, None] < places[..., None]
        sees[:, longest:, longest:] = torch.eye(most, dtype=torch.bool)
        tokens = [padded("input_ids", longest, self.pad_token_id), padded("substitutes", most, self.pad_token_id)]
        return {
            "input_ids": torch.cat(tokens, 1),
            "position_ids": torch.cat([text, places], 1),
            "sees": sees,
            "places": places,
            "scalars": padded("scalars", most, dtype=torch.float),
            "labels": padded("labels", most, IGNORED, torch.float),
        }


def answers_of(labels: datasets.Dataset, known: np.ndarray) -> datasets.Dataset:
    """
    Rows of labels, answer by answer: what [`DataCollatorForJudge`] takes, and in `rows` which ones they are.

    Args:
        known (`np.ndarray`): The label of each row; rows with NaN are left out.
    """
    columns = ("prompt_ids", "answer_ids", "position", "substitute", "scalars")
    rows = labels.select_columns(columns)
    answers: dict[tuple, dict] = {}
    for index in np.flatnonzero(~np.isnan(known)):
        row = rows[int(index)]
        ids = (*row["prompt_ids"], *row["answer_ids"])
        answer = answers.setdefault(ids, {"rows": [], "places": [], "substitutes": [], "scalars": [], "labels": []})
        answer["rows"].append(int(index))
        answer["places"].append(len(row["prompt_ids"]) + row["position"])
        answer["substitutes"].append(row["substitute"])
        answer["scalars"].append(row["scalars"])
        answer["labels"].append(float(known[index]))
    # Nothing looks at what is behind the last substitution.
    return datasets.Dataset.from_list([
        {"input_ids": ids[: max(answer["places"])], **answer} for ids, answer in answers.items()
    ])  # fmt: skip
