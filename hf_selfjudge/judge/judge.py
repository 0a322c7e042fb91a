"""The judge: features of a substitution -> the probability that it changes the meaning.

In: the scalars of [`candidate_scalars`] and the hidden states of [`round_states`]. Out: one number for each
candidate. Knows nothing of generation. Saved as `config.json` and `model.safetensors`, with an adapter beside them as
PEFT saves it.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from pathlib import Path

import torch
from huggingface_hub import CommitInfo
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..models.load import fingerprint
from ..models.wheels import described
from ..utils.files import atomic_write, read_json, write_json
from ..utils.names import is_hub_id, public_name
from ..utils.transfer import download, upload
from .features import SCALARS, STATES
from .info import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, WEIGHTS, JudgeInfo
from .lora import Adapter
from .shipped import find_judge


logger = logging.get_logger(__name__)

# Larger files (bytes) are not read: a judge's are far smaller.
CONFIG_LIMIT, HEADER_LIMIT, ADAPTER_LIMIT = 2**24, 2**20, 2**31


class Judge(torch.nn.Module):
    """
    A linear head over normalised scalars and a few principal components of hidden states. Normalisation and
    projection are part of it, so it takes raw features. A new judge gives every candidate the probability 0.5.

    Args:
        info ([`JudgeInfo`]): Sizes, features and the models that it belongs to.
        adapter ([`Adapter`], *optional*): The LoRA adapter that belongs to it, for the target's last layers.
    """

    def __init__(self, info: JudgeInfo, adapter: Adapter | None = None):
        super().__init__()
        self.info, self.adapter = info, adapter
        hidden, components, scalars, states = info.hidden_size, info.components, len(info.scalars), len(info.states)
        self.columns = [SCALARS.index(name) for name in info.scalars]
        self.sides = [STATES.index(name) for name in info.states]
        self.register_buffer("scalar_mean", torch.zeros(scalars))
        self.register_buffer("scalar_scale", torch.ones(scalars))
        self.register_buffer("hidden_mean", torch.zeros(states, hidden))
        self.register_buffer("projection", torch.zeros(states, hidden, components))
        self.head = torch.nn.Linear(scalars + states * components, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, scalars: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """
        Args:
            scalars (`torch.Tensor` of shape `(candidates, len(SCALARS))`): See [`candidate_scalars`].
            hidden (`torch.Tensor` of shape `(candidates, len(STATES), hidden_size)`): See [`round_states`]; of
                those that enter `info.layer`, or the last ones.

        Returns:
            `torch.FloatTensor` of shape `(candidates,)`: log-odds that accepting the candidate changes the meaning.
        """
        with torch.autocast(hidden.device.type, enabled=False):  # fp32, even if the target runs in less
            scalars = (scalars[:, self.columns].float() - self.scalar_mean) / self.scalar_scale
            centred = hidden[:, self.sides].float() - self.hidden_mean
            components = torch.einsum("nsh,shc->nsc", centred, self.projection)
            return self.head(torch.cat([scalars, components.flatten(1)], dim=-1)).squeeze(-1)

    def check_target(self, target: PreTrainedModel, allow_other_weights: bool = False) -> None:
        """
        Check that the judge was made for a target. Other weights under the same Hub id (another revision or precision,
        a quantised copy) only lead to a warning.

        Args:
            target ([`~transformers.PreTrainedModel`]): The target.
            allow_other_weights (`bool`, defaults to `False`): Accept other weights of the same sizes under any name.

        Raises:
            ValueError: If it was made for another target; says which of id, hidden size, vocabulary and fingerprint
                differ.
        """
        self.check_config(target.config, fingerprint(target), allow_other_weights)

    def check_config(
        self, config: PreTrainedConfig, weights: str | None = None, allow_other_weights: bool = False
    ) -> None:
        """[`check_target`] for a target that is only known by its config and the fingerprint of its `weights`; without
        that they count as others."""
        text, info = config.get_text_config(), self.info
        pairs = {
            "hidden size": (info.hidden_size, text.hidden_size),
            "vocabulary": (info.vocab_size, text.vocab_size),
            "id": (info.target, public_name(config.name_or_path)),
            "fingerprint": (info.target_fingerprint, weights),
        }
        different = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        if "fingerprint" not in different:
            different.pop("id", None)  # the same weights under another name, a folder say
        wrong_sizes = {name: pair for name, pair in different.items() if name in ("hidden size", "vocabulary")}
        # A folder's name is no id: another model may have it. Only a Hub id says that both are the same model.
        other_weights = "fingerprint" in different
        if allow_other_weights or ("id" not in different and is_hub_id(info.target)):
            different = wrong_sizes
        if different:
            differences = "; ".join(f"{name}: judge {a!r}, target {b!r}" for name, (a, b) in different.items())
            advice = f"Load {info.target}, or a judge made for this target."
            if not wrong_sizes:
                advice += " Same model in another precision, or a light fine-tune? Pass `allow_other_weights=True`."
            raise ValueError(f"`judge` was made for another target. What differs: {differences}. {advice}")
        if other_weights:
            own = described(info.target_fingerprint) or info.target_fingerprint
            logger.warning_once(
                f"It is not known whether `target` has the weights that the judge was made on ({own})."
                if weights is None
                else f"The judge was made on other weights of {info.target} than those of `target`: on {own}. Its "
                "quality on these was not measured."
            )

    # -- files -----------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """
        Write `config.json` and `model.safetensors`, and the adapter as PEFT does. Files that are there stay as they
        are until all new ones are written.

        Raises:
            OSError: If `folder` cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as files:

            def new(name: str) -> Path:
                return files.enter_context(atomic_write(folder / name))

            write_json(new(CONFIG), self.info.to_json())
            save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, new(WEIGHTS))
            if self.adapter is not None:  # PEFT writes down the path that the target was loaded from
                write_json(new(ADAPTER_CONFIG), self.adapter.config | {"base_model_name_or_path": self.info.target})
                save_file(self.adapter.tensors, new(ADAPTER_WEIGHTS))

    def push_to_hub(self, repo_id: str, **options) -> CommitInfo:
        """
        Publish the judge with its card, in one commit.

        Args:
            repo_id (`str`): The repo, created if it does not exist.
            options: `token`, `private`, `revision`, `create_pr`, `tag` of [`upload`].

        Raises:
            HubError: If the Hub refused or could not be reached. The repo is as it was.
        """
        from .card import plot_reliability, repo_files  # matplotlib, which decoding does not need

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            if "held_out" in self.info.training:
                plot_reliability(self.info.training["held_out"]["reliability"], Path(folder) / "reliability.png")
            files = repo_files(folder, self.info, fingerprint(self), repo_id)
            return upload(repo_id, files, "Upload judge", **options)

    @classmethod
    def from_pretrained(
        cls,
        reference: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> Judge:
        """
        Load a judge from a folder or a Hub repo, or a shipped one by its name: safetensors only, never a pickle.
        Names, shapes and types are checked before any weight is read.

        Args:
            reference (`str`): Folder, Hub id, or the name of a judge that comes with the package, such as
                `qwen2.5-coder-1.5b-selfjudge`.
            revision, token, cache_dir, local_files_only: See [`download`].

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged or too large, or is not that of a judge of this version.
            HubError: If the Hub could not be reached.
        """

        reference = find_judge(reference)

        def fetch(name: str, limit: int) -> Path:
            access = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
            try:
                return download(reference, name, limit, revision=revision, **access)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"`judge`: {error} A judge is a folder or Hub repo with {CONFIG} and {WEIGHTS}, as "
                    "`Judge.save_pretrained` writes them; other weight formats are not loaded."
                ) from error
            except ValueError as error:
                raise ValueError(f"`judge`: {error}") from error

        config = fetch(CONFIG, CONFIG_LIMIT)
        if not Path(reference).is_dir():
            revision = config.parent.name  # the commit, so that all files are of one commit
        try:
            info = JudgeInfo.from_json(read_json(config))
        except ValueError as error:
            raise ValueError(f"`judge`: {config} is not the config of a judge ({error}).") from error
        with torch.device("meta"):  # nothing is allocated before the file is known to hold the weights
            judge = cls(info)
        shapes = {name: tuple(tensor.shape) for name, tensor in judge.state_dict().items()}
        size = sum(4 * math.prod(shape) for shape in shapes.values())
        judge.load_state_dict(_read_tensors(fetch(WEIGHTS, size + HEADER_LIMIT), shapes), assign=True)
        if info.adapter:
            adapter_config = read_json(fetch(ADAPTER_CONFIG, CONFIG_LIMIT))
            judge.adapter = Adapter(adapter_config, _read_tensors(fetch(ADAPTER_WEIGHTS, ADAPTER_LIMIT)))
        return judge.eval()


