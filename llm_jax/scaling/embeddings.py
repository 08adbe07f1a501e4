"""What counting N without embeddings does to the exponent (Pearce and Song 2024, arXiv:2406.12907).

If loss follows all parameters, L = E + A/N_total^alpha + B/D^beta, and embeddings add omega N^power to the N
others (power 1/3 where depth goes with width, 1/2 at a fixed depth), then the best N at C = 6 N D doesn't
grow as C^(beta/(alpha+beta)): not even as a power of C, except far from where both kinds are equally many.
"""

import numpy as np

# Their fit to Chinchilla's models, N_total = N + 47491 N^(1/3), whose vocabulary is 32,000.
OMEGA_PER_TOKEN = 47491 / 32000


def local_exponent(
    N: np.ndarray | float, omega: float, alpha: float, beta: float, power: float = 1 / 3
) -> np.ndarray | float:
    """d ln N_opt / d ln C where N, the best size without embeddings, is optimal: their g, for any `power`.

    Both counts leave embeddings out: C = 6 N D. omega 0 gives Chinchilla's beta / (alpha + beta).
    """
    embeddings = omega * np.asarray(N, float) ** power
    growth = (N + power * embeddings) / (N + embeddings)  # d ln N_total / d ln N
    bend = (N + power**2 * embeddings) / (N + power * embeddings)  # d ln (N dN_total/dN) / d ln N
    return 1 / (1 + ((1 + alpha) * growth - bend) / beta)
