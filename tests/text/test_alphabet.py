import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bltjax.text.alphabet import decode, encode, text_stream

pytestmark = pytest.mark.smoke


def test_examples_of_the_reference():
    assert encode("a\ud800b").tolist() == [1, 101, 102, 2]
    assert encode("hé€").tolist() == [1, 108, 199, 173, 230, 134, 176, 2]
    assert encode("", eos=False).tolist() == [1]


@settings(print_blob=True, deadline=None, max_examples=50)
@given(st.binary(), st.booleans(), st.booleans())
def test_round_trip(text, bos, eos):
    ids = encode(text, bos=bos, eos=eos)
    assert ids.dtype == np.int32 and len(ids) == len(text) + bos + eos
    assert decode(ids) == text


def test_decode_drops_specials_and_cuts_at_eos():
    assert decode([1, 3, 101, 0, 2, 102, -1]) == b"ab"
    assert decode([1, 101, 2, 102], cut_at_eos=True) == b"a"
    with pytest.raises(ValueError, match="id 260 is not below"):
        decode([260])


@settings(print_blob=True, deadline=None, max_examples=50)
@given(st.text(alphabet=st.characters(exclude_categories=("Cs",))))
def test_stream_never_shows_half_a_character(text):
    stream, shown = text_stream(), []
    for byte in text.encode():
        piece = stream.decode(bytes([byte]))
        assert "\ufffd" not in piece or "\ufffd" in text
        shown.append(piece)
    assert "".join(shown) + stream.decode(b"", True) == text


def test_stream_replaces_what_is_no_character():
    stream = text_stream()
    assert stream.decode(b"a\xffb\xe2\x82") + stream.decode(b"", True) == "a\ufffdb\ufffd"
