"""In: labels and their target. Out: batches in which the substitutes follow their answers, the hidden states of the
substitutes, and labels with the states of another layer. One forward for each answer; nothing is rewritten."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..data.prompts import Prompt
from ..forward.branches import additive_masks, attention_windows, packs
from ..forward.tap import ForwardTap
from ..judge.features import AHEAD, STATES, means
from ..judge.layers import LayerStates
from ..models.cpu import precision
from ..models.load import fingerprint
from ..models.tokens import before_special
from ..utils.files import atomic_write, check_or_write_settings
from ..utils.progress import progress_bar
from .compact import with_prompts
from .label_files import answers_beside, join_answers, load_labels, mining_of, read_mining, shards_of, too_large


IGNORED = -100.0  # label of padding


class StateReader(torch.nn.Module):
    """
    Reads the hidden states around substitutes, in batches of [`DataCollatorForJudge`].

    Args:
        layer (`int`, *optional*): The layer whose input is read, without a gradient. By default the last hidden
            states are read, after the last normalisation.

    Raises:
        ValueError: If the target's attention cannot take the mask of substitutes ([`packs`]), or it has no such
            layer.
    """

    def __init__(self, target: PreTrainedModel, layer: int | None = None):
        super().__init__()
        self.target = target
        self.layer_states = None if layer is None else LayerStates(target, layer)
        if not packs(target):
            raise ValueError(
                f"`target`: the attention of {type(target).__name__} takes no mask for several substitutes at once, "
                "so its states cannot be read again. Train a judge on features as they were mined."
            )
        self.windows = attention_windows(target.config.get_text_config())

    def forward(self, input_ids: torch.LongTensor, places: torch.LongTensor, ends: torch.LongTensor) -> torch.Tensor:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length + substitutes)`): Answers, and then the substitutes.
            places (`torch.LongTensor` of shape `(batch, substitutes)`): Positions of the replaced tokens.
            ends (`torch.LongTensor` of shape `(batch, substitutes)`): Position up to which the answer has the
                candidates that follow in the draft. 0 if these are not known: the state ahead is then that after it.

        Returns:
            `torch.Tensor` of shape `(batch, substitutes, len(STATES), hidden_size)`.
        """
        total, length = input_ids.shape[1], input_ids.shape[1] - places.shape[1]
        index = torch.arange(total, device=places.device)
        # A substitute has the position of the token that it replaces. Everything sees the text before it, and itself.
        position_ids = torch.cat([index[:length].expand(len(places), -1), places], 1)
        earlier = position_ids[:, None] < position_ids[..., None]
        sees = earlier & (index < length) | (index == index[:, None])
        masks = additive_masks(sees, position_ids, position_ids, self.windows, self.target.dtype)
        text = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": masks, "use_cache": False}
        if self.layer_states is None:
            hidden = self.target.get_decoder()(**text).last_hidden_state
        else:  # read as in decoding, so that both give the same
            inputs = []
            with ForwardTap(self.target, lambda *forward: inputs.append(forward[2]), self.layer_states.entering):
                self.target(**text, logits_to_keep=1)
            hidden = self.layer_states(inputs[0], 0)
        places = places.to(hidden.device)  # of several
        before = hidden.gather(1, (places - 1).clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1]))
        after, index = hidden[:, -places.shape[1] :], index[:length].to(hidden.device)
        follows = (index > places[..., None]) & (index < ends.to(hidden.device)[..., None])
        return torch.stack([before, after, means(hidden[:, :length], follows, after)], 2)


