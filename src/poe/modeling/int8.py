"""Store matrices in 8 bits per weight: integers from -127 to 127 and one scale per row.

The largest magnitude of a row is rounded to bfloat16 and becomes 127 steps, so the matrix that is read back has the
same largest magnitude. Storing is therefore idempotent: values that are read back in bfloat16 or float32 and stored
again give the same integers and scales. (bfloat16 rounds by at most u = 2^-8, so an integer q is off by at most
127 u < 1/2 step, and the largest one rounds to 127 in either direction of the scale's rounding.) Each value is off by
at most half a step, `scale / 2`.
"""

import torch

SCALE = ".scale"  # `<name>.scale` has the scales of the matrix `<name>`
_STEPS = 127
_SMALLEST = 2.0**-100  # rows below it are stored as zeros, because their scales would be subnormal


def quantize(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the int8 values (rows, columns) and fp32 scales (rows,) of a matrix. Rows of zeros have scale 1."""
    values = matrix.float()
    largest = values.abs().amax(dim=1).to(torch.bfloat16).float()
    scale = torch.where(largest < _SMALLEST, 1.0, largest / _STEPS)
    return (values / scale[:, None]).round().clamp(-_STEPS, _STEPS).to(torch.int8), scale


def dequantize(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the fp32 matrix (rows, columns) of int8 values and their scales (rows,)."""
    return values.float() * scale[:, None]
