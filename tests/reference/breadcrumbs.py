"""Model Breadcrumbs written down a second time (SPECS B5), by sorting; numpy, nothing of adamerge.

Also a matrix that is worked out by hand, with the derivation beside it.
"""

import numpy as np


def breadcrumbs(tensor: np.ndarray, drop_low: float, drop_high: float, *, by_row: bool = False) -> np.ndarray:
    """One task's tensor without its smallest and its largest entries; what ties with the last that stays, stays."""
    if by_row and tensor.ndim > 1:
        return np.stack([breadcrumbs(row, drop_low, drop_high, by_row=True) for row in tensor])
    ordered = np.sort(np.abs(tensor).ravel())
    low, high = int(drop_low * ordered.size), int(drop_high * ordered.size)
    kept = ordered[low : ordered.size - high]
    return np.where((np.abs(tensor) >= kept[0]) & (np.abs(tensor) <= kept[-1]), tensor, 0.0)


# A worked example: a tensor of two rows of five, drop_low = 0.3, drop_high = 0.2.
#
# Within the tensor: ⌊0.3·10⌋ = 3 smallest of 0 1 1 | 2 3 4 5 6 | 7 9 and ⌊0.2·10⌋ = 2 largest go. 2 to 6 stay.
# Within rows: ⌊0.3·5⌋ = 1 smallest and ⌊0.2·5⌋ = 1 largest.
#   First row, magnitudes 9 1 3 0 4: 0 and 9 go.   Second, 2 7 1 6 5: 1 and 7 go.
WORKED = ((9.0, -1.0, 3.0, 0.0, -4.0), (2.0, 7.0, 1.0, -6.0, 5.0))
WORKED_SHARES = (0.3, 0.2)
WORKED_WITHIN = {
    "tensor": ((0.0, 0.0, 3.0, 0.0, -4.0), (2.0, 0.0, 0.0, -6.0, 5.0)),
    "row": ((0.0, -1.0, 3.0, 0.0, -4.0), (2.0, 0.0, 0.0, -6.0, 5.0)),
}
