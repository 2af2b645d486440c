"""Bad batches leave no trace but their count, or stop the run; a spike is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import command, losses

from bltjax.__main__ import main
from bltjax.config.run import FaultsConfig, OptimizerConfig
from bltjax.training.optimizer import SETTLED, guarded, make_optimizer

SKIP = FaultsConfig(bad_batch="skip", spike=2.0)


def updates_of(faults: FaultsConfig, batches):
    """Parameters and guard after batches of (gradient, loss, norm)."""
    optimizer = guarded(make_optimizer(OptimizerConfig(lr=0.1, warmup_steps=0)), faults)
    params = {"up_DF": jnp.ones((2, 2))}
    guard = optimizer.init(params)

    @jax.jit
    def step(params, guard, grad, loss, norm):
        updates, guard = optimizer.update(
            {"up_DF": jnp.full((2, 2), grad)}, guard, params, loss=loss, norm=norm
        )
        return jax.tree.map(jnp.add, params, updates), guard

    for batch in batches:
        params, guard = step(params, guard, *map(jnp.float32, batch))
    return params, guard


@pytest.mark.parametrize(
    "bad", [(np.nan, 3.0, np.nan), (1.0, np.inf, 1.0), (1.0, 6.3, 1.0)], ids=["nan", "inf", "spike"]
)
def test_skipping_leaves_no_trace(bad):
    good = [(0.5, 3.0, 1.0), (-0.2, 3.1, 1.0)] * (SETTLED // 2)
    after = [(0.3, 3.0, 1.0)]
    straight, _ = updates_of(SKIP, good + after)
    params, guard = updates_of(SKIP, [*good, bad, bad, *after])
    np.testing.assert_array_equal(params["up_DF"], straight["up_DF"])
    assert (int(guard.skipped), int(guard.in_a_row)) == (2, 0)
    assert float(guard.mean_loss) == pytest.approx(3.05, abs=0.01)
    _, guard = updates_of(SKIP, [*good, bad, bad])
    assert int(guard.in_a_row) == 2


def test_a_spike_is_one_only_after_some_good_batches():
    _, guard = updates_of(SKIP, [(0.5, 3.0, 1.0)] * (SETTLED - 1) + [(0.5, 9.0, 1.0)])
    assert int(guard.skipped) == 0


def test_too_many_in_a_row_end_the_run(runs, tmp_path, capsys):
    """An update of 1e38 makes every later batch bad."""
    words = [
        "--config.optimizer.lr=1e38", "--config.optimizer.warmup_steps=0",
        "--config.faults.bad_batch=skip", "--config.faults.most_skips=2",
    ]  # fmt: skip
    assert main(command(runs, "byte_lm", tmp_path, *words)) == 1
    captured = capsys.readouterr()
    assert "step 3: " in captured.out and "batch skipped, 2 in a row, 2 in total" in captured.out
    assert "step 4: " in captured.err and "Skipped 2 in a row before." in captured.err


def test_skipping_changes_no_good_run(runs, tmp_path):
    words = ("--config.faults.bad_batch=skip", "--config.faults.spike=3.0")
    assert main(command(runs, "byte_lm", tmp_path, *words)) == 0
    # Another program, which may round differently.
    assert losses(tmp_path) == pytest.approx(losses(runs.byte_lm), abs=1e-5)