def _read_tensors(path: Path, expected: dict[str, tuple[int, ...]] | None = None) -> dict[str, torch.Tensor]:
    """Read a safetensors file. `expected`: the names and shapes that it must have, all in fp32; checked first."""
    try:
        with safe_open(path, "pt") as file:
            names = [*file.keys()]  # noqa: SIM118 (not a mapping)
            slices = {name: file.get_slice(name) for name in names}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            types = {part.get_dtype() for part in slices.values()}
            if expected is not None and shapes != expected:
                wrong = min(name for name in shapes.keys() | expected if shapes.get(name) != expected.get(name))
                raise ValueError(
                    f"`judge`: {path} does not fit {CONFIG} ({wrong}: {expected.get(wrong)} by the config, "
                    f"{shapes.get(wrong)} there). Fetch both again."
                )
            if types - ({"F32"} if expected is not None else {"F32", "F16", "BF16"}):
                raise ValueError(f"`judge`: {path} has numbers of type {', '.join(sorted(types))}, not fp32.")
            # Copies: sums over tensors that are mapped into memory may be rounded differently.
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"`judge`: {path} is not a complete safetensors file ({error}). It is truncated or in another format (a "
            "pickle is never loaded). Fetch it again."
        ) from error
    if broken := sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all()):
        raise ValueError(f"`judge`: {path} contains NaN or infinity ({broken[0]}). Fetch it again.")
    return tensors
