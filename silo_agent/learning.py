"""What a plan's algorithm makes of a round at this silo. Pure: the global model, what stays at home and an update in; what to
train, to keep and to send out. Everything is a function of durable bytes, so that a step that was killed gives the same bits
again."""

from dataclasses import replace

import numpy as np

from silo_agent.algorithms.at_home import Home, Split
from silo_agent.algorithms.fedadam import FedAdam
from silo_agent.algorithms.fedavg import FedAvg, Round, Share
from silo_agent.algorithms.fednova import FedNova
from silo_agent.algorithms.fedyogi import FedYogi
from silo_agent.algorithms.scaffold import Scaffold
from silo_agent.secure_sum.global_model import GlobalModel
from silo_agent.secure_sum.packing import Exponents, start_bounds
from wardround import training
from wardround.errors import IntegrityError, MessageError
from wardround.layout import at_home, layout_of, trained_layout
from wardround.plan import Plan

ALGORITHMS: dict[type, type[FedAvg]] = {
    training.FedProx: FedAvg,
    training.FedNova: FedNova,
    training.Scaffold: Scaffold,
    training.FedAdam: FedAdam,
    training.FedYogi: FedYogi,
}


class Learning:
    """Of one plan."""

    def __init__(self, plan: Plan) -> None:
        self.layout = layout_of(plan)
        self.algorithm = ALGORITHMS[type(plan.training)](plan.training, plan.aggregation.server)
        arrays = trained_layout(plan).arrays
        self._split = Split(np.repeat(np.array(at_home(plan)), [array.size for array in arrays]))
        self._num_layers = int(self._split.stays.sum())

    def begin(self, values: bytes) -> tuple[GlobalModel, Exponents, Home]:
        """From the trainer's initial network: float32, little-endian, trained layout. The bounds are the first round's; a variate,
        which has the size of an update, starts with its parameter's. Raises MessageError for another size, IntegrityError for
        NaN."""
        if len(values) != 4 * self._split.stays.size:
            raise MessageError(f"expected {4 * self._split.stays.size} bytes of parameters, got {len(values)}")
        federated, layers = self._split.apart(np.frombuffer(values, "<f4"))
        model = GlobalModel.initial(federated.tobytes(), self.layout)
        bounds = start_bounds(federated, replace(self.layout, variates=False))
        model = replace(model, moments=self.algorithm.start(model.theta))
        return model, bounds * (2 if self.layout.variates else 1), _finite(Home(layers))

    def home(self, data: bytes) -> Home:
        """Of what `Home.dump` gave. Raises IntegrityError for another size."""
        return Home.load(data, self._num_layers, self.layout.num_parameters)

    def parameters(self, model: GlobalModel, home: Home) -> bytes:
        """The network this silo trains and measures: float32, little-endian, trained layout."""
        if not self._num_layers:
            return model.parameters
        return self._split.whole(np.frombuffer(model.parameters, "<f4"), home.layers).astype("<f4").tobytes()

    def correction(self, model: GlobalModel, home: Home) -> bytes:
        """What is added to each gradient, as `parameters` lays it out; empty: nothing."""
        correction = self.algorithm.correction(model.moments, home.variate)
        if correction is None:
            return b""
        return self._split.whole(correction.astype(np.float32), np.zeros(self._num_layers, np.float32)).astype("<f4").tobytes()

    def trained(self, update: bytes, model: GlobalModel, home: Home, learning_rate: float) -> Home:
        """What stays at home after the training that gave `update` (trained layout) from `model` and `home`. Raises IntegrityError
        unless it is finite."""
        federated, layers = self._split.apart(np.frombuffer(update, "<f4"))
        variate = self.algorithm.next_variate(federated, model.moments, home.variate, learning_rate)
        return _finite(Home(home.layers + layers, variate))

    def share(self, update: bytes, home: Home, round_: Round) -> Share:
        """What goes into the sum. `home`: after training."""
        federated, _ = self._split.apart(np.frombuffer(update, "<f4"))
        return self.algorithm.share(federated, home.variate, round_)


def _finite(home: Home) -> Home:
    if not np.isfinite(home.layers).all() or (home.variate is not None and not np.isfinite(home.variate).all()):
        raise IntegrityError("what stays at home would hold NaN or infinity: nothing was kept; lower the learning rate of the plan")
    return home
