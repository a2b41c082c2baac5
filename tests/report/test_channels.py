"""Channels that are important together, as points in a plane."""

import numpy as np

from quant_experts.report.channels import embed


def test_channels_of_a_cluster_lie_together() -> None:
    clusters = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    similarity = [
        [100 if i == j else 60 if a == b else 3 for j, b in enumerate(clusters)] for i, a in enumerate(clusters)
    ]
    points = np.array(embed(similarity))
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    same = np.equal.outer(clusters, clusters)
    assert distance[same].max() < 0.1 * distance[~same].min()
    assert embed(similarity) == [tuple(point) for point in points]


def test_a_channel_that_is_never_similar_does_no_harm() -> None:
    assert np.isfinite(embed([[100, 50, 0, 0], [50, 100, 0, 0], [0, 0, 100, 0], [0, 0, 0, 0]])).all()
