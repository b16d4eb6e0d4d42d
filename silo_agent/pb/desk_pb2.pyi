from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Hello(_message.Message):
    __slots__ = ("program", "instance")
    PROGRAM_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    program: str
    instance: str
    def __init__(self, program: _Optional[str] = ..., instance: _Optional[str] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("work", "facts", "data", "digest", "failed")
    WORK_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    work: str
    facts: str
    data: bytes
    digest: bytes
    failed: bool
    def __init__(self, work: _Optional[str] = ..., facts: _Optional[str] = ..., data: _Optional[bytes] = ..., digest: _Optional[bytes] = ..., failed: _Optional[bool] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
