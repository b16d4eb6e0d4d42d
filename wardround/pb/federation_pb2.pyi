from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IDLE: _ClassVar[Phase]
    INVITED: _ClassVar[Phase]
    WAITING: _ClassVar[Phase]
    OPEN: _ClassVar[Phase]
    SEALED: _ClassVar[Phase]
    EVALUATING: _ClassVar[Phase]
    COMPLETED: _ClassVar[Phase]
    FAILED: _ClassVar[Phase]
    ABORTED: _ClassVar[Phase]
    KEYING: _ClassVar[Phase]
    RELEASING: _ClassVar[Phase]
IDLE: Phase
INVITED: Phase
WAITING: Phase
OPEN: Phase
SEALED: Phase
EVALUATING: Phase
COMPLETED: Phase
FAILED: Phase
ABORTED: Phase
KEYING: Phase
RELEASING: Phase

class Signed(_message.Message):
    __slots__ = ("message", "ctx", "body", "silo", "signature")
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CTX_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    SILO_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    message: str
    ctx: bytes
    body: bytes
    silo: str
    signature: bytes
    def __init__(self, message: _Optional[str] = ..., ctx: _Optional[bytes] = ..., body: _Optional[bytes] = ..., silo: _Optional[str] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Join(_message.Message):
    __slots__ = ("run", "plan_digest", "protocol_min", "protocol_max", "software_version", "declared_patients", "layout_digest", "initial_model_mac", "bounds_digest", "roster_version", "dataset_digest", "per_silo_metrics", "notes")
    RUN_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MIN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MAX_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    DECLARED_PATIENTS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    INITIAL_MODEL_MAC_FIELD_NUMBER: _ClassVar[int]
    BOUNDS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ROSTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    DATASET_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PER_SILO_METRICS_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    run: str
    plan_digest: bytes
    protocol_min: int
    protocol_max: int
    software_version: str
    declared_patients: int
    layout_digest: bytes
    initial_model_mac: bytes
    bounds_digest: bytes
    roster_version: int
    dataset_digest: bytes
    per_silo_metrics: bool
    notes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, run: _Optional[str] = ..., plan_digest: _Optional[bytes] = ..., protocol_min: _Optional[int] = ..., protocol_max: _Optional[int] = ..., software_version: _Optional[str] = ..., declared_patients: _Optional[int] = ..., layout_digest: _Optional[bytes] = ..., initial_model_mac: _Optional[bytes] = ..., bounds_digest: _Optional[bytes] = ..., roster_version: _Optional[int] = ..., dataset_digest: _Optional[bytes] = ..., per_silo_metrics: _Optional[bool] = ..., notes: _Optional[_Iterable[str]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("run", "plan_digest", "code", "reason")
    RUN_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    run: str
    plan_digest: bytes
    code: str
    reason: str
    def __init__(self, run: _Optional[str] = ..., plan_digest: _Optional[bytes] = ..., code: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class KeyEpoch(_message.Message):
    __slots__ = ("run", "number", "first_round", "roster_version", "roster_digest", "he_digest", "commitment", "sealed_keys", "boxes", "checkpoint_digest", "checkpoint_bytes")
    RUN_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROUND_FIELD_NUMBER: _ClassVar[int]
    ROSTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    ROSTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    HE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    SEALED_KEYS_FIELD_NUMBER: _ClassVar[int]
    BOXES_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_BYTES_FIELD_NUMBER: _ClassVar[int]
    run: str
    number: int
    first_round: int
    roster_version: int
    roster_digest: bytes
    he_digest: bytes
    commitment: bytes
    sealed_keys: bytes
    boxes: _containers.RepeatedCompositeFieldContainer[KeyBox]
    checkpoint_digest: bytes
    checkpoint_bytes: int
    def __init__(self, run: _Optional[str] = ..., number: _Optional[int] = ..., first_round: _Optional[int] = ..., roster_version: _Optional[int] = ..., roster_digest: _Optional[bytes] = ..., he_digest: _Optional[bytes] = ..., commitment: _Optional[bytes] = ..., sealed_keys: _Optional[bytes] = ..., boxes: _Optional[_Iterable[_Union[KeyBox, _Mapping]]] = ..., checkpoint_digest: _Optional[bytes] = ..., checkpoint_bytes: _Optional[int] = ...) -> None: ...

class KeyBox(_message.Message):
    __slots__ = ("silo", "sealed")
    SILO_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    silo: str
    sealed: bytes
    def __init__(self, silo: _Optional[str] = ..., sealed: _Optional[bytes] = ...) -> None: ...

class EpochAck(_message.Message):
    __slots__ = ("number", "commitment")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    number: int
    commitment: bytes
    def __init__(self, number: _Optional[int] = ..., commitment: _Optional[bytes] = ...) -> None: ...

class Halt(_message.Message):
    __slots__ = ("run", "round", "attempt", "reason")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    run: str
    round: int
    attempt: int
    reason: str
    def __init__(self, run: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class UploadHeader(_message.Message):
    __slots__ = ("run", "round", "attempt", "silo", "content_digest", "num_chunks", "content_bytes", "declared_patients", "cap", "u2_digest", "ledger_head")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SILO_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    CONTENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    DECLARED_PATIENTS_FIELD_NUMBER: _ClassVar[int]
    CAP_FIELD_NUMBER: _ClassVar[int]
    U2_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LEDGER_HEAD_FIELD_NUMBER: _ClassVar[int]
    run: str
    round: int
    attempt: int
    silo: str
    content_digest: bytes
    num_chunks: int
    content_bytes: int
    declared_patients: int
    cap: int
    u2_digest: bytes
    ledger_head: bytes
    def __init__(self, run: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., silo: _Optional[str] = ..., content_digest: _Optional[bytes] = ..., num_chunks: _Optional[int] = ..., content_bytes: _Optional[int] = ..., declared_patients: _Optional[int] = ..., cap: _Optional[int] = ..., u2_digest: _Optional[bytes] = ..., ledger_head: _Optional[bytes] = ...) -> None: ...

class UploadStatus(_message.Message):
    __slots__ = ("upload", "durable_bytes", "receipt")
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    DURABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    upload: bytes
    durable_bytes: int
    receipt: Receipt
    def __init__(self, upload: _Optional[bytes] = ..., durable_bytes: _Optional[int] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("digest", "offset", "data", "total_bytes")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    offset: int
    data: bytes
    total_bytes: int
    def __init__(self, digest: _Optional[bytes] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class UploadTrailer(_message.Message):
    __slots__ = ("ctx", "content_digest")
    CTX_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ctx: bytes
    content_digest: bytes
    def __init__(self, ctx: _Optional[bytes] = ..., content_digest: _Optional[bytes] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("digest", "message")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    message: str
    def __init__(self, digest: _Optional[bytes] = ..., message: _Optional[str] = ...) -> None: ...

class Seal(_message.Message):
    __slots__ = ("cohort_digest", "u2", "u3", "content_digests")
    COHORT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    U2_FIELD_NUMBER: _ClassVar[int]
    U3_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    cohort_digest: bytes
    u2: _containers.RepeatedScalarFieldContainer[str]
    u3: _containers.RepeatedScalarFieldContainer[str]
    content_digests: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, cohort_digest: _Optional[bytes] = ..., u2: _Optional[_Iterable[str]] = ..., u3: _Optional[_Iterable[str]] = ..., content_digests: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ModelReport(_message.Message):
    __slots__ = ("round", "model_mac", "bounds_digest", "sum_digest", "means", "means_of_round", "own", "seconds", "saturated_fraction", "parameters_digest", "progress")
    class MeansEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class OwnEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class SecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ROUND_FIELD_NUMBER: _ClassVar[int]
    MODEL_MAC_FIELD_NUMBER: _ClassVar[int]
    BOUNDS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SUM_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MEANS_FIELD_NUMBER: _ClassVar[int]
    MEANS_OF_ROUND_FIELD_NUMBER: _ClassVar[int]
    OWN_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    SATURATED_FRACTION_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    round: int
    model_mac: bytes
    bounds_digest: bytes
    sum_digest: bytes
    means: _containers.ScalarMap[str, float]
    means_of_round: int
    own: _containers.ScalarMap[str, float]
    seconds: _containers.ScalarMap[str, float]
    saturated_fraction: float
    parameters_digest: bytes
    progress: Progress
    def __init__(self, round: _Optional[int] = ..., model_mac: _Optional[bytes] = ..., bounds_digest: _Optional[bytes] = ..., sum_digest: _Optional[bytes] = ..., means: _Optional[_Mapping[str, float]] = ..., means_of_round: _Optional[int] = ..., own: _Optional[_Mapping[str, float]] = ..., seconds: _Optional[_Mapping[str, float]] = ..., saturated_fraction: _Optional[float] = ..., parameters_digest: _Optional[bytes] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("measured", "best", "waited", "stopped_after")
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    WAITED_FIELD_NUMBER: _ClassVar[int]
    STOPPED_AFTER_FIELD_NUMBER: _ClassVar[int]
    measured: int
    best: float
    waited: int
    stopped_after: int
    def __init__(self, measured: _Optional[int] = ..., best: _Optional[float] = ..., waited: _Optional[int] = ..., stopped_after: _Optional[int] = ...) -> None: ...

class Bundle(_message.Message):
    __slots__ = ("run", "parameters_digest", "content_digest", "content_bytes", "versions")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    RUN_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CONTENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    run: str
    parameters_digest: bytes
    content_digest: bytes
    content_bytes: int
    versions: _containers.ScalarMap[str, str]
    def __init__(self, run: _Optional[str] = ..., parameters_digest: _Optional[bytes] = ..., content_digest: _Optional[bytes] = ..., content_bytes: _Optional[int] = ..., versions: _Optional[_Mapping[str, str]] = ...) -> None: ...

class PollRequest(_message.Message):
    __slots__ = ("protocol_min", "protocol_max", "software_version", "seen", "activity", "roster_version", "head_seq", "head_hash", "run", "model_round")
    PROTOCOL_MIN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MAX_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    ROSTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    HEAD_SEQ_FIELD_NUMBER: _ClassVar[int]
    HEAD_HASH_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    MODEL_ROUND_FIELD_NUMBER: _ClassVar[int]
    protocol_min: int
    protocol_max: int
    software_version: str
    seen: bytes
    activity: str
    roster_version: int
    head_seq: int
    head_hash: bytes
    run: str
    model_round: int
    def __init__(self, protocol_min: _Optional[int] = ..., protocol_max: _Optional[int] = ..., software_version: _Optional[str] = ..., seen: _Optional[bytes] = ..., activity: _Optional[str] = ..., roster_version: _Optional[int] = ..., head_seq: _Optional[int] = ..., head_hash: _Optional[bytes] = ..., run: _Optional[str] = ..., model_round: _Optional[int] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("etag", "unchanged", "phase", "run", "plan", "facts", "joins", "uploads", "relayed", "sums", "head", "roster_version", "message", "checkpoint", "parent")
    ETAG_FIELD_NUMBER: _ClassVar[int]
    UNCHANGED_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    JOINS_FIELD_NUMBER: _ClassVar[int]
    UPLOADS_FIELD_NUMBER: _ClassVar[int]
    RELAYED_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    ROSTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    etag: bytes
    unchanged: bool
    phase: Phase
    run: str
    plan: bytes
    facts: Round
    joins: _containers.RepeatedCompositeFieldContainer[Signed]
    uploads: _containers.RepeatedCompositeFieldContainer[Signed]
    relayed: _containers.RepeatedCompositeFieldContainer[Signed]
    sums: _containers.RepeatedCompositeFieldContainer[Sum]
    head: AuditHead
    roster_version: int
    message: str
    checkpoint: Sum
    parent: Parent
    def __init__(self, etag: _Optional[bytes] = ..., unchanged: _Optional[bool] = ..., phase: _Optional[_Union[Phase, str]] = ..., run: _Optional[str] = ..., plan: _Optional[bytes] = ..., facts: _Optional[_Union[Round, _Mapping]] = ..., joins: _Optional[_Iterable[_Union[Signed, _Mapping]]] = ..., uploads: _Optional[_Iterable[_Union[Signed, _Mapping]]] = ..., relayed: _Optional[_Iterable[_Union[Signed, _Mapping]]] = ..., sums: _Optional[_Iterable[_Union[Sum, _Mapping]]] = ..., head: _Optional[_Union[AuditHead, _Mapping]] = ..., roster_version: _Optional[int] = ..., message: _Optional[str] = ..., checkpoint: _Optional[_Union[Sum, _Mapping]] = ..., parent: _Optional[_Union[Parent, _Mapping]] = ...) -> None: ...

class Parent(_message.Message):
    __slots__ = ("run", "plan", "closing")
    RUN_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    CLOSING_FIELD_NUMBER: _ClassVar[int]
    run: str
    plan: bytes
    closing: Sum
    def __init__(self, run: _Optional[str] = ..., plan: _Optional[bytes] = ..., closing: _Optional[_Union[Sum, _Mapping]] = ...) -> None: ...

class Round(_message.Message):
    __slots__ = ("protocol", "federation", "round", "attempt", "plan_digest", "layout_digest", "bounds_digest", "he_digest", "key_epoch", "epoch_commitment", "roster_digest", "previous_model_mac", "ctx", "cohort", "cap", "roster_version", "deadline_unix_ms")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BOUNDS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    HE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    KEY_EPOCH_FIELD_NUMBER: _ClassVar[int]
    EPOCH_COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    ROSTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_MODEL_MAC_FIELD_NUMBER: _ClassVar[int]
    CTX_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    CAP_FIELD_NUMBER: _ClassVar[int]
    ROSTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    federation: str
    round: int
    attempt: int
    plan_digest: bytes
    layout_digest: bytes
    bounds_digest: bytes
    he_digest: bytes
    key_epoch: int
    epoch_commitment: bytes
    roster_digest: bytes
    previous_model_mac: bytes
    ctx: bytes
    cohort: _containers.RepeatedScalarFieldContainer[str]
    cap: int
    roster_version: int
    deadline_unix_ms: int
    def __init__(self, protocol: _Optional[int] = ..., federation: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., plan_digest: _Optional[bytes] = ..., layout_digest: _Optional[bytes] = ..., bounds_digest: _Optional[bytes] = ..., he_digest: _Optional[bytes] = ..., key_epoch: _Optional[int] = ..., epoch_commitment: _Optional[bytes] = ..., roster_digest: _Optional[bytes] = ..., previous_model_mac: _Optional[bytes] = ..., ctx: _Optional[bytes] = ..., cohort: _Optional[_Iterable[str]] = ..., cap: _Optional[int] = ..., roster_version: _Optional[int] = ..., deadline_unix_ms: _Optional[int] = ...) -> None: ...

class Sum(_message.Message):
    __slots__ = ("facts", "uploads", "reports", "digest", "num_bytes")
    FACTS_FIELD_NUMBER: _ClassVar[int]
    UPLOADS_FIELD_NUMBER: _ClassVar[int]
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    facts: Round
    uploads: _containers.RepeatedCompositeFieldContainer[Signed]
    reports: _containers.RepeatedCompositeFieldContainer[Signed]
    digest: bytes
    num_bytes: int
    def __init__(self, facts: _Optional[_Union[Round, _Mapping]] = ..., uploads: _Optional[_Iterable[_Union[Signed, _Mapping]]] = ..., reports: _Optional[_Iterable[_Union[Signed, _Mapping]]] = ..., digest: _Optional[bytes] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class AuditHead(_message.Message):
    __slots__ = ("seq", "hash", "signature")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    seq: int
    hash: bytes
    signature: bytes
    def __init__(self, seq: _Optional[int] = ..., hash: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class GetRequest(_message.Message):
    __slots__ = ("digest", "offset", "length")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    offset: int
    length: int
    def __init__(self, digest: _Optional[bytes] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class EnrollRequest(_message.Message):
    __slots__ = ("csr_pem", "identity", "sealing", "signature", "software_version")
    CSR_PEM_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    SEALING_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    csr_pem: bytes
    identity: bytes
    sealing: bytes
    signature: bytes
    software_version: str
    def __init__(self, csr_pem: _Optional[bytes] = ..., identity: _Optional[bytes] = ..., sealing: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., software_version: _Optional[str] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("csr_pem",)
    CSR_PEM_FIELD_NUMBER: _ClassVar[int]
    csr_pem: bytes
    def __init__(self, csr_pem: _Optional[bytes] = ...) -> None: ...

class Certificate(_message.Message):
    __slots__ = ("certificate_pem", "ca_pem", "audit_key")
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    CA_PEM_FIELD_NUMBER: _ClassVar[int]
    AUDIT_KEY_FIELD_NUMBER: _ClassVar[int]
    certificate_pem: bytes
    ca_pem: bytes
    audit_key: bytes
    def __init__(self, certificate_pem: _Optional[bytes] = ..., ca_pem: _Optional[bytes] = ..., audit_key: _Optional[bytes] = ...) -> None: ...

class RostersRequest(_message.Message):
    __slots__ = ("newer_than",)
    NEWER_THAN_FIELD_NUMBER: _ClassVar[int]
    newer_than: int
    def __init__(self, newer_than: _Optional[int] = ...) -> None: ...

class RostersReply(_message.Message):
    __slots__ = ("rosters",)
    ROSTERS_FIELD_NUMBER: _ClassVar[int]
    rosters: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, rosters: _Optional[_Iterable[bytes]] = ...) -> None: ...
