"""FedYogi: Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan: Adaptive Federated Optimization, ICLR 2021, arXiv
2003.00295, algorithm 2, the line of FedYogi:

    v <- v - (1 - beta2) mean^2 sign(v - mean^2)

v moves by what the mean update is worth, never by what v is worth: it forgets a large one slowly, and FedAdam fast.
"""

import numpy as np

from silo_agent.algorithms.adaptive import Adaptive


class FedYogi(Adaptive):
    def second_moment(self, v: np.ndarray, square: np.ndarray) -> np.ndarray:
        moved = np.multiply(np.multiply(square, 1.0 - self.training.beta2), np.sign(np.subtract(v, square)))
        return np.asarray(np.subtract(v, moved))
