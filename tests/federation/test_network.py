"""What is between a hospital and the aggregator breaks, and MLflow is away: the run goes on, or says whom it waits for.

One federation for all of it: leuven goes out by a proxy with a login, the environment names a proxy that does not exist, and MLflow
is not started before the last test.
"""

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from sandbox.federation import free_port
from sandbox.mlflow_server import start_mlflow, stop_mlflow, wait_for_mlflow
from tests.federation.harness import NAMES, Haunted, haunted
from tests.support.connect_proxy import ConnectProxy
from tests.support.plans import tiny
from wardround.chunks import MAX_PIECE_BYTES
from wardround.layout import layout_of
from wardround.networks import UNet
from wardround.plan import Plan

pytestmark = pytest.mark.slow

EVERYONE = tuple(sorted(NAMES))
BEHIND = "leuven"  # the hospital behind the proxy
PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
LARGE = tiny(model=UNet(network="UNet", channels=(64, 128, 448), strides=(2, 2), norm_groups=2), rounds=1)
CUT_BYTES = MAX_PIECE_BYTES * 5 // 3  # in the middle of the second piece
OVERHEAD_BYTES = 200_000  # polls, statements, TLS and HTTP/2 of a run


@pytest.fixture(scope="module")
def mlflow_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def proxy() -> Iterator[ConnectProxy]:
    with ConnectProxy("localhost:0", "ward:round") as proxy:
        yield proxy


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, proxy: ConnectProxy, mlflow_port: int) -> Iterator[Haunted]:
    folder = tmp_path_factory.mktemp("network")
    (folder / "login").write_text("ward:round\n")
    with pytest.MonkeyPatch.context() as patch, haunted(folder, f"http://127.0.0.1:{mlflow_port}") as federation:
        for name in PROXY_VARIABLES:
            for spelt in (name, name.upper()):
                patch.setenv(spelt, "http://127.0.0.1:9")
        patch.delenv("no_proxy", raising=False)
        patch.delenv("NO_PROXY", raising=False)
        proxy.target = f"localhost:{federation.port}"
        way_out = {"url": proxy.url, "login_file": str(folder / "login")}
        federation.settings[BEHIND] = {"network": {"proxy": way_out}}
        federation.set_up()
        yield federation


def cut_off(federation: Haunted, proxy: ConnectProxy, plan: Plan) -> str:
    """Submit; the hospital behind the proxy joins and is gone before it can have trained, and as a rule before it has the keys."""
    run = federation.ask(plan)
    federation.until(lambda: BEHIND in federation.run(run).joins, "the join")
    proxy.closed = True
    return run


def in_sums(federation: Haunted, run: str) -> list[tuple[str, ...]]:
    return [total.attempt.u3 for total in federation.opened.store.sums(run)]


def same_model(federation: Haunted, run: str) -> bool:
    """The newest model of every silo is of the same round and has the same bits."""
    return len({max(federation.models(silo, run).items()) for silo in NAMES}) == 1


def test_a_proxy_with_a_login_is_a_way_out_and_the_environment_names_none(federation: Haunted, proxy: ConnectProxy) -> None:
    """The two other hospitals go straight out, although the environment says otherwise."""
    run = federation.ask(tiny(rounds=1))
    federation.ended(run)
    assert proxy.tunnels >= 1 and proxy.refusals == [] and same_model(federation, run)
    assert in_sums(federation, run) == [EVERYONE] * 2


def test_an_upload_that_was_cut_goes_on_at_the_durable_byte(federation: Haunted, proxy: ConnectProxy) -> None:
    size = LARGE.aggregation.he.upload_bytes(layout_of(LARGE))
    assert size > 3 * MAX_PIECE_BYTES
    federation.silos[BEHIND].stop()
    federation.silos[BEHIND].restart()  # a new tunnel, whose bytes are counted from zero
    before, cuts = proxy.sent_bytes, proxy.cuts
    proxy.cut_after = CUT_BYTES
    federation.ended(federation.ask(LARGE))
    assert proxy.cuts == cuts + 1
    wasted = CUT_BYTES - MAX_PIECE_BYTES  # of the second piece; the first is durable
    sent = proxy.sent_bytes - before
    assert size + wasted // 2 < sent < size + wasted + OVERHEAD_BYTES < size + CUT_BYTES


def test_the_others_go_on_without_a_silo_that_is_cut_off_and_it_catches_up(federation: Haunted, proxy: ConnectProxy) -> None:
    run = cut_off(federation, proxy, tiny({"min_silos": 2, "deadline_s": 10}))
    federation.until(lambda: any(BEHIND not in names for names in in_sums(federation, run)), "a sum of the two others")
    proxy.closed = False
    federation.ended(run)
    assert same_model(federation, run)
    assert all(len(names) == len(set(names)) >= 2 for names in in_sums(federation, run))


def test_where_everyone_is_needed_the_run_says_who_is_missing_and_goes_on_when_it_returns(
    federation: Haunted, proxy: ConnectProxy
) -> None:
    run = cut_off(federation, proxy, tiny({"deadline_s": 15}, rounds=1))

    def missed() -> bool:
        """A deadline, of the agreement on keys or of the first round."""
        epoch = federation.run(run).epoch
        return bool(federation.opened.store.abandoned(run)) or (epoch is not None and epoch.number > 1)

    federation.until(missed, "a deadline")
    assert BEHIND in federation.show(run)["situation"] and in_sums(federation, run) == []
    proxy.closed = False
    federation.ended(run)
    assert same_model(federation, run) and set(in_sums(federation, run)) == {EVERYONE}


def test_sigterm_drains_and_nothing_is_lost(federation: Haunted) -> None:
    run = federation.ask(tiny())
    federation.until(lambda: len(federation.run(run).joins) == len(NAMES), "three joins")
    for program in federation.all_programs():
        assert program.stop() == 0, program.last_lines(20)
        program.restart()
    federation.ended(run)
    assert same_model(federation, run)


def test_mlflow_catches_up_on_all_that_happened_while_it_was_away(federation: Haunted, mlflow_port: int) -> None:
    runs = [state.id for state in federation.opened.store.runs()]
    assert federation.opened.store.unprojected() == runs  # and none of them waited for it
    server = start_mlflow(federation.root / "mlflow", mlflow_port)
    try:
        uri = wait_for_mlflow(server, mlflow_port)
        federation.until(lambda: not federation.opened.store.unprojected(), "MLflow's catching up")
        experiments = [one["experiment_id"] for one in ask_mlflow(uri, "experiments/search", max_results=100)["experiments"]]
        shown = ask_mlflow(uri, "runs/search", experiment_ids=experiments, max_results=100)["runs"]
        names = [one["info"]["run_name"] for one in shown]
        assert sorted(name for name in names if "@" not in name) == sorted(runs)  # one each; a silo's metrics are child runs
        assert {one["info"]["status"] for one in shown} == {"FINISHED"}
    finally:
        stop_mlflow(server)


def ask_mlflow(uri: str, what: str, **facts: Any) -> Any:
    request = urllib.request.Request(
        f"{uri}/api/2.0/mlflow/{what}", json.dumps(facts).encode(), {"Content-Type": "application/json"}
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=30) as answer:
        return json.load(answer)
