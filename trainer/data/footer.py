"""The footer of a parquet file, as far as it says how pages are packed.

pyarrow tells that, too, but not of a hostile file: asking it for the metadata of a column whose histograms
do not fit ends the process (25.0, "Repetition level histogram size mismatch"), while reading such a column is
an error like others. So the footer is parsed here: Thrift's compact protocol, every value of a field that is
there more than once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

_MAGIC = b"PAR1"
_LONGEST = 8 << 20
_DEEPEST = 16
_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 12
# Fields of FileMetaData, RowGroup, ColumnChunk and ColumnMetaData in parquet.thrift.
_PATH: Final = (4, 1, 3, 4)


def codecs(data: bytes) -> set[int]:
    """Return by which codecs the columns of a parquet file are packed; 0 is none.

    Raises:
        ValueError: it is no such file, or its footer is encrypted, too long or damaged.
    """
    if len(data) < 12 or data[:4] != _MAGIC or data[-4:] != _MAGIC:
        raise ValueError("it is no parquet file")
    length = int.from_bytes(data[-8:-4], "little")
    if not 0 < length <= min(_LONGEST, len(data) - 12):
        raise ValueError("it has no footer")
    footer = _Compact(data[len(data) - 8 - length : -8]).struct(0)
    found = set(_at(footer, _PATH))
    if not all(isinstance(one, int) for one in found):
        raise ValueError("its footer is damaged")
    return found


def _at(value: Any, path: tuple[int, ...]) -> Iterator[Any]:
    """Yield all values of the fields of a path, through lists."""
    if isinstance(value, list):
        for one in value:
            yield from _at(one, path)
    elif not path:
        yield value
    elif isinstance(value, dict):
        yield from _at(value.get(path[0], []), path[1:])


class _Compact:
    """Reads Thrift's compact protocol."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    def struct(self, depth: int) -> dict[int, list[Any]]:
        """Return field -> all of its values."""
        if depth > _DEEPEST:
            raise ValueError("its footer is nested too deep")
        fields: dict[int, list[Any]] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            fields.setdefault(number, []).append(self._value(head & 15, depth, in_list=False))
        return fields

    def _value(self, kind: int, depth: int, in_list: bool) -> Any:
        if kind in _BOOLEANS:
            return self._byte() if in_list else kind
        if kind == _BYTE:
            return self._byte()
        if kind in _INTEGERS:
            return self._integer()
        if kind in (_DOUBLE, _BINARY):
            length = 8 if kind == _DOUBLE else self._varint()
            self._place += length
            return None
        if kind in _LISTS:
            head = self._byte()
            count = self._varint() if head >> 4 == 15 else head >> 4
            if count > len(self._data) - self._place:  # each takes a byte or more
                raise ValueError("its footer is damaged")
            return [self._value(head & 15, depth + 1, in_list=True) for _ in range(count)]
        if kind == _STRUCT:
            return self.struct(depth + 1)
        raise ValueError("its footer is damaged")

    def _byte(self) -> int:
        if not 0 <= self._place < len(self._data):
            raise ValueError("its footer is cut short")
        self._place += 1
        return self._data[self._place - 1]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("its footer is damaged")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
