"""The figures of a record, against the definition written out in float64."""

import pytest
import torch
from torch import Tensor

from quant_experts.artifacts import (
    ChannelClusters,
    GroupStatistics,
    LowRankExpert,
    Modality,
    QuantizedGroup,
    RoutedExperts,
    Router,
)
from quant_experts.calibration.measurement import POSITION_BINS, measure_group
from quant_experts.config import Scheme
from quant_experts.quantizers.grids import dequantize
from quant_experts.quantizers.rtn import quantize_rtn

K, ROWS, RANK, EXPERTS = 40, (6, 10), 2, 3


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics(x: Tensor, modality: Tensor) -> GroupStatistics:
    important = x.abs().topk(4, dim=1).indices.int()
    moment, magnitude = (x.T @ x).double() / len(x), x.abs().double()
    position = torch.arange(len(x)) / len(x)
    position[::10] = torch.nan
    return GroupStatistics(
        mean_abs=magnitude.mean(0),
        second_moment=moment,
        important=important,
        modality=modality,
        reservoir=x,
        reservoir_modality=modality,
        absmax=magnitude.amax(0),
        max_mean_abs=magnitude.mean(0),
        reservoir_position=position,
        fit_tokens=x[::2],
    )


@pytest.mark.parametrize("text", ["W4A8", "W3A16g16"])
def test_errors_use_and_curves_are_their_definitions(text: str) -> None:
    scheme = Scheme.parse(text)
    weight, x = draw(sum(ROWS), K, seed=0), draw(90, K, seed=1)
    modality = torch.tensor([Modality.TEXT, Modality.IMAGE, Modality.IMAGE] * 30, dtype=torch.int8)
    parts = tuple(quantize_rtn(w, scheme) for w in weight.split(ROWS))
    up, down = draw(sum(ROWS), RANK, seed=2).half().float(), draw(RANK, K, seed=3).half().float()
    routed_up = (draw(EXPERTS, sum(ROWS), RANK, seed=4) * 0.1).half().float()
    routed_down = draw(EXPERTS, RANK, K, seed=5).half().float()
    similarity, labels = draw(5, 5, seed=7).double().abs().clamp(0, 1), torch.tensor([2, 0, 1, 0, 2])
    router = draw(EXPERTS, K, seed=6).abs().half().float()
    group = QuantizedGroup(
        ("a.q", "a.k"),
        parts,
        shared=LowRankExpert(up * 0.01, down),
        routed=RoutedExperts(routed_up, routed_down),
        router=Router(router, torch.zeros(EXPERTS)),
        clusters=ChannelClusters(similarity, labels),
    )
    plain = QuantizedGroup(("a.q", "a.k"), parts)
    record = measure_group(group, plain, weight, ROWS, statistics(x, modality), scheme, "layers.3")

    base = torch.cat([dequantize(part) for part in parts]).double()
    seen = x.double()
    if not scheme.weight_only:
        scale = x.abs().amax(1, keepdim=True) / 127
        seen = ((x / scale).round() * scale).double()
    chosen = (router.double() @ x.abs().double().T).argmin(0)
    rebuilt = seen @ base.T + x.double() @ down.double().T @ (up * 0.01).half().double().T
    for t, e in enumerate(chosen.tolist()):
        rebuilt[t] += routed_up[e].double() @ (routed_down[e].double() @ x[t].double())
    exact = x.double() @ weight.double().T

    def relative(output: Tensor, rows: Tensor) -> float:
        return float((output - exact)[rows].square().sum() / exact[rows].square().sum())

    assert record.calibration_error == pytest.approx(relative(rebuilt, torch.arange(0, 90, 2)), rel=1e-4)

    for name, rows in {"all": modality >= 0, "text": modality == 0, "image": modality == 1}.items():
        assert record.error[name] == pytest.approx(relative(rebuilt, rows), rel=1e-3), name
        assert record.rtn_error[name] == pytest.approx(relative(seen @ base.T, rows), rel=1e-3), name
        use = [float((chosen[rows] == e).float().mean()) for e in range(EXPERTS)]
        assert record.expert_use[name] == pytest.approx(use, abs=1e-6)
        if name != "all":
            counts = [[0] * POSITION_BINS for _ in range(EXPERTS)]
            for t in rows.nonzero()[:, 0].tolist():
                if t % 10:  # the others' positions are not known
                    counts[chosen[t]][t * POSITION_BINS // 90] += 1
            assert record.expert_positions[name] == counts
    assert record.expert_positions.keys() == {"text", "image"}
    best = seen @ base.T + x.double() @ down.double().T @ (up * 0.01).half().double().T
    tried = [best + x.double() @ d.double().T @ u.double().T for u, d in zip(routed_up, routed_down, strict=True)]
    least = torch.stack([(output - exact).square().sum(1) for output in tried]).amin(0)
    assert record.oracle_error["all"] == pytest.approx(float(least.sum() / exact.square().sum()), rel=1e-3)
    assert record.oracle_error["image"] <= record.error["image"]
    often = torch.zeros(K)
    for row in x.abs().topk(4, dim=1).indices:
        often[row] += 1
    assert record.channel_frequency["all"] == pytest.approx(
        (often.sort(descending=True).values / 90).tolist(), abs=1e-6
    )
    assert record.linears == ("layers.3.a.q", "layers.3.a.k") and record.shape == (16, K)
    order = often.argsort(descending=True, stable=True).tolist()
    shown = record.important_tokens["text"]
    assert len(shown) == 30 and record.important_tokens.keys() == {"text", "image"}
    assert {order[place] for place in shown[1]} == set(x[3].abs().topk(4).indices.tolist())
    assert record.base_flops == 2 * 16 * K and record.repair_flops > 0 and record.token_bytes > 0
    sorted_by_cluster = [1, 3, 2, 0, 4]
    assert record.clusters == [0, 0, 1, 2, 2]
    assert record.similarity == [
        [round(100 * float(similarity[i, j])) for j in sorted_by_cluster] for i in sorted_by_cluster
    ]
    assert record.weights == 16 * K and record.tokens == 90 and "answer" not in record.error
