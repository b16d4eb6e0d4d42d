"""The final model as it leaves the silos: named float32 arrays whose digest at least T silos have signed (secure-sum.md section 6).

What a silo's Bundle announces is `model.safetensors`, whose every byte follows from the layout and the arrays, then
`model.pt`, which a trainer wrote. `check_content` is what anyone can check of it without torch; nothing here opens `model.pt`.
"""

import hashlib
import json
from typing import BinaryIO

from wardround.canonical import canonical_json, frame
from wardround.errors import IntegrityError, MessageError
from wardround.layout import Array, Layout

ALIAS = "released"  # of the registered version that people take
PIECE_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 20  # of a safetensors file: names, shapes and offsets
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


def layout_in_safetensors(start: bytes) -> Layout:
    """The arrays that the first bytes of a safetensors file announce, in the order of their offsets. Raises ValueError."""
    size = int.from_bytes(start[:8], "little")
    entries = json.loads(start[8 : 8 + size])
    try:
        named = sorted((of["data_offsets"][0], name, of["shape"]) for name, of in entries.items() if of["dtype"] == "F32")
        return Layout(tuple(Array(name, tuple(shape)) for _, name, shape in named))
    except (AttributeError, KeyError, TypeError, IndexError):
        raise ValueError("no safetensors header of float32 arrays") from None


def safetensors_bytes(layout: Layout) -> int:
    """Exact size of model.safetensors."""
    return len(safetensors_header(layout)) + layout.num_bytes


def max_content_bytes(layout: Layout) -> int:
    """Of model.safetensors and model.pt together."""
    return safetensors_bytes(layout) + layout.num_bytes + MAX_TORCH_OVERHEAD_BYTES


def check_content(file: BinaryIO, layout: Layout, digest: bytes) -> None:
    """Of a bundle's content: its arrays have the plan's names, order and shapes and the digest that silos reported, and are
    finite as those silos checked. Raises IntegrityError; MessageError when it ends before model.pt begins."""
    header, hasher = safetensors_header(layout), hashlib.sha256(_prefix(layout))
    if file.read(len(header)) != header:
        raise IntegrityError(
            "the bundle's model.safetensors does not hold the arrays of the plan's layout, by name, order and shape: nothing of it "
            "is taken; compare the software version of the silo that made it"
        )
    left = layout.num_bytes
    while left and (piece := file.read(min(left, PIECE_BYTES))):
        hasher.update(piece)
        left -= len(piece)
    if left or not file.read(1):
        raise MessageError("the bundle ends before its model.pt begins")
    if hasher.digest() != digest:
        raise IntegrityError(
            "the arrays of the bundle are not those that the silos reported and signed: nothing of it is taken; whoever made or "
            "kept it altered them, or a disk did"
        )


def split_content(content: bytes, layout: Layout) -> tuple[bytes, bytes]:
    """(model.safetensors, model.pt)."""
    size = safetensors_bytes(layout)
    return content[:size], content[size:]
