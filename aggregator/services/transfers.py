"""Uploads come in by offset and are verified whole; sums go out by offset. Limits are checked before any work is done."""

from functools import partial

from aggregator import cohort
from aggregator.blobs import Blobs
from aggregator.fold import FoldProcess, check_digest
from aggregator.interceptors import Caller
from aggregator.records import Attempt, RunState, Upload
from aggregator.services.bundles import begin_bundle, finish_bundle
from aggregator.services.statements import attempt_of, check_key_epoch, epoch_of
from aggregator.store import Store, on_fresh_state
from aggregator.telemetry import DOWNLOAD_BYTES, UPLOAD_BYTES, log
from wardround.chunks import MAX_PIECE_BYTES, num_chunks
from wardround.errors import MessageError
from wardround.layout import Layout, layout_of
from wardround.messages import opened
from wardround.pb import federation_pb2 as pb

LEDGER_HEAD_BYTES = 40  # seq as a big-endian u64, hash


class Transfers:
    def __init__(self, store: Store, blobs: Blobs, folds: FoldProcess) -> None:
        self._store, self._blobs, self._folds = store, blobs, folds

    def begin(self, caller: Caller, signed: pb.Signed) -> pb.UploadStatus:
        """Accept a signed header, key epoch or bundle; says how many bytes are durable already, with the receipt when all was."""

        def checkpoint() -> Upload:
            identity = self._store.check_active(caller.name).identity
            state, epoch, ctx = epoch_of(self._store, signed)
            body = opened(signed, pb.KeyEpoch, ctx, identity)
            check_key_epoch(state, epoch, signed, body)
            key = (state.id, 0, epoch.number)
            return self._store.begin_upload(signed, key, body.checkpoint_digest, body.checkpoint_bytes, state.seq)

        def decide() -> Upload:
            identity = self._store.check_active(caller.name).identity
            attempt, state = attempt_of(self._store, signed.ctx, "upload", signed.silo)
            header = opened(signed, pb.UploadHeader, attempt.facts.ctx, identity)
            if caller.name not in state.uploads and attempt.phase != "open":
                raise MessageError(_closed(attempt.round, attempt.attempt, attempt.phase))
            check_header(header, attempt, state, caller.name)
            content, size, patients = header.content_digest, header.content_bytes, header.declared_patients
            return self._store.begin_upload(signed, attempt.key, content, size, state.seq, patients)

        def bundle() -> Upload:
            return begin_bundle(self._store, signed, self._store.check_active(caller.name).identity)

        return self._status(on_fresh_state({"key-epoch": checkpoint, "bundle": bundle}.get(signed.message, decide)))

    def put(self, caller: Caller, piece: pb.Piece) -> pb.UploadStatus:
        data = piece.data  # a copy, each time one looks
        if not 0 < len(data) <= MAX_PIECE_BYTES:
            raise MessageError(f"a piece has 1 to {MAX_PIECE_BYTES} bytes: this one has {len(data)}")
        upload = self._upload(caller, piece.digest)
        if upload.finished_ms is not None:
            return self._status(upload)
        if upload.state == "deleted":
            raise MessageError(_closed(upload.round, upload.attempt, "closed"))
        durable = self._blobs.append(upload.content_digest, caller.name, piece.offset, data, upload.num_bytes)
        return pb.UploadStatus(upload=upload.content_digest, durable_bytes=durable)

    def finish(self, caller: Caller, trailer: pb.UploadTrailer) -> pb.Receipt:
        """Verify size, digest and form; the receipt says that the whole is durable and will be counted once."""
        upload = self._upload(caller, trailer.content_digest)
        if upload.round == 0:
            return self._finish_checkpoint(upload) if upload.attempt else self._finish_bundle(upload)
        attempt, state = attempt_of(self._store, trailer.ctx, "upload", caller.name)
        if attempt.key != (upload.run, upload.round, upload.attempt):
            raise MessageError("the trailer was made for another run, round or attempt than the header of this content")
        if upload.finished_ms is not None:
            return _receipt(upload)
        if attempt.phase != "open":
            raise MessageError(_closed(attempt.round, attempt.attempt, attempt.phase))
        try:
            gate = partial(self._folds.check_upload, digest=upload.content_digest, parameters=state.plan.aggregation.he)
            self._blobs.finish(upload.content_digest, caller.name, upload.num_bytes, gate)
        except MessageError as error:
            facts = {"run": upload.run, "round": upload.round, "attempt": upload.attempt, "silo": caller.name, "reason": str(error)}
            self._store.note("upload-refused", facts)
            raise
        try:
            self._store.upload_durable(upload)
        except MessageError:  # the attempt closed meanwhile: nothing needs these bytes
            self._blobs.whole(upload.content_digest).unlink(missing_ok=True)
            raise
        UPLOAD_BYTES.inc(upload.num_bytes)
        log.info("upload", silo=caller.name, run=upload.run, round=upload.round, attempt=upload.attempt, num_bytes=upload.num_bytes)
        return _receipt(upload)

    def _finish_checkpoint(self, upload: Upload) -> pb.Receipt:
        """Whole and durable: from here on its key epoch can be taken. What it holds, only silos can read."""
        if upload.state == "receiving":
            gate = partial(check_digest, digest=upload.content_digest)
            self._blobs.finish(upload.content_digest, upload.silo, upload.num_bytes, gate)
            self._store.upload_durable(upload)
            log.info("checkpoint", silo=upload.silo, run=upload.run, epoch=upload.attempt, num_bytes=upload.num_bytes)
        return _receipt(upload)

    def _finish_bundle(self, upload: Upload) -> pb.Receipt:
        if upload.state == "receiving":
            finish_bundle(self._store, self._blobs, upload)
        return _receipt(upload)

    def get(self, caller: Caller, request: pb.GetRequest) -> pb.Piece:
        if not 0 < request.length <= MAX_PIECE_BYTES:
            raise MessageError(f"a piece has 1 to {MAX_PIECE_BYTES} bytes: {request.length} were asked for")
        total = self._store.blob_size(request.digest, caller.name)
        if total is None:
            raise MessageError(
                f"no offer to {caller.name} names this blob: only published sums and checkpoints of runs it joined, and "
                "released bundles, can be fetched"
            )
        if request.offset >= total:
            raise MessageError(f"the blob has {total} bytes: there is nothing at offset {request.offset}")
        data = self._blobs.read(request.digest, request.offset, request.length)
        DOWNLOAD_BYTES.inc(len(data))
        return pb.Piece(digest=request.digest, offset=request.offset, data=data, total_bytes=total)

    def _upload(self, caller: Caller, digest: bytes) -> Upload:
        upload = self._store.upload(caller.name, digest)
        if upload is None:
            raise MessageError("an upload begins with BeginUpload and its signed header: no header of this silo names this content")
        return upload

    def _status(self, upload: Upload) -> pb.UploadStatus:
        if upload.finished_ms is not None:
            return pb.UploadStatus(upload=upload.content_digest, durable_bytes=upload.num_bytes, receipt=_receipt(upload))
        durable = self._blobs.durable_bytes(upload.content_digest, upload.silo)
        return pb.UploadStatus(upload=upload.content_digest, durable_bytes=durable)


