"""A decoder of the 8B, compiled for slices that fit it; unsupported plans are refused."""

import importlib.util
import re

import pytest

from bltjax.configured import load_config
from bltjax.distributed.topology import read_topology
from bltjax.planning.plan_decoder import decoder_report, plan_generate

SIZES = {"groups": 1, "rows": 1, "prompt_bytes": 2048, "context": 32768}


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x2"])
def test_the_8b_decodes_on(topology):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'jax[tpu]' (Linux, x86-64)")
    config = load_config("configs/blt.py:8b", [])
    chips = read_topology(topology)
    found = plan_generate(config, chips, **SIZES)
    assert found.fits and found.mesh == {"data": 1, "fsdp": 1, "tensor": chips.chips}
    # bf16 weights, split: 13 GB of latent layers, 7.7 GB of tables; but widen_KED, of 42 MB, whole.
    widen = 4 * config.model.local.width * config.model.latent.width
    assert found.weights["latent"] < 1.01 * 2 * ((6.5e9 - widen) / chips.chips + widen)
    assert found.total > sum(found.weights.values()) + found.state
    # A step moves its weights once; no table, and nothing of other chips.
    read = found.weights["latent"] + found.state
    assert found.weights["latent"] < found.programs["patch"].moved < 1.5 * read
    assert found.programs["byte"].moved < 2 * sum(found.weights.values()) / 3
    for name in ("byte", "patch", "loop"):
        for each in found.programs[name].collectives:
            assert each["kind"] not in ("all-gather", "all-to-all") or each["bytes"] < 1e6, each
    assert re.search(r"HBM per chip .* fits\n", decoder_report(found, "8b"))


@pytest.mark.parametrize(
    "config, topology, sizes, why",
    [
        ("configs/byte_lm_100m.py", ("v5e:2x4", 1), {}, "plans a BLT"),
        ("configs/blt.py:8b", ("v5e:2x4", 2), {}, "one slice, not 2"),
        ("configs/blt.py:8b", ("v5e:2x4", 1), {"prompt_bytes": 40000}, "40000.*32768"),
    ],
)
def test_what_cannot_be_planned(config, topology, sizes, why):
    with pytest.raises(ValueError, match=why):
        plan_generate(load_config(config, []), read_topology(*topology), **SIZES | sizes)
