"""Eight bits per weight: a matrix of a delta file as whole numbers from -127 to 127 and one scale per row.

The largest magnitude of a row is rounded to bfloat16 and becomes 127 steps, so that what is read back has the same
largest magnitude again. Hence storing is idempotent: values read back in bfloat16 or float32 and stored again give
the same numbers and the same scales. (bfloat16 rounds to within u = 2^-8, so a number q comes back within 127 u < 1/2
of a step; the largest one rounds to 127 whichever way its row's scale was rounded.) Each value is at most half a step,
`scale / 2`, from what it was.
"""

import torch

SCALE = ".scale"  # `<name>.scale` holds the scales of the matrix `<name>`
_STEPS = 127
_SMALLEST = 2.0**-100  # rows of smaller values are stored as zeros: their scales would not be normal numbers


def quantize(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the int8 numbers (rows, columns) and the fp32 scales (rows,) of a matrix; rows of zeros have scale 1."""
    values = matrix.float()
    largest = values.abs().amax(dim=1).to(torch.bfloat16).float()
    scale = torch.where(largest < _SMALLEST, 1.0, largest / _STEPS)
    return (values / scale[:, None]).round().clamp(-_STEPS, _STEPS).to(torch.int8), scale


def dequantize(numbers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the fp32 matrix (rows, columns) that int8 numbers and their scales (rows,) stand for."""
    return numbers.float() * scale[:, None]
