"""How a call of a silo is refused, as the silo sees it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import pytest

from wardround.errors import BY_CODE, WardroundError


@contextmanager
def refused(kind: type[WardroundError], match: str, status: grpc.StatusCode | None = None) -> Iterator[None]:
    """The call inside ends with this error's code in the trailing metadata and `code: text` in the status."""
    with pytest.raises(grpc.RpcError) as caught:
        yield
    error = caught.value
    code = dict(error.trailing_metadata() or ()).get("wardround-code")
    assert (BY_CODE.get(str(code)), status or error.code()) == (kind, error.code()), f"{error.code()}: {error.details()}"
    assert error.details().startswith(f"{kind.code}: ")
    text = error.details().removeprefix(f"{kind.code}: ")
    with pytest.raises(kind, match=match):
        raise kind(text)


def fails_in_tls(call: Callable[[], object]) -> None:
    """The handshake fails: the aggregator never saw a call."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED), caught.value
    assert "wardround-code" not in dict(caught.value.trailing_metadata() or ())