def add_layer_states(
    target: PreTrainedModel,
    folder: str | os.PathLike,
    layer: int,
    output: str | os.PathLike,
    batch: int = 4,
    prompts: Sequence[Prompt] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> datasets.Dataset:
    """
    Write labels again with the hidden states of another layer. A run that was stopped continues.

    Args:
        target ([`~transformers.PreTrainedModel`]): The one that the labels were mined with.
        folder (`str`): Labels that [`mine`] wrote.
        layer (`int`): The layer whose input is read, in `[1, layers − 1]`.
        batch (`int`): Answers in a forward.
        prompts (`Sequence[Prompt]`, *optional*): Those that the labels were mined on, for labels without the tokens of
            their prompts ([`compact_labels`]).
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): The target's, for `prompts`.

    Returns:
        `datasets.Dataset`: what [`load_labels`] returns for `output`.

    Raises:
        FileNotFoundError: If `folder` has no labels.
        ValueError: If the labels are of another target, the target cannot be read ([`StateReader`]), its states are
            too large for fp16, a prompt is missing, `batch` is below 1, or `output` is `folder` or holds labels of
            other settings.
    """
    folder, output = Path(folder), Path(output)
    if batch < 1:
        raise ValueError(f"`batch` must be 1 or more, got {batch}.")
    if output.resolve() == folder.resolve():
        raise ValueError(f"`output` is the folder of the labels, {folder}. Choose another one.")
    record = read_mining(folder)
    if record["target_fingerprint"] != fingerprint(target):
        raise ValueError(f"`folder`: the labels are of other weights than `target`. Load {record['target']}.")
    reader = StateReader(target, layer)
    output.mkdir(parents=True, exist_ok=True)
    check_or_write_settings(output / "mining.json", record | {"layer": layer, "reread_dtype": precision(target)}, {})
    with progress_bar(len(load_labels(folder)), f"Read layer {layer} for substitutions") as bar:
        for shard in shards_of(folder):
            table = pyarrow.parquet.read_table(shard)
            if (output / shard.name).is_file():
                bar.update(len(table))
                continue
            answers = with_prompts(shard, prompts, tokenizer)
            states = np.zeros((0, len(STATES), record["hidden_size"]), np.float16)
            if len(table):
                labels = join_answers(datasets.Dataset(table), answers, record | {"source": str(folder)})
                states = _states(reader, labels, batch, bar.update)
            if not np.isfinite(states).all():
                raise too_large(layer)
            known = np.isin(table["answer"], answers.filter(pyarrow.compute.is_valid(answers["drafted"]))["answer"])
            for side, name in enumerate(STATES):
                unknown = None if name != AHEAD else pyarrow.array(~known)  # outside of rounds
                column = pyarrow.FixedSizeListArray.from_arrays(
                    states[:, side].ravel(), states.shape[-1], mask=unknown
                )
                table = table.set_column(table.column_names.index(name), name, column)
            shutil.copyfile(shard.with_suffix(".json"), output / shard.with_suffix(".json").name)
            for path, rows in ((answers_beside(shard), answers), (shard, table)):  # the labels make it complete
                with atomic_write(output / path.name) as incomplete:
                    pyarrow.parquet.write_table(rows, incomplete)
    return load_labels(output)


@torch.no_grad()
def _states(reader: StateReader, labels: datasets.Dataset, batch: int, advance: Callable[[int], None]) -> np.ndarray:
    """The states for each row, of shape `(rows, len(STATES), hidden_size)`. `advance` gets the number of rows done."""
    states = np.zeros((len(labels), len(STATES), labels.features[STATES[0]].length), np.float16)
    # Answers of similar length share a batch, so there is little padding.
    answers = sorted(answers_of(labels, np.zeros(len(labels))), key=lambda answer: len(answer["input_ids"]))
    for begin in range(0, len(answers), batch):
        some = answers[begin : begin + batch]
        inputs = DataCollatorForJudge(0)(some)
        read = reader(*(inputs[name].to(reader.target.device) for name in ("input_ids", "places", "ends")))
        for answer, found in zip(some, read.half().cpu().numpy(), strict=True):
            states[answer["rows"]] = found[: len(answer["rows"])]  # what follows is padding
            advance(len(answer["rows"]))
    return states


@dataclass
class DataCollatorForJudge:
    """
    Data collator for training through the model: each row is a prompt with its answer, and then the substitutes.

    Args:
        pad_token_id (`int`): Token to pad with.

    Examples:

    ```python
    >>> from hf_selfjudge.mining.layers import DataCollatorForJudge

    >>> collator = DataCollatorForJudge(pad_token_id=0)
    >>> two = {"input_ids": [5, 6, 7], "places": [1, 2], "substitutes": [8, 9], "scalars": [[0.5], [1]]}
    >>> one = {"input_ids": [5, 6], "places": [1], "substitutes": [4], "scalars": [[0.2]]}
    >>> two, one = two | {"ends": [0, 0]}, one | {"ends": [0]}
    >>> batch = collator([two | {"labels": [1, 0]}, one | {"labels": [0.5]}])
    >>> batch["input_ids"]
    tensor([[5, 6, 7, 8, 9],
            [5, 6, 0, 4, 0]])
    >>> batch["labels"]
    tensor([[   1.0000,    0.0000],
            [   0.5000, -100.0000]])
    ```
    """

    pad_token_id: int

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        def padded(name: str, value: float = 0, dtype: torch.dtype = torch.long) -> torch.Tensor:
            rows = [torch.tensor(example[name], dtype=dtype) for example in examples]
            return pad_sequence(rows, batch_first=True, padding_value=value)

        tokens = [padded(name, self.pad_token_id) for name in ("input_ids", "substitutes")]
        return {
            "input_ids": torch.cat(tokens, 1),
            "places": padded("places"),
            "ends": padded("ends"),
            "scalars": padded("scalars", dtype=torch.float),
            "labels": padded("labels", IGNORED, torch.float),
        }


def answers_of(labels: datasets.Dataset, known: np.ndarray) -> datasets.Dataset:
    """
    Labels answer by answer: what [`DataCollatorForJudge`] takes, and as `rows` their row numbers in `labels`.

    Args:
        known (`np.ndarray` of shape `(rows,)`): The label of each row; rows with NaN are left out.
    """
    if labels.data.column("prompt_ids").null_count:
        raise ValueError(
            "`labels` come without the tokens of their prompts. Add them: `hf-selfjudge add-layer LABELS --prompts …`."
        )
    rows = labels.select_columns(["prompt_ids", "answer_ids", "drafted", "position", "substitute", "scalars"])
    answers: dict[tuple, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    special = mining_of(labels)["special_tokens"]
    for index in np.flatnonzero(~np.isnan(known)).tolist():
        row = rows[index]
        answer = answers[*row["prompt_ids"], *row["answer_ids"]]
        answer["rows"].append(index)
        answer["places"].append(len(row["prompt_ids"]) + row["position"])
        answer["ends"].append(0 if row["drafted"] is None else _end_of_round(row, special))
        answer["substitutes"].append(row["substitute"])
        answer["scalars"].append(row["scalars"])
        answer["labels"].append(float(known[index]))
    # Of what follows the last replaced token only the rest of a draft is read.
    return datasets.Dataset.from_list([
        {"input_ids": ids[: max(*answer["places"], *answer["ends"])], **answer} for ids, answer in answers.items()
    ])  # fmt: skip


def _end_of_round(row: dict, special_tokens: Collection[int]) -> int:
    """Where the candidates end that count for the state ahead, in the text of a row."""
    start = len(row["answer_ids"]) - row["drafted"]
    return len(row["prompt_ids"]) + start + before_special(row["answer_ids"][start:], special_tokens)
