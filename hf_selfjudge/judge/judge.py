"""The judge: features of a substitution -> the probability that it changes the meaning.

In: the scalars of [`candidate_scalars`] and the target's hidden states before and after the candidate. Out: one
number for each candidate. Knows nothing of generation. Saved as `config.json` and `model.safetensors`, nothing else.
"""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

import torch
from huggingface_hub import CommitInfo
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import logging

from ..models.load import fingerprint
from ..models.wheels import described
from ..utils.files import atomic_write, read_json, write_json
from ..utils.names import is_hub_id, public_name
from ..utils.transfer import download, upload
from .card import plot_reliability, published
from .features import SCALARS, STATES
from .info import JudgeInfo, _check_info
from .replay import Adapter


logger = logging.get_logger(__name__)


CONFIG, WEIGHTS = "config.json", "model.safetensors"
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
# Bytes of a file that is not read any more: a judge's are far smaller.
CONFIG_LIMIT, HEADER_LIMIT, ADAPTER_LIMIT = 2**24, 2**20, 2**31


class Judge(torch.nn.Module):
    """
    A linear head over normalised scalars and a few principal components of hidden states. Normalisation and
    projection are part of it, so that it takes raw features. A new one says 0.5 to everything.

    Args:
        info ([`JudgeInfo`]): Sizes and the models it belongs to.
        adapter ([`Adapter`], *optional*): In the target's last layers, if one belongs to it.
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
            hidden (`torch.Tensor` of shape `(candidates, len(STATES), hidden_size)`): The target's hidden states
                before and after each candidate, above `info.layer` of its layers.

        Returns:
            `torch.FloatTensor` of shape `(candidates,)`: log-odds that accepting the candidate changes the meaning.
        """
        with torch.autocast(hidden.device.type, enabled=False):  # fp32, also where the target runs in less
            scalars = (scalars[:, self.columns].float() - self.scalar_mean) / self.scalar_scale
            centred = hidden[:, self.sides].float() - self.hidden_mean
            components = torch.einsum("nsh,shc->nsc", centred, self.projection)
            return self.head(torch.cat([scalars, components.flatten(1)], dim=-1)).squeeze(-1)

    # -- which target it belongs to --------------------------------------------------------------------------------

    def check_target(self, target: PreTrainedModel, allow_other_weights: bool = False) -> None:
        """
        Warns of other weights of the same id (another revision or precision, a quantised copy).

        Raises:
            ValueError: If the judge was made for another target; says which of id, hidden size, vocabulary and
                fingerprint differs. With `allow_other_weights`, id and fingerprint may.
        """
        config, info = target.config.get_text_config(), self.info
        sizes = {
            "hidden size": (info.hidden_size, config.hidden_size),
            "vocabulary": (info.vocab_size, config.vocab_size),
        }
        weights = {
            "id": (info.target, public_name(target.config.name_or_path)),
            "fingerprint": (info.target_fingerprint, fingerprint(target)),
        }
        different = {name: pair for name, pair in sizes.items() if pair[0] != pair[1]}
        other = {name: pair for name, pair in weights.items() if pair[0] != pair[1]}
        # A folder is not an id: the same model may lie anywhere, and another one too. Its fingerprint tells.
        same_id = "id" not in other and is_hub_id(info.target)
        if "fingerprint" in other and not allow_other_weights and not same_id:
            different |= other
        if not different:
            if "fingerprint" in other:
                logger.warning_once(
                    f"The judge was made on other weights of {info.target} than those of `target`: on "
                    f"{described(info.target_fingerprint) or info.target_fingerprint}. How well it does here was not "
                    "measured."
                )
            return
        found = "; ".join(f"{name}: judge {made!r}, target {given!r}" for name, (made, given) in different.items())
        advice = f"Load {info.target}, or a judge made for this target."
        if not different.keys() & sizes.keys():
            advice += " Same model in another precision, or a light fine-tune? Pass `allow_other_weights=True`."
        raise ValueError(f"`judge` was made for another target. What differs: {found}. {advice}")

    # -- files -----------------------------------------------------------------------------------------------------

    def configs(self) -> dict[str, dict]:
        """Content of its JSON files: of `config.json`, and of `adapter_config.json` if it has an adapter."""
        found = {CONFIG: asdict(self.info)}
        if self.adapter is not None:  # PEFT notes the path that the target was loaded from
            found[ADAPTER_CONFIG] = self.adapter.config | {"base_model_name_or_path": self.info.target}
        return found

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """
        Write `config.json` and `model.safetensors`, and an adapter as PEFT does, each under a temporary name first.

        Raises:
            OSError: If `folder` cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # All is written before any of it is renamed.
        with atomic_write(folder / CONFIG) as config, atomic_write(folder / WEIGHTS) as weights:
            write_json(config, self.configs()[CONFIG])
            save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, weights)
            if self.adapter is not None:
                with (
                    atomic_write(folder / ADAPTER_CONFIG) as adapter_config,
                    atomic_write(folder / ADAPTER) as adapter,
                ):
                    write_json(adapter_config, self.configs()[ADAPTER_CONFIG])
                    save_file(self.adapter.tensors, adapter)

    def push_to_hub(self, repo_id: str, **how) -> CommitInfo:
        """
        Publish the judge with its card, in one commit.

        Args:
            repo_id (`str`): Where to; made if it is not there.
            how: `token`, `private`, `revision`, `create_pr`, `tag` of [`upload`].

        Raises:
            HubError: If it was refused or interrupted; the repo is as it was.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            if measured := self.info.training.get("held_out"):
                plot_reliability(measured["reliability"], Path(folder) / "reliability.png")
            return upload(repo_id, published(folder, self, repo_id), "Upload judge", **how)

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
        Load a judge from a folder or a Hub repo. Reads safetensors only, never a pickle.

        Raises:
            FileNotFoundError: If `config.json` or `model.safetensors` is missing.
            ValueError: If one of them is damaged or larger than it can be, or its content is not a judge of this
                version. Names, shapes and types are looked at before anything is read.
            HubError: If the Hub could not be reached.
        """

        where = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}

        def fetch(name: str, limit: int, revision: str | None) -> Path:
            try:
                return download(reference, name, limit, revision=revision, **where)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"`judge`: {error} A judge is a folder or Hub repo with {CONFIG} and {WEIGHTS}, as "
                    "`Judge.save_pretrained` writes them; other weight formats are not loaded."
                ) from error
            except ValueError as error:
                raise ValueError(f"`judge`: {error}") from error

        config = fetch(CONFIG, CONFIG_LIMIT, revision)
        if not Path(reference).is_dir():
            revision = config.parent.name  # the commit: all files are of one
        info = _read_info(config)
        with torch.device("meta"):  # nothing is allocated before the weights are known to be there
            judge = cls(info)
        expected = {name: tuple(tensor.shape) for name, tensor in judge.state_dict().items()}
        size = sum(4 * math.prod(shape) for shape in expected.values())
        judge.load_state_dict(_read_tensors(fetch(WEIGHTS, size + HEADER_LIMIT, revision), expected), assign=True)
        if judge.info.adapter:
            settings = _read_json(fetch(ADAPTER_CONFIG, CONFIG_LIMIT, revision))
            judge.adapter = Adapter(settings, _read_tensors(fetch(ADAPTER, ADAPTER_LIMIT, revision)))
        return judge.eval()


def _read_tensors(path: Path, expected: dict[str, tuple[int, ...]] | None = None) -> dict[str, torch.Tensor]:
    """
    Content of a safetensors file. Names, shapes and types are looked at before anything is read.

    Args:
        expected (`dict[str, tuple[int, ...]]`, *optional*): What must be in it, in fp32.
    """
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            shapes = {name: tuple(part.get_shape()) for name, part in found.items()}
            types = {part.get_dtype() for part in found.values()}
            if expected is not None and shapes != expected:
                wrong = sorted(name for name in shapes.keys() | expected if shapes.get(name) != expected.get(name))[0]
                raise ValueError(
                    f"`judge`: {path} does not fit {CONFIG} ({wrong}: {expected.get(wrong)} by the config, "
                    f"{shapes.get(wrong)} there). Fetch both again."
                )
            if types - ({"F32"} if expected is not None else {"F32", "F16", "BF16"}):
                raise ValueError(
                    f"`judge`: {path} holds numbers of type {', '.join(sorted(types))}; fp32 is expected."
                )
            # Copies: where a file is mapped into memory, sums may be rounded otherwise.
            tensors = {name: file.get_tensor(name).clone() for name in found}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"`judge`: {path} is not a whole safetensors file ({error}). It is truncated, or of another format (a "
            "pickle is never loaded). Fetch it again."
        ) from error
    if broken := sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all()):
        raise ValueError(f"`judge`: {path} holds numbers that are none ({broken[0]}). Fetch it again.")
    return tensors


def _read_json(path: Path) -> dict:
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"`judge`: {path} is not the config of a judge ({error}).") from error


def _read_info(path: Path) -> JudgeInfo:
    content = _read_json(path)
    try:
        if unknown := content.keys() - {f.name for f in fields(JudgeInfo)}:
            raise ValueError(f"this version of hf_selfjudge does not know {', '.join(sorted(unknown))}")
        info = JudgeInfo(**content)
        _check_info(info)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"`judge`: {path} is not the config of a judge ({error}).") from error
    for name, known in (("scalars", SCALARS), ("states", STATES)):
        if unknown := set(getattr(info, name)) - set(known):
            raise ValueError(
                f"`judge`: {path} names the {name} {sorted(unknown)}, this version of hf_selfjudge computes "
                f"{list(known)}. Install the version that the judge was made with, or train it again."
            )
    return info
