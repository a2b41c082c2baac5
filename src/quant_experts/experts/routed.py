"""Routed experts (paper step 4): channels that are important together form a cluster, each cluster gets a
correction."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from sklearn.cluster import SpectralClustering
from threadpoolctl import threadpool_limits
from torch import Tensor

from quant_experts.artifacts import Event, GroupStatistics, RoutedExperts
from quant_experts.experts.low_rank import fit_low_rank

BACKGROUND = 0.1
"""Weight of channels outside an expert's cluster, as a share of their RMS. Ours: the paper says only "weighted SVD"."""


def co_importance(statistics: GroupStatistics, channels: Tensor) -> Tensor:
    """Normalised pointwise mutual information of each pair of channels being important for one token (paper step 4).

    channels (C,) -> (C, C) float64 in [0, 1]: log(p_ij / (p_i p_j)) / -log p_ij. Ours: negative and undefined values
    are 0, the diagonal 1; pairs that are important for every token (p_ij = 1, where the formula divides by zero) are 1.
    """
    position = torch.full((len(statistics.mean_abs),), -1, dtype=torch.long)
    position[channels] = torch.arange(len(channels))
    columns = position[statistics.important.long()]
    rows = torch.arange(len(columns))[:, None].expand_as(columns)
    inside = columns >= 0
    occurs = torch.zeros(len(columns), len(channels), dtype=torch.float32)
    occurs[rows[inside], columns[inside]] = 1
    joint = (occurs.T @ occurs).double() / max(1, len(occurs))
    single = joint.diagonal().clone()
    similarity = torch.log(joint / (single[:, None] * single[None, :])) / -torch.log(joint)
    similarity = torch.where(joint >= 1, torch.ones_like(similarity), similarity)
    similarity = torch.where(similarity.isfinite(), similarity, torch.zeros_like(similarity)).clamp_(0, 1)
    similarity.fill_diagonal_(1)
    return similarity


def cluster_channels(similarity: Tensor, clusters: int, *, seed: int, where: str) -> tuple[Tensor, list[Event]]:
    """Spectral clustering of (C, C) similarities -> labels (C,) int64 and events for what scikit-learn warned about,
    but for a graph that falls apart: channels that no token joins belong to different experts.

    One thread, because sums that are taken in another order can move a channel that lies between two clusters.
    """
    if clusters == 1:
        return torch.zeros(len(similarity), dtype=torch.long), []
    with warnings.catch_warnings(record=True) as caught, threadpool_limits(1):
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message="Graph is not fully connected")
        model = SpectralClustering(
            clusters, affinity="precomputed", assign_labels="kmeans", random_state=seed, n_init=10
        )
        labels = model.fit_predict(similarity.numpy())
    events = [Event(where, f"spectral clustering: {str(w.message).splitlines()[0]}") for w in caught]
    return torch.from_numpy(np.asarray(labels, dtype=np.int64)), events


def random_clusters(channels: int, clusters: int, *, seed: int) -> Tensor:
    """Labels (channels,) int64 of clusters of equal size, drawn at random: a control."""
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(seed))
    return order % clusters


def fit_routed_experts(
    residual: Tensor, rms: Tensor, channels: Tensor, labels: Tensor, experts: int, rank: int, *, seed: int
) -> RoutedExperts:
    """One weighted SVD of the residual (N, K) for each cluster.

    rms (K,): root mean square of each input channel after smoothing. Ours: the weight of a channel is its RMS in the
    expert's cluster and `BACKGROUND` of it elsewhere.
    """
    fitted = []
    for e in range(experts):
        weight = rms.double() * BACKGROUND
        members = channels[labels == e].to(rms.device)
        weight[members] = rms[members].double()
        fitted.append(fit_low_rank(residual, weight.square(), rank, seed=seed + e))
    return RoutedExperts(torch.stack([f.up for f in fitted]), torch.stack([f.down for f in fitted]))
