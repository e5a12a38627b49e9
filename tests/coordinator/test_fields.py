import pytest
from hypothesis import given
from hypothesis import strategies as st

from semel.coordinator.fields import FieldReader, FieldWriter
from semel.errors import CorruptBatch


@given(st.integers(0, 2**31 - 1))
def test_an_unsigned_varint_comes_back(value: int):
    reader = FieldReader(FieldWriter().uvarint(value).done())
    assert reader.uvarint() == value


@given(st.text(max_size=50), st.binary(max_size=50), st.none() | st.text(max_size=5))
def test_strings_and_bytes_come_back_one_after_another(text: str, data: bytes, maybe: str | None):
    reader = FieldReader(FieldWriter().string(text).bytes_(data).compact_string(text).string(maybe).int8(-1).done())
    assert (reader.string(), reader.bytes_(), reader.compact_string()) == (text, data, text)
    assert (reader.nullable_string(), reader.int8()) == (maybe, -1)


def test_tags_are_written_in_order_and_unknown_ones_can_be_skipped():
    data = FieldWriter().tags({7: b"seven", 0: b""}).int32(5).done()
    assert data == b"\x02\x00\x00\x07\x05seven\x00\x00\x00\x05"
    reader = FieldReader(data)
    assert reader.tags() == {0: b"", 7: b"seven"}
    assert reader.int32() == 5


@pytest.mark.parametrize(
    ("data", "read"),
    [
        (b"\x00", FieldReader.int16),
        (b"\x00\x05abc", FieldReader.string),
        (b"\xff\xff", FieldReader.string),
        (b"\x00\x01\xff", FieldReader.string),
        (b"\xff\xff\xff\xff", FieldReader.bytes_),
        (b"\xff\xff\xff\xff\xff\x0f", FieldReader.uvarint),
        (b"\x00", FieldReader.compact_string),
    ],
)
def test_nonsense_is_a_corrupt_record_and_no_other_error(data: bytes, read):
    with pytest.raises(CorruptBatch):
        read(FieldReader(data))
