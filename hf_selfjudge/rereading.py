"""Labels once more, with hidden states from another depth of the target.

In: labels, and the target that they are of. Out: the same labels, with what enters one of its layers in the place of
its last hidden states. One forward an answer; nothing is rewritten.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
from pyarrow.parquet import read_metadata
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from .branches import additive_masks, attention_windows, packs
from .collators import DataCollatorForJudge, answers_of
from .features import STATES
from .files import claim, whole
from .labels import load_labels, mining_of, shards_of
from .replay import Midway, part_of
from .sources import fingerprint


class StateReader:
    """
    The hidden states before and after substitutes that stand behind their answers, as [`DataCollatorForJudge`] lays
    them out.

    Args:
        target ([`~transformers.PreTrainedModel`]): A decoder.
        layer (`int`, *optional*): How many of its layers are below. `None`: all, and its last normalisation.

    Raises:
        ValueError: If the target's attention cannot take the mask of substitutes ([`packs`]), or it has no more layers
            than that.
    """

    def __init__(self, target: PreTrainedModel, layer: int | None = None):
        if layer is not None:
            Midway(target, layer)  # refuse now what could not be used
        if not packs(target):
            raise ValueError(
                f"`model`: the attention of {type(target).__name__} takes no mask in which substitutes stand side by "
                "side. Train on features as they were mined instead: pass a `Judge`."
            )
        # What enters a layer is told beside the output of that layer: those behind it are not needed.
        self.decoder = target.get_decoder() if layer is None else part_of(target, slice(layer + 1))
        self.layer = layer
        self.windows = attention_windows(target.config.get_text_config())

    def __call__(
        self,
        input_ids: torch.LongTensor,
        position_ids: torch.LongTensor,
        sees: torch.BoolTensor,
        places: torch.LongTensor,
    ) -> torch.Tensor:
        """
        Args:
            input_ids, position_ids, sees, places: See [`TargetWithJudge.forward`].

        Returns:
            `torch.Tensor` of shape `(batch, substitutes, len(STATES), hidden_size)`.
        """
        masks = additive_masks(sees, position_ids, position_ids, self.windows, self.decoder.dtype)
        output = self.decoder(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=masks,
            use_cache=False,
            output_hidden_states=self.layer is not None,
        )
        # The first of all states is what enters layer 0.
        hidden = output.last_hidden_state if self.layer is None else output.hidden_states[self.layer]
        before = hidden.gather(1, (places - 1).clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1]))
        return torch.stack([before, hidden[:, -places.shape[1] :]], 2)


def reread(
    target: PreTrainedModel,
    folder: str | os.PathLike,
    layer: int,
    output: str | os.PathLike,
    batch: int = 4,
) -> datasets.Dataset:
    """
    Write labels again, with the hidden states above `layer` of the target's layers. What is in `output` already is
    kept, so that a run that was cut off goes on.

    Args:
        target ([`~transformers.PreTrainedModel`]): The one that the labels were mined with.
        folder (`str`): Labels, as [`mine`] wrote them.
        layer (`int`): In `[1, layers − 1]`.
        output (`str`): Another folder.
        batch (`int`): Answers in a forward.

    Returns:
        `datasets.Dataset`: what [`load_labels`] gives of `output`.

    Raises:
        FileNotFoundError: If `folder` has no labels.
        ValueError: If the labels are of another target, `layer` is none of its, `output` is `folder` or holds labels
            of other settings.
    """
    folder, output = Path(folder), Path(output)
    (mining,) = mining_of([folder])
    del mining["shards"]
    if output.resolve() == folder.resolve():
        raise ValueError(f"`output` is the folder of the labels, {folder}. Choose another one.")
    if mining["target_fingerprint"] != fingerprint(target):
        raise ValueError(f"`folder`: the labels are of other weights than `target`. Load {mining['target']}.")
    reader = StateReader(target, layer)
    load_labels(folder)  # refuse what is empty before anything is written
    output.mkdir(parents=True, exist_ok=True)
    claim(output / "mining.json", mining | {"layer": layer}, {})
    shards = shards_of(folder)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("answers"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        for number, shard in enumerate(shards, start=1):
            if (output / shard.name).is_file():
                continue
            counts = shard.with_suffix(".json")
            if counts.is_file():
                shutil.copyfile(counts, output / counts.name)
            bar = progress.add_task(f"Read layer {layer} (shard {number} of {len(shards)})", total=None)
            tell = functools.partial(progress.update, bar)
            with whole(output / shard.name) as incomplete:
                if not read_metadata(shard).num_rows:  # nothing was replaced in these answers
                    shutil.copyfile(shard, incomplete)
                    continue
                labels = datasets.Dataset.from_parquet(str(shard), cache_dir=output / "cache")
                states = _states(reader, labels, batch, target.device, tell)
                for side, name in enumerate(STATES):
                    feature = labels.features[name]
                    labels = labels.remove_columns(name).add_column(name, list(states[:, side]), feature=feature)
                labels.to_parquet(incomplete)
    return load_labels(output)


@torch.no_grad()
def _states(
    reader: StateReader, labels: datasets.Dataset, batch: int, device: torch.device, tell: Callable[..., None]
) -> np.ndarray:
    """What the reader sees of each row; of shape `(rows, len(STATES), hidden_size)`. `tell` is given how many answers
    are `completed`, and their `total`."""
    states: list[np.ndarray] = [np.empty(0)] * len(labels)
    answers = list(answers_of(labels, np.zeros(len(labels))))
    answers.sort(key=lambda answer: len(answer["input_ids"]))  # answers of like length together: little is padded
    for begin in range(0, len(answers), batch):
        some = answers[begin : begin + batch]
        laid_out = DataCollatorForJudge(0)(some)
        read = reader(*(laid_out[name].to(device) for name in ("input_ids", "position_ids", "sees", "places")))
        for answer, of_answer in zip(some, read.half().cpu().numpy(), strict=True):
            for row, state in zip(answer["rows"], of_answer, strict=False):  # behind these is padding
                states[row] = state
        tell(completed=begin + len(some), total=len(answers))
    found = np.stack(states)
    if not np.isfinite(found).all():
        raise ValueError(f"`layer`: states above {reader.layer} layers are too large for fp16. Read another layer.")
    return found
