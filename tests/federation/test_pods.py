"""Helpers that dial the desk over TLS, as pods do: a whole run without a child process of any agent."""

from pathlib import Path

import pytest
import yaml

from sandbox.dicom import write_hospitals
from sandbox.federation import Federation, Site, free_port
from sandbox.processes import Programs, call, tool, wait_until
from sandbox.scanner import HOSPITALS
from silo_agent.custody.door import new_secret
from tests.support.plans import TINY


class Podlike(Federation):
    """Each silo with a resident ingest and trainer of its own."""

    def start_silo(self, silo: str) -> None:
        folder = self.silo_folder(silo)
        secret = folder / "desk-secret"
        secret.mkdir()
        files = new_secret()
        for name, data in files.items():
            (secret / name).write_bytes(data)
        file, desk = folder / "silo-agent.yaml", f"127.0.0.1:{free_port()}"
        pods = {"listen": desk, "secret": "desk-secret"}
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"pods": pods}))
        letter = self.root / "letters" / f"wardround-{silo}.yaml"
        again = call(tool("silo-agent", "--config", str(file), "enroll", "--unless-enrolled", str(letter), "--json"))
        assert silo.encode() in again
        found = call(tool("silo-agent", "--config", str(file), "preflight")).decode()
        assert found.count("ok  ") == 6 and "FAIL" not in found, found
        super().start_silo(silo)
        for program in ("ingest", "trainer"):
            shown = {"WARDROUND_DESK_TOKEN": files[f"{program}.token"].decode(), "WARDROUND_DESK_CA": files["tls.crt"].decode()}
            self.programs.start(f"{silo}-{program}", tool(program, "--agent", desk), self.root / f"{silo}-{program}.log", shown)


@pytest.mark.slow
def test_a_run_with_helpers_over_the_network(tmp_path: Path) -> None:
    images = write_hospitals(tmp_path / "dicom", HOSPITALS, 12, seed=1)
    with Programs() as programs:
        sites = [Site(h.name, images[h.name], h.labels, 12) for h in HOSPITALS]
        federation = Podlike(tmp_path / "federation", programs, sites, seed=7)
        federation.set_up()
        plan = tmp_path / "plan.yaml"
        plan.write_text(TINY)
        run = federation.submit(plan)
        wait_until(lambda: federation.show(run)["phase"] in ("completed", "failed"), "the run's end", 400, programs)
        shown = federation.show(run)
    assert shown["phase"] == "completed", shown
    assert shown["completed"][0]["in_sum"] == ["charite", "leuven", "st-marys"]
