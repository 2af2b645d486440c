"""The byte CNN sees its context and no more, and its table is its forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bltjax import families
from bltjax.inference.entropy import contexts, score_documents
from bltjax.model.byte_cnn import ByteCNN, ByteCNNConfig, entropy_table, table_entropies
from bltjax.model.byte_lm import entropies_of

CONFIG = ByteCNNConfig(context=2, width=16, layers=1, hidden=32)


def test_table_is_the_forward_pass():
    random = np.random.default_rng(3)
    ids_BN = random.integers(0, 260, (2, 40)).astype(np.int32)
    documents_BN = np.repeat([[1, 2, 3], [1, 1, 2]], [13, 7, 20], axis=1).astype(np.int32)
    model = ByteCNN(CONFIG)
    params = model.init(jax.random.key(0), ids_BN, documents_BN)["params"]
    logits_BNV, _ = model.apply({"params": params}, ids_BN, documents_BN)
    table = entropy_table(CONFIG, params)
    assert table.shape == (260, 260)
    found = [table_entropies(table, *row) for row in zip(ids_BN, documents_BN, strict=True)]
    np.testing.assert_allclose(found, entropies_of(logits_BNV), atol=1e-5)

    # Two bytes of context: earlier bytes have no effect.
    other = jnp.asarray(ids_BN).at[:, 20].set(7)
    changed = model.apply({"params": params}, other, documents_BN)[0] != logits_BNV
    assert np.flatnonzero(changed.any(axis=(0, 2))).tolist() == [20, 21]

    # Scoring looks up; with newline_reset a line begins with its newline, after nothing.
    text = np.frombuffer(b"ab\nab", np.uint8)
    (plain,), _ = score_documents(CONFIG, params, [text])
    (reset,), _ = score_documents(CONFIG, params, [text], newline_reset=True)
    assert (plain != reset).tolist() == [False, False, False, True, False, False]
    assert reset[3] == table[0, 14]


def test_the_table_is_made_once_for_a_model(monkeypatch):
    made = []

    def counted(config, params):
        made.append(config)
        return entropy_table(config, params)

    family = families.FAMILIES["byte_cnn"]._replace(entropy_table=counted)
    monkeypatch.setitem(families.FAMILIES, "byte_cnn", family)
    ids_BN = np.ones((1, 4), np.int32)
    text = np.frombuffer(b"ab", np.uint8)
    models = [ByteCNN(CONFIG).init(jax.random.key(n), ids_BN, ids_BN)["params"] for n in (7, 8)]
    scored = [score_documents(CONFIG, models[n], [text])[0][0] for n in (0, 0, 0, 1, 1)]
    assert len(made) == 2
    assert (scored[0] == scored[2]).all() and (scored[3] == scored[4]).all()
    assert (scored[0] != scored[3]).any()


def test_contexts_begin_with_newlines():
    ids = np.array([1, 101, 14, 14, 102])
    assert contexts(ids, False).tolist() == [1] * 5
    assert contexts(ids, True).tolist() == [1, 1, 2, 3, 3]


def test_context_has_a_limit():
    with pytest.raises(ValueError, match=r"byte_cnn.context \(4\) must be 1 ... 3"):
        ByteCNNConfig(context=4)
