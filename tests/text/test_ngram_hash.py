"""Hash ids against 64-bit arithmetic in Python's own integers, and the reference's vectors."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax.text.ngram_hash import HASH_PRIMES, HashConfig, hash_ids

pytestmark = pytest.mark.smoke

HELLO = np.array([[1, 76, 105, 112, 112, 115, 36, 70, 80, 88, 2]], np.int32)
VECTORS = {
    (0, 2, 500002): "496009 196535 80813 52891 52898 40919 356369 220528 180632 148698 492104",
    (0, 3, 500002): "443987 124875 393970 386145 358223 190185 217383 321325 125336 233820 36668",
    (0, 4, 500002): "437197 433869 117936 254402 246577 30240 157233 180591 463491 72068 11712",
    (0, 5, 500002): "123201 168913 27892 170862 307328 265602 351450 53249 1607 270111 414968",
    (0, 6, 500002): "166353 160907 92310 405250 48218 280239 105252 101548 352863 421533 199313",
    (0, 7, 500002): "34117 338221 15158 281878 94816 340137 297939 72418 6380 30629 489767",
    (0, 8, 500002): "172383 205585 456240 129346 299568 322649 282857 145619 126410 325422 471893",
    (1, 4, 50002): "28777 29347 31820 16762 41227 32224 19103 32445 30509 27750 35538",
    (2, 8, 500002): "239125 120641 389742 389306 600 211561 378473 330469 229260 383772 65979",
}


GOLDEN = Path(__file__).parents[1] / "golden"


def exact_ids(x_N, prime, size, rows, begins_N):
    """The definition, in integers of any length."""
    ids = []
    for n, begin in enumerate(begins_N):
        window = [int(x_N[i]) if i >= begin else 0 for i in range(n - size + 1, n + 1)]
        value = sum(x * prime**m for m, x in enumerate(window)) % 2**64
        ids.append((value - 2**64 if value >= 2**63 else value) % rows)
    return ids


@pytest.mark.parametrize("key", VECTORS, ids=str)
def test_vectors(key):
    function, size, rows = key
    config = HashConfig(sizes=(size,), functions=function + 1, rows=rows)
    assert hash_ids(config, HELLO)[function, 0].tolist() == list(map(int, VECTORS[key].split()))


def test_signed_hash_of_the_reference():
    # 2^24 is a power of two, so its ids are the low 24 bits of the hash itself.
    config = HashConfig(sizes=(8,), rows=2**24)
    assert hash_ids(config, HELLO)[0, 0, 0] == 9015250055358150391 % 2**24
    # The largest ids make the largest sums; about half of such hashes are negative.
    x_BN = np.full((1, 20), 259, np.int32)
    config = HashConfig(sizes=(16,), functions=11, rows=2**24 - 1)
    for table, prime in enumerate(HASH_PRIMES):
        exact = exact_ids(x_BN[0], prime, 16, config.rows, [0] * 20)
        assert hash_ids(config, x_BN)[table, 0].tolist() == exact


def test_ids_of_the_reference():
    golden = np.load(GOLDEN / "blt_blocklocal.npz")
    config = HashConfig(sizes=(3, 4, 8), functions=2, rows=97, crosses_documents=True)
    begins_BN = np.zeros_like(golden["x"])
    begins_BN[0, 8:] = 8  # row 0 holds two documents
    assert (hash_ids(config, golden["x"], begins_BN) == golden["hash_ids"]).all()
    within = HashConfig(sizes=(3, 4, 8), functions=2, rows=97)
    changed_BN = (hash_ids(within, golden["x"], begins_BN) != golden["hash_ids"]).any(0)
    assert changed_BN[0, 8:15].any() and not changed_BN[0, [*range(8), *range(15, 20)]].any()
    assert not changed_BN[1].any()


def test_exact_on_device_within_documents():
    print("seed 7")
    random = np.random.default_rng(7)
    x_BN = random.integers(0, 260, (3, 64)).astype(np.int32)
    begins_BN = np.repeat([[0, 20, 21]], 3, axis=0)[:, np.repeat([0, 1, 2], [20, 1, 43])]
    config = HashConfig(sizes=(2, 5, 16), functions=11, rows=2**24)
    found = np.asarray(
        jax.jit(lambda x, b: hash_ids(config, x, b))(jnp.asarray(x_BN), jnp.asarray(begins_BN))
    )
    assert found.shape == (33, 3, 64)
    for table in range(33):
        prime, size = HASH_PRIMES[table // 3], config.sizes[table % 3]
        for row in range(3):
            exact = exact_ids(x_BN[row], prime, size, config.rows, begins_BN[row])
            assert found[table, row].tolist() == exact
    assert (found == hash_ids(config, x_BN, begins_BN)).all()


def test_windows_can_cross_documents():
    begins_BN = np.repeat([[0, 5]], 1, axis=0)[:, [0] * 5 + [1] * 6]
    config = HashConfig(sizes=(4,), crosses_documents=True)
    assert (hash_ids(config, HELLO, begins_BN) == hash_ids(config, HELLO)).all()
