"""Co-importance, clusters and weighted corrections (paper, step 4), against loops and planted answers."""

import math
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import SpectralClustering
from sklearn.exceptions import ConvergenceWarning

from quant_experts.artifacts import Event, GroupStatistics
from quant_experts.errors import QuantExpertsError
from quant_experts.experts.routed import BACKGROUND, cluster_channels, co_importance, fit_routed_experts


def statistics(important: list[list[int]], width: int) -> GroupStatistics:
    """Tokens with the given important channels."""
    empty = torch.empty(0)
    rows = torch.tensor(important, dtype=torch.int32)
    return GroupStatistics(torch.zeros(width, dtype=torch.float64), empty, rows, empty, empty, empty, empty, empty)


def naive_npmi(important: list[list[int]], channels: list[int]) -> list[list[float]]:
    """S_ij = log(p_ij / (p_i p_j)) / -log p_ij; negative and undefined 0, always together 1, diagonal 1."""
    tokens = [set(row) for row in important]

    def share(*wanted: int) -> float:
        return sum(all(c in row for c in wanted) for row in tokens) / len(tokens)

    def similarity(i: int, j: int) -> float:
        both = share(i, j)
        if i == j or both == 1:
            return 1.0
        if both == 0:
            return 0.0
        return max(0.0, math.log(both / (share(i) * share(j))) / -math.log(both))

    return [[similarity(i, j) for j in channels] for i in channels]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("tokens", "width", "k"), [(40, 12, 3), (200, 9, 4), (3, 10, 5), (1, 6, 2)])
def test_co_importance_equals_a_loop(tokens: int, width: int, k: int, seed: int) -> None:
    drawn = random.Random(seed)
    important = [drawn.sample(range(width), k) for _ in range(tokens)]
    channels = drawn.sample(range(width), 6)
    found = co_importance(statistics(important, width), torch.tensor(channels))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), naive_npmi(important, channels), rtol=1e-9, atol=1e-9)
    assert torch.equal(found, found.T) and found.min() >= 0 and found.max() <= 1


def test_co_importance_of_known_pairs() -> None:
    """0 and 1 in every token; 2, 3 and 4 always together; 5 never with 4; 6 and 7 never."""
    important = [[0, 1, 2, 3, 4]] * 3 + [[0, 1, 8, 9, 5]] * 3
    found = co_importance(statistics(important, 10), torch.arange(8))
    expected = torch.eye(8, dtype=torch.float64)
    for i, j in ((0, 1), (2, 3), (2, 4), (3, 4)):
        expected[i, j] = expected[j, i] = 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def planted(blocks: list[list[int]], tokens: int, noise: float, seed: int = 0) -> list[list[int]]:
    """Each token has 4 important channels of one block, now and then one of another."""
    drawn = random.Random(seed)
    everything = [c for block in blocks for c in block]
    rows = []
    for _ in range(tokens):
        row = drawn.sample(drawn.choice(blocks), 4)
        if drawn.random() < noise:
            row[0] = drawn.choice([c for c in everything if c not in row])
        rows.append(row)
    return rows


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("sizes", [(6, 6), (5, 9, 7), (8, 8, 8, 8, 8)])
def test_planted_blocks_are_recovered(sizes: tuple[int, ...], noise: float) -> None:
    shuffled = random.Random(1).sample(range(50), sum(sizes))
    blocks, start = [], 0
    for size in sizes:
        blocks.append(shuffled[start : start + size])
        start += size
    channels = sorted(shuffled)
    similarity = co_importance(statistics(planted(blocks, 400, noise), 50), torch.tensor(channels))
    labels, _ = cluster_channels(similarity, len(sizes), seed=0, where="here")
    assert labels.dtype == torch.int64 and labels.shape == (len(channels),)
    found = [[c for c, label in zip(channels, labels.tolist(), strict=True) if label == e] for e in range(len(sizes))]
    assert sorted(found) == sorted(map(sorted, blocks))


def test_clusters_repeat_under_a_seed() -> None:
    noise = torch.rand(40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    similarity = ((noise + noise.T) / 2).fill_diagonal_(1)
    before = similarity.clone()
    runs = []
    for other in range(3):
        np.random.seed(other)
        torch.manual_seed(other)
        runs.append(cluster_channels(similarity, 5, seed=3, where="here")[0])
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    assert torch.equal(similarity, before)
    assert set(runs[0].tolist()) == set(range(5))


def test_what_the_clustering_warned_of_becomes_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = SpectralClustering.fit_predict

    def warn(self: SpectralClustering, similarity: Any) -> Any:
        warnings.warn("few points\nof many", ConvergenceWarning, stacklevel=1)
        return fit(self, similarity)

    monkeypatch.setattr(SpectralClustering, "fit_predict", warn)
    connected = torch.full((12, 12), 0.5, dtype=torch.float64).fill_diagonal_(1)
    connected[:6, :6] += 0.4
    assert cluster_channels(connected, 2, seed=0, where="block.7")[1] == [
        Event("block.7", "spectral clustering: few points")
    ]


def test_channels_that_no_token_joins_are_nothing_to_note() -> None:
    """The graph falls apart, which scikit-learn warns of, and its parts are the clusters."""
    apart = torch.block_diag(*[torch.ones(4, 4, dtype=torch.float64)] * 3)
    labels, events = cluster_channels(apart, 3, seed=0, where="block.7")
    assert events == []
    assert (
        sorted(labels.view(3, 4)[:, 0].tolist()) == [0, 1, 2] and (labels.view(3, 4) == labels.view(3, 4)[:, :1]).all()
    )


@pytest.mark.parametrize("channels", [1, 2, 8])
def test_every_channel_can_be_its_own_cluster(channels: int) -> None:
    """A narrow layer: as many experts as token-dependent channels (the pipeline caps them so)."""
    similarity = torch.eye(channels, dtype=torch.float64) * 0.9 + 0.1
    labels, _ = cluster_channels(similarity, channels, seed=0, where="here")
    assert sorted(labels.tolist()) == list(range(channels))


def test_one_expert_takes_every_channel() -> None:
    similarity = torch.eye(7, dtype=torch.float64) * 0.9 + 0.1
    assert cluster_channels(similarity, 1, seed=0, where="here")[0].tolist() == [0] * 7


@pytest.mark.parametrize("shape", [(10, 20), (20, 10)])
def test_each_expert_is_the_best_for_its_weighted_channels(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(shape, generator=generator, dtype=torch.float64)
    rms = torch.rand(shape[1], generator=generator, dtype=torch.float64) + 0.1
    channels, labels = torch.tensor([1, 4, 6, 2, 9]), torch.tensor([0, 2, 0, 2, 2])  # expert 1 has no channel
    found = fit_routed_experts(residual, rms, channels, labels, 3, 2, seed=0)
    assert found.up.shape == (3, shape[0], 2) and found.down.shape == (3, 2, shape[1])
    for e, members in enumerate(([1, 6], [], [4, 2, 9])):
        weight = torch.tensor([v if c in members else BACKGROUND * v for c, v in enumerate(rms.tolist())]).double()
        left = float(((residual - found.up[e] @ found.down[e]) * weight).square().sum())
        best = float(torch.linalg.svdvals(residual * weight)[2:].square().sum())
        assert left == pytest.approx(best, rel=1e-9)


def test_an_experts_rank_beyond_the_layer_is_refused() -> None:
    with pytest.raises(QuantExpertsError, match="Rank 5"):
        fit_routed_experts(torch.ones(4, 9), torch.ones(9), torch.tensor([0]), torch.tensor([0]), 1, 5, seed=0)
