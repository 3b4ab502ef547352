"""The Cholesky factor of a matrix's inverse, in the matrix's own memory.

GPTQ needs the upper U with U^T U = H^-1. By the book that is three steps, each over the whole matrix: a factor of H, the inverse, a factor of the
inverse. With H = R R^T, R upper, U is R^-1 itself: half as many operations, and no second matrix.
"""

import torch

BLOCK = 256
"""rows and columns that are factored together; what is left is products as wide"""


def factor_of_inverse(matrix: torch.Tensor) -> bool:
    """Put the upper U with U^T U = matrix^-1 in place of a symmetric positive definite matrix, fp32 or fp64 (n, n).

    False where it is not positive definite, or no number; then the matrix is as it was.
    """
    blocks = [slice(begin, min(begin + BLOCK, len(matrix))) for begin in range(0, len(matrix), BLOCK)]
    inverses = _factor(matrix, blocks)
    if inverses is None:
        for at in blocks:
            matrix[at, at.stop :] = matrix[at.stop :, at].T
        return False
    for at, inverse in zip(blocks, inverses):
        matrix[at, at] = inverse
        matrix[at.stop :, at] = 0
    for number, at in enumerate(blocks):
        column = matrix[: at.start, at] @ matrix[at, at]
        for above in blocks[:number]:
            matrix[above, at] = (matrix[above, above.start : at.start] @ column[above.start :]).neg_()
    return True


def _factor(matrix: torch.Tensor, blocks: list[slice]) -> list[torch.Tensor] | None:
    """The inverses of the diagonal blocks of R, upper with R R^T = matrix, whose other blocks take the place of the matrix's; None where there is no R.
    Below the diagonal blocks and in them the matrix stays as it was."""
    inverses = []
    for at in reversed(blocks):
        column = matrix[: at.stop, at].clone()
        column.addmm_(matrix[: at.stop, at.stop :], matrix[at, at.stop :].T, alpha=-1)
        lower, fault = torch.linalg.cholesky_ex(column[at].flip(0, 1))
        if fault or not lower.diagonal().isfinite().all():  # what is no number comes down to it
            return None
        ones = torch.eye(len(lower), dtype=matrix.dtype, device=matrix.device)
        inverse = torch.linalg.solve_triangular(lower, ones, upper=False).flip(0, 1)
        matrix[: at.start, at] = column[: at.start] @ inverse.T
        inverses.append(inverse)
    return inverses[::-1]
