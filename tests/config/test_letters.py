import numpy as np
import pytest

from bltjax.config.letters import check_shapes, suffix_axes


def test_letters_of_a_name():
    assert suffix_axes("starts_BN1") == (("B", 0), ("N", 1))
    assert suffix_axes("q_LDHC") == (("L", 0), ("D", 0), ("H", 0), ("C", 0))


@pytest.mark.parametrize("name", ["bytes", "x_bn", "x_BX", "x_"])
def test_names_without_letters_are_refused(name):
    with pytest.raises(ValueError, match=name):
        suffix_axes(name)


def test_sizes_and_disagreement():
    assert check_shapes(bytes_BN=np.ones((2, 8)), starts_BN1=np.ones((2, 9))) == {"B": 2, "N": 8}
    with pytest.raises(
        ValueError, match=r"N \(positions in a row: .*\) is 7 in starts_BN1 but 8 in bytes"
    ):
        check_shapes(bytes_BN=np.ones((2, 8)), starts_BN1=np.ones((2, 8)))
    with pytest.raises(ValueError, match="bytes_BN has 2 letters but shape"):
        check_shapes(bytes_BN=np.ones(8))
