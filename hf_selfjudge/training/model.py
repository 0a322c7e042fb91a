"""What is trained: a new judge for the models that labels are of, alone or on its target, with an adapter in the
target's last layers."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from torch.utils.data import StackDataset
from transformers import PreTrainedModel

from ..judge.features import AFTER, BEFORE
from ..judge.info import JudgeInfo
from ..judge.judge import Judge
from ..judge.lora import Adapter
from ..judge.threshold import Threshold
from ..mining.layers import StateReader
from ..models.cpu import HalfLinear
from ..utils.names import public_mining
from .config import JudgeConfig


UNCHOSEN = Threshold(0.5)  # until one is chosen on held-out prompts


def new_judge(mining: Mapping, args: JudgeConfig) -> Judge:
    """A judge that is not trained yet, for labels that were mined as `mining` says ([`mining_of`]). Without
    `args.states` it uses the `states` that are named there, or else those before and after a candidate."""
    mining = public_mining(mining)
    names = ("target", "target_fingerprint", "hidden_size", "vocab_size", "draft", "special_tokens", "layer")
    chosen = {
        "scalars": args.scalars,
        "states": mining.get("states", [BEFORE, AFTER]) if args.states is None else args.states,
        "components": min(args.components, mining["hidden_size"]),
    }
    return Judge(JudgeInfo(**{name: mining[name] for name in names}, **chosen, threshold=UNCHOSEN))


@torch.no_grad()
def fit_projection(judge: Judge, rows: StackDataset, seed: int) -> None:
    """
    Set a judge's normalisation, and its projection to whitened principal components of each hidden state, from the
    [`features`] that it will be trained on. `seed` is that of the randomised decomposition.

    Raises:
        ValueError: If there are fewer rows than components.
    """
    components, scalars, hidden = judge.info.components, rows.datasets["scalars"], rows.datasets["hidden"]
    if judge.sides and len(rows) < components:
        raise ValueError(
            f"`components` is {components}, but there are {len(rows)} labels only. Mine more or lower it."
        )
    if judge.columns:
        scaler = StandardScaler().fit(scalars[:, judge.columns].numpy())
        judge.scalar_mean.copy_(torch.from_numpy(scaler.mean_))
        judge.scalar_scale.copy_(torch.from_numpy(scaler.scale_))
    for side, state in enumerate(judge.sides):
        states = hidden[:, state].float().numpy()
        # Each dimension is scaled first: a few of the target's dimensions are a hundred times the others.
        scaler = StandardScaler().fit(states)
        pca = PCA(components, whiten=True, svd_solver="randomized", random_state=seed)
        pca.fit(scaler.transform(states))
        # The normalised states have mean 0, so the components' own centre is 0 as well.
        # Rows of the same place share a state: some components may have next to no variance.
        variance = np.maximum(pca.explained_variance_, 1e-4 * max(1, pca.explained_variance_[0]))
        matrix = pca.components_.T / np.sqrt(variance) / scaler.scale_[:, None]
        judge.hidden_mean[side] = torch.from_numpy(scaler.mean_)
        judge.projection[side] = torch.from_numpy(matrix)


class TargetWithJudge(torch.nn.Module):
    """
    A target with a judge on it. The target computes the hidden states; its own weights are not trained.

    Raises:
        ValueError: If the target's attention cannot take the mask of substitutes ([`packs`]), its weights are packed
            so that no gradient passes them, it is on several devices, the judge is for another target, or a judge of
            an earlier layer meets an adapter.
    """

    def __init__(self, target: PreTrainedModel | PeftModel, judge: Judge):
        super().__init__()
        self.target, self.judge = target, judge
        if len(places := {str(weight.device) for weight in target.parameters()}) > 1:
            raise ValueError(
                f"`model`: the target is on several devices ({', '.join(sorted(places))}), where it cannot be "
                "trained. Load it without `device_map`."
            )
        base = target.get_base_model() if self.has_adapter else target
        if any(isinstance(module, HalfLinear) for module in base.modules()):
            raise ValueError(
                "`model`: no gradient passes through packed half-precision weights. Load the target in another type: "
                "`load_model(name, torch.bfloat16)`."
            )
        if not self.has_adapter:
            judge.check_target(target)  # not below an adapter: PEFT renames the weights
            target.requires_grad_(False)
        elif judge.info.layer is not None:
            raise ValueError(
                f"`judge` looks at what enters layer {judge.info.layer}, but an adapter changes the last hidden "
                "states. Train it on labels with the last hidden states."
            )
        self.reader = StateReader(base, judge.info.layer)

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is in the target."""
        return isinstance(self.target, PeftModel)

    def forward(self, scalars: torch.Tensor, places: torch.LongTensor, **text: torch.Tensor) -> torch.Tensor:
        """
        Args:
            scalars (`torch.Tensor` of shape `(batch, substitutes, len(SCALARS))`): Of the target without an adapter.
            places (`torch.LongTensor` of shape `(batch, substitutes)`): Which tokens are replaced.
            text: `input_ids` and `ends` of [`StateReader.forward`].

        Returns:
            `torch.FloatTensor` of shape `(batch, substitutes)`: log-odds that the meaning changes.
        """
        states = self.reader(places=places, **text)
        return self.judge(scalars.flatten(0, 1), states.flatten(0, 1)).view(places.shape)

    def activation_checkpointing_enable(self, *args, **kwargs) -> None:
        """Like that of [`~transformers.PreTrainedModel`]. Without an adapter no activation of the target is kept."""
        if self.has_adapter:
            self.target.get_base_model().activation_checkpointing_enable(*args, **kwargs)


def add_adapter(model: Judge | TargetWithJudge, peft_config: PeftConfig) -> TargetWithJudge:
    """
    Put a new adapter into the target below a judge.

    Raises:
        TypeError: If `peft_config` is not one.
        ValueError: If `model` has no target or an adapter already, or decoding could not use such an adapter.
    """
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"`peft_config` must be a `peft.PeftConfig`, got `{type(peft_config).__name__}`.")
    if isinstance(model, Judge):
        raise ValueError("`peft_config` needs a target to put the adapter into. Pass the target as `model`.")
    if model.has_adapter:
        raise ValueError("`model` has an adapter already. Unload it, or leave out `peft_config`.")
    adapted = get_peft_model(model.target, peft_config)
    adapter_of(adapted)  # refuse now what decoding could not use
    return TargetWithJudge(adapted, model.judge)


def adapter_of(model: PeftModel) -> Adapter:
    """
    The adapter of a model, as PEFT would save it.

    Raises:
        ValueError: If it is not a plain LoRA in numbered layers: others cannot be replayed.
    """
    config = json.loads(json.dumps(model.peft_config["default"].to_dict(), default=sorted)) | {"inference_mode": True}
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return Adapter(config, {name: value.detach().cpu().contiguous() for name, value in tensors.items()})
