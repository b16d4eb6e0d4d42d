"""A data folder in use: what the server and the command line both open."""

from dataclasses import dataclass

from aggregator.config import Settings
from aggregator.database import Database
from aggregator.pki import Pki
from aggregator.store import Store
from wardround.errors import StorageError


@dataclass
class Opened:
    """The settings, the certificates under pki/, and the store in aggregator.sqlite or in PostgreSQL."""

    settings: Settings
    pki: Pki
    database: Database
    store: Store

    @classmethod
    def of(cls, settings: Settings) -> "Opened":
        """Raises SettingsError or StorageError: one sentence each."""
        operator_key = settings.operator_public_key()
        try:
            settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"the data folder cannot be used: {error.strerror}; check its owner and mode") from None
        pki = Pki.open(settings.data / "pki", settings.federation, settings.certificate_names)
        database = Database.open(settings.data, settings.database_url)
        return cls(settings, pki, database, Store(database, settings.federation, operator_key, pki.audit_key))
