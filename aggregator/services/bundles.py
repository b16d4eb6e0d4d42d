"""The bundle of a final model comes in: from the silo whose turn it is, with the arrays that a quorum of reports signed."""

import re
from functools import partial
from pathlib import Path

from aggregator import cohort
from aggregator.blobs import Blobs
from aggregator.fold import check_digest
from aggregator.records import RunState, Upload
from aggregator.store import Store
from aggregator.telemetry import log
from wardround.bundle import LIBRARIES
from wardround.errors import IntegrityError, MessageError
from wardround.layout import layout_of
from wardround.messages import opened
from wardround.pb import federation_pb2 as pb
from wardround.release import check_content, max_content_bytes, safetensors_bytes

VERSION = re.compile(r"^[0-9a-z.+]{1,32}$")


def begin_bundle(store: Store, signed: pb.Signed, identity: bytes) -> Upload:
    """Accept what announces a bundle. Raises MessageError or IdentityError; ConflictError for a second, other one of that silo."""
    state = store.run_of(signed.ctx)
    if state is None:
        raise MessageError(f"the bundle of {signed.silo} was made for another run")
    body = opened(signed, pb.Bundle, state.ctx, identity)
    check_bundle(state, signed.silo, body, store.now_ms())
    facts = {"parameters": body.parameters_digest.hex(), "content": body.content_digest.hex()}
    return store.begin_upload(signed, (state.id, 0, 0), body.content_digest, body.content_bytes, state.seq, facts=facts)


def check_bundle(state: RunState, silo: str, body: pb.Bundle, now_ms: int) -> None:
    if state.plan.rehearse:
        raise MessageError(f"{state.id} is a rehearsal: it has no model to release")
    if state.plan.release != "registry":
        raise MessageError(
            f"{state.id} releases nothing: its plan says release: {state.plan.release}; the parameters stay at the silos"
        )
    released, known = cohort.released_model(state), state.bundle is not None and state.bundle.silo == silo
    if released is None or (cohort.bundle_maker(state, now_ms) != silo and not known):
        raise MessageError(f"no bundle of {state.id} is due from {silo} now")
    if body.run != state.id or body.parameters_digest != released[0]:
        raise IntegrityError(
            f"the bundle of {silo} announces other arrays than those that the silos of {state.id} reported: not taken"
        )
    layout = layout_of(state.plan)
    if not safetensors_bytes(layout) < body.content_bytes <= max_content_bytes(layout) or len(body.content_digest) != 32:
        raise MessageError(f"the bundle of {silo} announces {body.content_bytes} bytes, which no bundle of this plan has")
    if set(body.versions) != set(LIBRARIES) or not all(VERSION.match(value) for value in body.versions.values()):
        raise MessageError(f"a bundle names the versions of {', '.join(LIBRARIES)} that wrote it, and nothing else")


def finish_bundle(store: Store, blobs: Blobs, upload: Upload) -> None:
    """Verify the whole and keep it. Raises IntegrityError, and forgets what came, when its arrays are not the reported ones."""
    state = store.run(upload.run)
    released = cohort.released_model(state)
    if released is None:
        raise MessageError(f"no bundle of {state.id} is due")
    gate = partial(_check, content=upload.content_digest, state=state, parameters=released[0])
    try:
        blobs.finish(upload.content_digest, upload.silo, upload.num_bytes, gate)
    except (MessageError, IntegrityError) as error:
        store.note("bundle-refused", {"run": upload.run, "silo": upload.silo, "reason": str(error)})
        raise
    store.upload_durable(upload)
    log.info("bundle", silo=upload.silo, run=upload.run, num_bytes=upload.num_bytes)


def _check(path: Path, content: bytes, state: RunState, parameters: bytes) -> None:
    check_digest(path, digest=content)
    with path.open("rb") as file:
        check_content(file, layout_of(state.plan), parameters)
