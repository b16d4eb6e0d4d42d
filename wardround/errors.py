"""Errors by whose fault they are.

    WardroundError
      PlanError          the plan's author: a key, a value, a combination
      SettingsError      whoever wrote a settings or policy file
        UsageError       whoever typed a command: a name that is not there, a word that does not fit
      PolicyRefusal      nobody's: the hospital said no, and which line said it
      DataError          the hospital's data or its dataset binding
      IdentityError      a certificate, token, roster or signature that does not hold
      MessageError       a peer sent something malformed, oversized, replayed or for another round
      ConflictError      a second, different message where one was already accepted
      VersionError       protocols that do not meet
      IntegrityError     sums, reports or chains that disagree: the run halts
      StorageError       disk full, database locked                                   retryable
      Disconnected       the other side cannot be reached                             retryable

Messages say what was expected, what was seen and what to do next; never a pixel, identifier, path or key. Only a path or address
that was typed on a command line is read back, to whoever typed it. `code` is stable and machine-readable, `retryable` a property
of the class. On the wire an error is its code and message in the gRPC status.
"""

from typing import ClassVar


class WardroundError(Exception):
    """Anything Wardround says no to. `exit_code` is what a command line ends with."""

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1
    stays: bool = False
    """Set on what a program that saw the hospital's data said: its words do not leave (silo_agent/outgoing.py)."""


class PlanError(WardroundError):
    code = "plan"
    exit_code = 2


class SettingsError(WardroundError):
    code = "settings"
    exit_code = 2


class UsageError(SettingsError):
    code = "usage"


class PolicyRefusal(WardroundError):
    code = "policy"
    exit_code = 3


class DataError(WardroundError):
    code = "data"
    exit_code = 4


class IdentityError(WardroundError):
    code = "identity"
    exit_code = 5


class MessageError(WardroundError):
    code = "message"


class ConflictError(WardroundError):
    code = "conflict"


class VersionError(WardroundError):
    code = "version"


class IntegrityError(WardroundError):
    code = "integrity"


class StorageError(WardroundError):
    code = "storage"
    retryable = True


class Disconnected(WardroundError):
    code = "disconnected"
    retryable = True


BY_CODE: dict[str, type[WardroundError]] = {
    kind.code: kind
    for kind in (
        WardroundError, PlanError, SettingsError, UsageError, PolicyRefusal, DataError, IdentityError, MessageError, ConflictError,
        VersionError, IntegrityError, StorageError, Disconnected,
    )
}  # fmt: skip
