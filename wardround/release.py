"""The final model as it leaves the silos: named float32 arrays whose digest at least T silos have signed (secure-sum.md section 6).

What a silo's Bundle announces is `model.safetensors`, whose every byte follows from the layout and the arrays, then
`model.pt`, which a trainer wrote. `check_content` is what anyone can check of it without torch; nothing here opens `model.pt`.
"""

import hashlib
import json
from pathlib import Path

from wardround.canonical import canonical_json, frame
from wardround.errors import IntegrityError, MessageError
from wardround.layout import Layout

ALIAS = "released"  # of the registered version that people take
PIECE_BYTES = 1 << 20
MAX_TORCH_OVERHEAD_BYTES = 1 << 20  # of model.pt beside its arrays: names and offsets


def quorum(num_silos: int, min_silos: int) -> int:
    """How many of the silos in a sum must have signed what others are to believe of it: T = floor(2n/3) + 1, and at least
    the plan's minimum."""
    return max(2 * num_silos // 3 + 1, min_silos)


def parameters_digest(layout: Layout, parameters: bytes) -> bytes:
    """32 bytes: SHA-256 over the layout's digest and the float32 little-endian bytes. Without a key, unlike the model's MAC: it is
    told only of a model that is released."""
    return hashlib.sha256(_prefix(layout) + parameters).digest()


def _prefix(layout: Layout) -> bytes:
    return frame(b"wardround/parameters/1", layout.digest)


def safetensors_header(layout: Layout) -> bytes:
    """u64 length and JSON, padded to 8 bytes: all of a safetensors file but its arrays."""
    entries, offset = {}, 0
    for array in layout.arrays:
        entries[array.name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [offset, offset + 4 * array.size]}
        offset += 4 * array.size
    text = canonical_json(entries)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def safetensors_bytes(layout: Layout) -> int:
    """Exact size of model.safetensors."""
    return len(safetensors_header(layout)) + layout.num_bytes


def max_content_bytes(layout: Layout) -> int:
    """Of model.safetensors and model.pt together."""
    return safetensors_bytes(layout) + layout.num_bytes + MAX_TORCH_OVERHEAD_BYTES


def check_content(path: Path, layout: Layout, digest: bytes) -> None:
    """Of a bundle's content: its arrays have the plan's names, order and shapes and the digest that silos reported, and are
    finite as those silos checked. Raises IntegrityError; MessageError when it ends before model.pt begins."""
    header, hasher = safetensors_header(layout), hashlib.sha256(_prefix(layout))
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            raise IntegrityError(
                "the bundle's model.safetensors does not hold the arrays of the plan's layout, by name, order and shape: "
                "nothing of it "
                "is released; compare the software version of the silo that made it"
            )
        left = layout.num_bytes
        while left and (piece := file.read(min(left, PIECE_BYTES))):
            hasher.update(piece)
            left -= len(piece)
        if left or not file.read(1):
            raise MessageError("the bundle ends before its model.pt begins")
    if hasher.digest() != digest:
        raise IntegrityError(
            "the arrays of the bundle are not those that the silos reported and signed: nothing of it is released; the "
            "silo that made "
            "it altered them, or its disk did"
        )


def split_content(content: bytes, layout: Layout) -> tuple[bytes, bytes]:
    """(model.safetensors, model.pt)."""
    size = safetensors_bytes(layout)
    return content[:size], content[size:]


def parameters_in(safetensors: bytes) -> tuple[dict[str, tuple[int, ...]], bytes]:
    """Names and shapes in the order of the arrays, and their bytes, of a model.safetensors from anywhere. Raises IntegrityError."""
    try:
        size = int.from_bytes(safetensors[:8], "little")
        entries = json.loads(safetensors[8 : 8 + size])
        entries.pop("__metadata__", None)
        ordered = sorted(entries.items(), key=lambda item: item[1]["data_offsets"][0])
        shapes = {name: tuple(int(edge) for edge in entry["shape"]) for name, entry in ordered}
        if any(entry["dtype"] != "F32" for entry in entries.values()):
            raise ValueError("dtype")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise IntegrityError("model.safetensors was expected to hold named float32 arrays: it is damaged or another file") from None
    return shapes, safetensors[8 + size :]