def layout_in(state: RunState, round_: int) -> Layout | None:
    """The layout of a round's uploads: None in the closing round, whose uploads are the control chunk alone."""
    return layout_of(state.plan) if round_ <= state.last_round else None


def check_header(header: pb.UploadHeader, attempt: Attempt, state: RunState, silo: str) -> None:
    """Raises MessageError that names the first field that is not what this attempt demands."""
    layout = layout_in(state, attempt.round)
    expected = {
        "run": state.id,
        "round": attempt.round,
        "attempt": attempt.attempt,
        "silo": silo,
        "num_chunks": num_chunks(layout),
        "content_bytes": state.plan.aggregation.he.upload_bytes(layout),
        "declared_patients": cohort.joins_of(state)[silo].declared_patients,
        "cap": state.cap,
        "u2_digest": b"",
    }
    for name, value in expected.items():
        seen = getattr(header, name)
        if seen != value:
            shown = f"expected {value}, got {seen}" if isinstance(value, int) else "it is not what this attempt demands"
            raise MessageError(f"the upload's {name}: {shown}")
    if len(header.ledger_head) != (LEDGER_HEAD_BYTES if state.plan.charged else 0):
        raise MessageError("the upload's ledger_head: that of a round charged to a ledger has 40 bytes, any other none")
    if len(header.content_digest) != 32:
        raise MessageError("the upload's content_digest has 32 bytes")
    if silo not in attempt.cohort:
        raise MessageError(
            f"{silo} is not in the cohort of round {attempt.round}, attempt {attempt.attempt}: it joins from the next one"
        )


def _closed(round_: int, attempt: int, phase: str) -> str:
    return f"round {round_}, attempt {attempt} takes no uploads any more: it is {phase}"


def _receipt(upload: Upload) -> pb.Receipt:
    return pb.Receipt(digest=upload.content_digest, message="upload")
