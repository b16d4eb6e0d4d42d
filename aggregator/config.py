"""The aggregator's settings: one YAML file; WARDROUND_AGGREGATOR_<KEY> in the environment beats it. Unknown keys are refused."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from wardround.errors import SettingsError
from wardround.part import Name
from wardround.plan import explain
from wardround.roster import read_public_key
from wardround.settings import read_settings

OF_A_HOSPITAL = {"datasets", "policy", "roster_approval"}  # keys of silo-agent.yaml alone
Port = Annotated[int, Field(ge=0, le=65535)]


class Settings(BaseSettings):
    """configs/aggregator.yaml is an example that runs."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix="WARDROUND_AGGREGATOR_")

    federation: Name
    data: Path
    """The store, the spool and the certificates: a local disk, backed up. Per round one sum stays, a model's size."""
    database: SecretStr | None = None
    """postgresql://user:password@host:5432/name, best as WARDROUND_AGGREGATOR_DATABASE from a secret; null: SQLite in `data`."""
    operator_key: Path
    """operator.pub: what rosters must be signed with."""
    host: str
    """What hospitals dial, as enrolment files say it; the server's certificate names it."""
    port: Annotated[int, Field(ge=1, le=65535)] = 443
    """What hospitals dial; a load balancer may map it to `listen_port`."""
    listen: str = "0.0.0.0"  # noqa: S104 - the one port that hospitals reach; nobody without a certificate gets a call through
    listen_port: Port = 8443
    names: tuple[str, ...] = ()
    """More DNS names and addresses for the server's certificate."""
    metrics_port: Port | None = 9464
    """/metrics and /health; null: none."""
    metrics_listen: str = "127.0.0.1"
    """In a pod 0.0.0.0, for the kubelet's probes and Prometheus; who may come is then the NetworkPolicy's business."""
    control: Path | None = None
    """A Unix socket for the operator container of the same pod; null: none."""
    mlflow: str | None = None
    """Tracking URI; null: runs are not shown in MLflow."""
    log: Literal["console", "json"] = "json"

    @model_validator(mode="after")
    def _host_is_a_name(self) -> Self:
        if not self.host or any(char in self.host for char in "/: "):
            raise ValueError("host is a DNS name or an address alone: the port stands in port")
        return self

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource, file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:  # fmt: skip
        return env_settings, init_settings  # the environment beats the file

    @property
    def database_url(self) -> str | None:
        return None if self.database is None else self.database.get_secret_value()

    @property
    def certificate_names(self) -> list[str]:
        return [self.host, *self.names]

    def operator_public_key(self) -> bytes:
        """32 bytes. Raises SettingsError."""
        try:
            return read_public_key(self.operator_key.read_text())
        except (OSError, UnicodeDecodeError):
            raise SettingsError("cannot read operator_key: it names operator.pub, as `wardround operator init` wrote it") from None


def load_settings(path: Path) -> Settings:
    """Raises SettingsError that names each key. Relative paths are relative to the file."""
    value = read_settings(path, OF_A_HOSPITAL, "holds a hospital's settings: name an aggregator's")
    try:
        settings = Settings(**value)
    except ValidationError as error:
        raise SettingsError(explain(error)) from None
    base = path.parent
    return settings.model_copy(update={"data": base / settings.data, "operator_key": base / settings.operator_key})
