"""A CSV of labels: which words the hospital wrote beside which StudyInstanceUID. Nothing of it is ever quoted."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from silo_agent.config import KEY_COLUMN
from wardround.errors import DataError

MAX_TABLE_BYTES = 64 * 2**20  # a row takes about 80 bytes: some 800,000 studies


def read_rows(source: Path, name: str, column: str) -> dict[str, list[str]]:
    """StudyInstanceUID -> the words in `column` of its rows, without space around them. `name`: of the file inside `source`.

    UTF-8, with or without a byte order mark, commas (RFC 4180), a header row. Empty rows are passed over; a row too short to have
    the column has an empty word. DataError: the file is outside, cannot be read, is no CSV, or has not each column once.
    """
    path = source / name
    if not path.resolve().is_relative_to(source.resolve()):
        raise DataError("labels.csv leads out of the dataset's source: put the CSV inside it, and name it without a link")
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise DataError(f"the CSV of labels has more than {MAX_TABLE_BYTES} bytes: expected one short row a study")
        lines = csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""), strict=True)
        header = [cell.strip() for cell in next(lines, [])]
        key, word = _place(header, KEY_COLUMN), _place(header, column)
        rows: dict[str, list[str]] = {}
        for line in lines:
            if any(cell.strip() for cell in line):
                line += [""] * (len(header) - len(line))
                rows.setdefault(line[key].strip(), []).append(line[word].strip())
    except OSError as error:
        raise DataError(
            f"the CSV of labels cannot be read ({error.strerror}): it lies in the dataset's source, under the name that labels.csv "
            "in the settings gives"
        ) from None
    except UnicodeDecodeError:
        raise DataError("the CSV of labels is not UTF-8: export it as `CSV UTF-8`") from None
    except csv.Error:
        raise DataError("the CSV of labels is no CSV: expected commas, and quotes in pairs (RFC 4180)") from None
    return rows


def _place(header: Sequence[str], column: str) -> int:
    if header.count(column) != 1:
        raise DataError(
            f"the header row of the CSV of labels has {header.count(column)} columns {column!r} among {len(header)}, expected 1: "
            "correct labels.column in the settings, or export the CSV with a header row and commas"
        )
    return header.index(column)
