"""FedAdam: Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan: Adaptive Federated Optimization, ICLR 2021, arXiv
2003.00295, algorithm 2, the line of FedAdam:

    v <- beta2 v + (1 - beta2) mean^2

The silos' own second moments never exist: the mean comes out of the encrypted sum, and every silo squares it alike.
"""

import numpy as np

from silo_agent.algorithms.adaptive import Adaptive


class FedAdam(Adaptive):
    def second_moment(self, v: np.ndarray, square: np.ndarray) -> np.ndarray:
        return np.asarray(np.add(np.multiply(v, self.training.beta2), np.multiply(square, 1.0 - self.training.beta2)))
