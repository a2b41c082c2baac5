"""The best low-rank stand-in for an error matrix, seen through the input's second moments.

For an error E (N, K) and inputs with second moment H = E[x x^T], the rank-r matrix L that minimises the mean of |(E -
L) x|^2 is `U U^T E`, where U holds the leading eigenvectors of `E H E^T`. This is the whitened SVD of the literature
(SVD of E S with S S^T = H, then times S^-1; ASER, QERA) without S: no Cholesky factor that fails on a singular H, no
inverse. Ours as a formulation; docs/math.md has the proof. A vector H stands for a diagonal matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_experts.artifacts import LowRankExpert
from quant_experts.errors import QuantExpertsError

EXACT_WIDTH = 512
"""Up to this size of the smaller side the eigenvectors are computed exactly; above it in a block Krylov space."""
OVERSAMPLING = 16
KRYLOV_STEPS = 5


def fit_low_rank(error: Tensor, moment: Tensor, rank: int, *, seed: int = 0) -> LowRankExpert:
    """error (N, K), moment (K, K) symmetric positive semi-definite or (K,) non-negative diagonal -> rank-r expert,
    float64.

    Factors are balanced: column i of `up` and row i of `down` have the same length, so that both fit half precision.
    Raises `QuantExpertsError` if the rank is larger than the layer.
    """
    rows, columns = error.shape
    if rank > min(rows, columns):
        raise QuantExpertsError(
            f"Rank {rank} is larger than a layer of {rows} x {columns}: choose a smaller rank, or ranks that scale "
            f"with the width."
        )
    error, moment = error.double(), moment.double()
    basis = leading_directions(error, moment, rank, seed=seed)
    down = basis.T @ error
    length = torch.linalg.vector_norm(down, dim=1).sqrt()
    safe = torch.where(length > 0, length, torch.ones_like(length))
    return LowRankExpert(up=basis * length, down=down / safe[:, None])


def leading_directions(error: Tensor, moment: Tensor, rank: int, *, seed: int) -> Tensor:
    """Orthonormal (N, rank) basis of the leading eigenvectors of error @ moment @ error^T; float64 in, float64 out."""
    rows, columns = error.shape
    if min(rows, columns) > max(EXACT_WIDTH, (rank + OVERSAMPLING) * (KRYLOV_STEPS + 1)):
        return _block_krylov(error, moment, rank, seed)
    if rows <= columns:
        vectors: Tensor = torch.linalg.eigh(error @ _times(moment, error.T)).eigenvectors
        return _last(vectors, rank)
    # The smaller side is K: eigenvectors of S^T E^T E S, brought to the output side by E S, with S a root of the
    # moment.
    root = _square_root(moment)
    product = error @ root if root.ndim == 2 else error * root
    right = _last(torch.linalg.eigh(product.T @ product).eigenvectors, rank)
    directions: Tensor = torch.linalg.qr(product @ right).Q
    return directions


def _block_krylov(error: Tensor, moment: Tensor, rank: int, seed: int) -> Tensor:
    """Randomised block Krylov iteration (Musco and Musco 2015) on error @ moment @ error^T, which is never formed.

    The space spanned by all powers, not only the last one as in subspace iteration, finds slowly decaying spectra
    (rounding errors have them) in a few products.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(len(error), rank + OVERSAMPLING, generator=generator, dtype=torch.float64)
    block = torch.linalg.qr(start.to(error.device)).Q
    basis = block
    for _ in range(KRYLOV_STEPS):
        block = error @ _times(moment, error.T @ block)
        block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
        basis = torch.cat([basis, block], dim=1)
    # Where the error's rank is used up, QR fills blocks with directions that may lie within earlier ones.
    basis = torch.linalg.qr(basis).Q
    small = basis.T @ error
    directions: Tensor = basis @ _last(torch.linalg.eigh(small @ _times(moment, small.T)).eigenvectors, rank)
    return directions


def _last(vectors: Tensor, count: int) -> Tensor:
    """The eigenvectors of the `count` largest eigenvalues, largest first; `eigh` sorts ascending."""
    return vectors[:, vectors.shape[1] - count :].flip(1)


def _times(moment: Tensor, matrix: Tensor) -> Tensor:
    """moment @ matrix, for a full or a diagonal moment."""
    return moment @ matrix if moment.ndim == 2 else moment[:, None] * matrix


def _square_root(moment: Tensor) -> Tensor:
    """S with S S^T = moment; eigenvalues that rounding made negative count as zero."""
    if moment.ndim == 1:
        return moment.clamp_min(0).sqrt()
    values, vectors = torch.linalg.eigh(moment)
    root: Tensor = vectors * values.clamp_min(0).sqrt()
    return root
