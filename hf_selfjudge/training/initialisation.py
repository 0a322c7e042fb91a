"""A judge before its first training step: made for the models that its labels are of, with a normalisation and
principal components fitted to them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from ..judge.info import JudgeInfo
from ..judge.judge import Judge
from ..judge.threshold import Threshold
from ..utils.names import public_mining
from .config import JudgeConfig
from .data import Substitutions


UNCHOSEN = Threshold(0.5)  # until one is chosen on held-out prompts


def new_judge(mining: Mapping, args: JudgeConfig) -> Judge:
    """
    Make a judge that is not trained yet.

    Args:
        mining (`Mapping`): How its labels were mined, see [`mining_of`].
        args ([`JudgeConfig`]): Which features it uses, and how many components of them.
    """
    mining = public_mining(mining)
    names = ("target", "target_fingerprint", "hidden_size", "vocab_size", "draft", "special_tokens")
    return Judge(
        JudgeInfo(
            **{name: mining[name] for name in names},
            layer=mining.get("layer"),
            threshold=UNCHOSEN,
            components=min(args.components, mining["hidden_size"]),
            scalars=args.scalars,
            states=args.states,
        )
    )


def fit_projection(judge: Judge, rows: Substitutions, seed: int) -> None:
    """
    Set a judge's normalisation, and its projection to whitened principal components of each hidden state.

    Args:
        judge ([`Judge`]): Changed in place.
        rows ([`Substitutions`]): What it will be trained on.
        seed (`int`): Seed of the randomised decomposition.

    Raises:
        ValueError: If there are fewer rows than components.
    """
    components = judge.info.components
    if judge.sides and len(rows) < components:
        raise ValueError(
            f"`components` is {components}, but there are {len(rows)} labels only. Mine more or lower it."
        )
    with torch.no_grad():
        if judge.columns:
            scaler = StandardScaler().fit(rows.scalars[:, judge.columns].numpy())
            judge.scalar_mean.copy_(torch.from_numpy(scaler.mean_))
            judge.scalar_scale.copy_(torch.from_numpy(scaler.scale_))
        for side, state in enumerate(judge.sides):
            states = rows.hidden[:, state].float().numpy()
            # Each dimension is scaled first: a handful of the target's dimensions are a hundred times the others.
            scaler = StandardScaler().fit(states)
            pca = PCA(components, whiten=True, svd_solver="randomized", random_state=seed)
            pca.fit(scaler.transform(states))
            # The normalised states have mean 0, so the components' own centre is 0 as well.
            # Rows of the same place share a state: some components may have next to no variance.
            variance = np.maximum(pca.explained_variance_, 1e-4 * max(1, pca.explained_variance_[0]))
            matrix = pca.components_.T / np.sqrt(variance) / scaler.scale_[:, None]
            judge.hidden_mean[side] = torch.from_numpy(scaler.mean_)
            judge.projection[side] = torch.from_numpy(matrix)
