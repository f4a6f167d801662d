"""Small numbers worked out by hand; nothing of adamerge."""

from math import log

# Entropy of softmax(logits), in nats.
#   [0, 0]                p = (1/2, 1/2)          H = ln 2
#   [ln 3, 0]             p = (3/4, 1/4)          H = 3/4 (ln 4 - ln 3) + 1/4 ln 4 = ln 4 - 3/4 ln 3
#   [0, ln 2, ln 3]       p = (1/6, 1/3, 1/2)     H = 1/6 ln 6 + 1/3 ln 3 + 1/2 ln 2
#   [1000, 0]             p = (1, e^-1000)        H = 1000 e^-1000 + … = 0, e^-1000 being below every float
#   [-1000, -1000, -1000] p = (1/3, 1/3, 1/3)     H = ln 3
ENTROPIES: tuple[tuple[tuple[float, ...], float], ...] = (
    ((0.0, 0.0), 0.6931471805599453),
    ((log(3), 0.0), 0.5623351446188083),
    ((0.0, log(2), log(3)), 1.0114042647073518),
    ((1000.0, 0.0), 0.0),
    ((-1000.0, -1000.0, -1000.0), 1.0986122886681098),
)

# Its slope is dH/dz_c = -p_c (ln p_c + H). At [ln 3, 0]: ln p_0 + H = ln 3 - ln 4 + ln 4 - 3/4 ln 3 = 1/4 ln 3, so the
# slopes are ∓ 3/16 ln 3.
ENTROPY_SLOPE: tuple[tuple[float, float], tuple[float, float]] = (
    (log(3), 0.0),
    (-0.20598980412527057, 0.20598980412527057),
)

# Two experts of a 2×2 tensor.   θ₀ = 1 2   θ₁ = 2 2   θ₂ = 1 0   τ₁ =  1 0   τ₂ = 0 -2
#                                     3 4        1 4        3 8        -2 0        0  4
PRETRAINED = ((1.0, 2.0), (3.0, 4.0))
EXPERTS = (((2.0, 2.0), (1.0, 4.0)), ((1.0, 0.0), (3.0, 8.0)))
AVERAGE = ((1.5, 1.0), (2.0, 6.0))  # (θ₁ + θ₂) / 2
TASK_ARITHMETIC = ((1.3, 1.4), (2.4, 5.2))  # θ₀ + 0.3 (τ₁ + τ₂)
SCALED = ((1.5, 1.5), (2.0, 5.0))  # θ₀ + 1/2 τ₁ + 1/4 τ₂
# One λ per row ("chunk(2)"): row 0 has λ₁ = 1/2, λ₂ = 1, row 1 has λ₁ = 2, λ₂ = -1/4.
#   1 + 1/2·1 + 1·0   2 + 1/2·0 + 1·(-2)    =  1.5  0
#   3 + 2·(-2) - 1/4·0   4 + 2·0 - 1/4·4    = -1    3
CHUNK_COEFFICIENTS = ((0.5, 2.0), (1.0, -0.25))
CHUNKED = ((1.5, 0.0), (-1.0, 3.0))
