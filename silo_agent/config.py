"""The hospital's settings: one YAML file, frozen, unknown keys refused. What enrolment learned (whose silo, where) is not here."""

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from wardround.errors import DataError, SettingsError
from wardround.part import Name
from wardround.plan import Plan, explain
from wardround.settings import read_settings

OF_AN_AGGREGATOR = {"federation", "operator_key", "host"}  # keys of aggregator.yaml alone
MAX_NOTE_CHARS = 500  # of one note in a Join
KEY_COLUMN = "StudyInstanceUID"  # of a CSV of labels


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Labels(_Part):
    """What the hospital calls the classes of a plan, and where: in its DICOM SEG objects, or in a CSV with one row a study."""

    segments: dict[Name, str] = {}
    """Class of a segmentation -> SegmentLabel, or a code as SCHEME:VALUE."""

    csv: str = ""
    """A file inside the dataset's source: UTF-8, a header row, a column StudyInstanceUID."""
    column: str = ""
    """Of that file: it holds the hospital's own words."""
    values: dict[Name, str] = {}
    """Class of a classification -> the hospital's word in that column."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        table = {"csv": self.csv, "column": self.column, "values": self.values}
        if missing := [key for key, value in table.items() if not value]:
            if self.segments and len(missing) == len(table):
                return self
            raise ValueError(
                f"labels are {{segments: ...}} or {{csv: ..., column: ..., values: ...}}: {', '.join(missing)} missing"
            )
        if self.segments:
            raise ValueError("labels.segments and labels.csv exclude each other: a dataset's labels come from one place")
        path = PurePosixPath(self.csv)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError("labels.csv is the name of a file inside the dataset's source: no / in front and no .. in it")
        if self.column == KEY_COLUMN:
            raise ValueError(f"labels.column is {KEY_COLUMN}, which names the study: name the column that holds the label")
        if len({word.strip() for word in self.values.values()}) != len(self.values):
            raise ValueError("labels.values gives two classes one word: no row could tell them apart")
        return self


class Dataset(_Part):
    """A dataset binding: where a dataset that plans name lies in this hospital, and what its labels are called here."""

    source: Path
    labels: Labels
    declared_patients: Annotated[int, Field(ge=1)]
    """What the federation is told this hospital has: a public number with two significant digits, stated once per run. It weighs
    the hospital's updates and is never derived from the data while it runs."""

    note: str = ""
    """One sentence that every reader of a run on this dataset is shown, e.g. that its patients are simulated."""

    def check_labels(self, plan: Plan) -> None:
        """Raises DataError unless every class of the plan has a name here: a segment (but for background), or a word in a CSV."""
        by_row = plan.task == "classification"
        what, where = ("word", "values") if by_row else ("segment", "segments")
        named = self.labels.values if by_row else self.labels.segments
        if unbound := [wanted for wanted in plan.bound_classes if wanted not in named]:
            bound = ", ".join(named) or "none"
            raise DataError(
                f"dataset {plan.dataset!r} of this hospital binds no {what} for {', '.join(unbound)} (bound: {bound}): "
                f"add it under labels.{where}"
            )

    @field_validator("note")
    @classmethod
    def _one_line(cls, value: str) -> str:
        if len(value) > MAX_NOTE_CHARS or not value.isprintable():
            raise ValueError(f"a dataset's note is one line of at most {MAX_NOTE_CHARS} characters: the aggregator takes no more")
        return value

    @field_validator("declared_patients")
    @classmethod
    def _two_significant_digits(cls, value: int) -> int:
        if str(value)[2:].strip("0"):
            raise ValueError(f"declared_patients has two significant digits, so that it says nothing exact: {value} has more")
        return value


class Proxy(_Part):
    """An HTTP CONNECT proxy on the way out. Only this setting counts: proxy variables in the environment are never read."""

    url: str
    login_file: Path | None = None
    """`user:password`, in a file only this user can read."""

    @field_validator("url")
    @classmethod
    def _host_and_port(cls, value: str) -> str:
        if not re.fullmatch(r"http://[^/@\s]+", value):  # what was seen may be a password: it is not repeated
            raise ValueError("network.proxy.url is http://host:port alone; a login stands in network.proxy.login_file")
        return value


class Network(_Part):
    proxy: Proxy | None = None


class Pods(_Part):
    """Helpers as pods of their own, which dial the desk over the network. Absent: child processes on a Unix socket."""

    listen: str = "0.0.0.0:8444"
    secret: Path
    """The folder of `silo-agent desk-secret`, as Kubernetes mounts it."""
    job: Path | None = None
    """The Job that the agent creates when there is work for a trainer; absent: somebody else keeps one running."""


class Settings(_Part):
    """configs/silo-agent.yaml is an example that runs."""

    data: Path
    """Keys, the state database and the spool: a local disk (SQLite), at least 20 times the model's size, backed up."""
    datasets: dict[Name, Dataset] = {}
    policy: Path | None = None
    """The site policy; absent: the strict default."""
    roster_approval: Literal["manual", "signed"] = "manual"
    """manual: a new hospital counts only after `silo-agent roster approve`. signed: the operator's signature is enough."""
    network: Network = Network()
    pods: Pods | None = None
    snapshots: Path = Path("snapshots")
    """Where ingest writes and the trainer reads, relative to `data`. The agent only passes the name on."""

    def dataset(self, name: str) -> Dataset:
        """Raises DataError that names what is bound here."""
        if name not in self.datasets:
            bound = ", ".join(sorted(self.datasets)) or "none"
            raise DataError(
                f"this hospital binds no dataset {name!r} (bound here: {bound}): "
                "the plan names one that is, or the hospital adds it under `datasets` in its settings"
            )
        return self.datasets[name]


def load_settings(path: Path) -> Settings:
    """Raises SettingsError that names each key. Relative paths in the file are relative to the file."""
    value = read_settings(path, OF_AN_AGGREGATOR, "holds an aggregator's settings: name a hospital's")
    try:
        settings = Settings.model_validate(value)
    except ValidationError as error:
        raise SettingsError(explain(error)) from None
    base = path.parent
    datasets = {k: d.model_copy(update={"source": base / d.source}) for k, d in settings.datasets.items()}
    policy = None if settings.policy is None else base / settings.policy
    network, proxy = settings.network, settings.network.proxy
    if proxy is not None and proxy.login_file is not None:
        network = Network(proxy=proxy.model_copy(update={"login_file": base / proxy.login_file}))
    pods = settings.pods
    if pods is not None:
        job = None if pods.job is None else base / pods.job
        pods = pods.model_copy(update={"secret": base / pods.secret, "job": job})
    data = base / settings.data
    return settings.model_copy(
        update={
            "data": data,
            "datasets": datasets,
            "policy": policy,
            "network": network,
            "pods": pods,
            "snapshots": data / settings.snapshots,
        }
    )
