"""The order of records: each once per epoch, another order each time, the same for a seed."""

import itertools

import numpy as np

from bltjax.data.shuffle import BLOCK, Order, permuted


def test_every_record_once_an_epoch():
    for length in [*range(1, 40), 255, 256, 257, 1025, 5000]:
        order = Order(length, seed=length)
        for epoch in range(2):
            found = [order[epoch * length + i] for i in range(length)]
            assert sorted(found) == list(range(length)), length


def test_blocks_and_order_of_asking_make_no_difference():
    length = 2 * BLOCK + 100
    whole_Q = permuted(np.arange(length), length, seed=3, epoch=1)
    order = Order(length, seed=3)
    for place in (0, length - 1, BLOCK, 5, BLOCK - 1, 2 * BLOCK):
        assert order[length + place] == whole_Q[place]


def test_seeds_and_epochs_are_other_orders():
    orders = [
        permuted(np.arange(1000), 1000, seed, epoch)
        for seed in (0, 1, 2**32 - 1)
        for epoch in (0, 1)
    ]
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).sum() < 15  # one, for two independent orders
    for order in orders:
        places = np.arange(1000)
        assert abs(np.corrcoef(order, places)[0, 1]) < 0.1
        assert 0.2 < np.mean(np.diff(order) > 0) < 0.8 and (np.diff(order) == 1).sum() < 10


def test_every_permutation_of_few_is_about_as_frequent():
    seen: dict[tuple, int] = {}
    for seed in range(2400):
        found = tuple(permuted(np.arange(4), 4, seed, 0).tolist())
        seen[found] = seen.get(found, 0) + 1
    assert len(seen) == 24 and max(seen.values()) < 200
