"""The transformers port against ours: recorded outputs always, the port itself where it is."""

import dataclasses
import json

import numpy as np
import port
import pytest
from etils import epath

from bltjax.alphabet import encode
from bltjax.config import PatchingConfig
from bltjax.convert import our_model
from bltjax.patching import patch_lengths
from bltjax.weights.pieces import PORT, blt_pieces, byte_lm_pieces
from bltjax.weights.port import port_settings, read_port, read_settings

TOLERANCE = 2e-5
RECORDED = np.load(port.RECORDED)


def written(folder, name, **changes):
    """A case's folder, as `save_pretrained` leaves it; returns its config."""
    config = port.CASES[name] | {"patching_threshold": float(RECORDED[f"{name}/threshold"])}
    tensors = port.tensors_by_rule(port.shapes_of(*port.configs_of(config, 1.0)))
    port.write_tensors(folder, tensors)
    (folder / "config.json").write_text(json.dumps(config | changes))
    return config


def scores(model, text):
    return model.entropies(text), port.rows_of(model.logits(text))


SLOW = ("unprojected", "two_functions", "decoder_first", "no_window")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in port.CASES]
)
def test_as_the_port(name, tmp_path):
    written(tmp_path, name)
    model = our_model(read_port(epath.Path(tmp_path), as_port=True))
    for number, text in enumerate(port.TEXTS):
        entropies, logits = scores(model, text)
        recorded = RECORDED[f"{name}/entropies_{number}"]
        np.testing.assert_allclose(entropies, recorded, atol=TOLERANCE, rtol=0)
        near = np.abs(recorded - model.config.threshold) < 1e-4
        assert not near.any(), "a recorded entropy is too near the threshold to test boundaries"
        recorded = RECORDED[f"{name}/logits_{number}"]
        np.testing.assert_allclose(logits, recorded, atol=TOLERANCE, rtol=0)
    assert len(model.patches(port.TEXT)) > 10


def test_released_meaning_is_the_default(tmp_path):
    """Pooling once, a patch that begins after the end: the port's ways must be asked for."""
    written(tmp_path / "pools", "pools_each_layer")
    model = our_model(read_port(epath.Path(tmp_path / "pools")))
    assert not model.config.blt.cross.repools
    assert np.abs(scores(model, port.TEXT)[1] - RECORDED["pools_each_layer/logits_1"]).max() > 0.1
    written(tmp_path / "longest", "longest_patch")
    model = our_model(read_port(epath.Path(tmp_path / "longest")))
    for size in range(1, 40):  # incremental: a prefix's starts are the prefix of the starts
        starts = model.starts(port.TEXT.encode()[:size])
        assert (starts == model.starts(port.TEXT.encode()[:40])[: size + 2]).all()
        assert max(patch_lengths(starts)) <= 3


def test_other_patching_modes(tmp_path):
    config = written(tmp_path, "projected", patching_mode="space")
    assert (
        read_settings(config | {"patching_mode": "space"}, "x", False)[0].patching.mode == "space"
    )
    assert read_port(epath.Path(tmp_path), as_port=True).config.patching.mode == "byte"


def test_what_the_conversion_of_metas_files_leaves():
    """Fields that the port never reads: without effect, or settings of the patching."""
    config = port.CASES["projected"] | {
        "realtime_patching": True, "patching_device": "cuda", "pm_size": 0, "monotonicity": True,
        "patching_threshold_add": 0.0,
    }  # fmt: skip
    for part in ("encoder_config", "decoder_config", "global_config", "patcher_config"):
        config[part] = config[part] | {"norm_eps": 1e-5, "attn_impl": "sdpa", "pm_size": 0}
    run, _, _ = read_settings(config, "x", False)
    assert run.patching.monotonic and run.patching.threshold_add is None
    run, _, notes = read_settings(config | {"patching_threshold_add": 0.2}, "x", True)
    assert not run.patching.monotonic and "left out: the port has none" in notes[0]
    config["encoder_config"]["norm_eps"] = 1e-6
    with pytest.raises(ValueError, match=r"norm_eps \(1e-06\) and rms_norm_eps \(1e-05\)"):
        read_settings(config, "x", False)


def test_patches_of_a_byte_need_no_byte_lm():
    run, _ = port.configs_of(port.CASES["projected"], 1.5)
    run = dataclasses.replace(run, patching=PatchingConfig(mode="byte"))
    for as_port in (False, True):
        again = read_settings(port_settings(run, None), "written", as_port)
        assert again[0].patching.mode == "byte" and again[1] is None


@pytest.mark.parametrize("name", [n for n in port.CASES if n != "no_window"])
def test_settings_survive_being_written(name):
    """Their config -> ours -> theirs -> ours: nothing that the model depends on is lost."""
    run, byte_lm = port.configs_of(port.CASES[name], 1.5)
    again = read_settings(port_settings(run, byte_lm), "written", True)
    assert again[:2] == (run, byte_lm)


def test_settings_that_the_port_lacks():
    run, byte_lm = port.configs_of(port.CASES["projected"], 1.5)
    monotonic = dataclasses.replace(run.patching, monotonic=True)
    with pytest.raises(ValueError, match=r"no way to say patching.monotonic"):
        port_settings(dataclasses.replace(run, patching=monotonic), byte_lm)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hash_size": 3}, r"config.json has a field 'hash_size' \(3\) that is not known"),
        ({"vocab_size": 300}, r"vocab_size is 300; supported: 260"),
        ({"cross_attn_k": 5}, r"tensor lm_head|lacks tensor|has shape"),
        ({"encoder_hash_byte_group_vocab": 96}, r"encoder_hash_tok_embedding.weight has shape"),
        ({"tie_word_embeddings": True}, r"tie_word_embeddings is True; supported: False"),
        ({"patching_threshold": "1"}, r"patching_threshold is '1', not float"),
        (
            {"patching_threshold": None},
            r"patching_mode is 'entropy' and patching_threshold is null",
        ),
        ({"global_config": []}, r"global_config is list, not an object"),
        (
            {"global_config": {"rope_parameters": {"rope_type": "llama3"}}},
            r"rotary settings of type 'llama3' lack factor",
        ),
    ],
)
def test_bad_config(change, message, tmp_path):
    written(tmp_path, "projected", **change)
    with pytest.raises(ValueError, match=message):
        read_port(epath.Path(tmp_path))


def test_the_port_itself(tmp_path):
    """Where torch and transformers are: what was recorded is what they say, and `verify` agrees."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from bltjax.convert import convert, open_model, verify

    for name, config in port.CASES.items():
        threshold = float(RECORDED[f"{name}/threshold"])
        tensors = port.tensors_by_rule(port.shapes_of(*port.configs_of(config, 1.0)))
        said = port.record_port(config, tensors, threshold)
        for number in range(len(port.TEXTS)):
            for what in ("entropies", "logits"):
                recorded = RECORDED[f"{name}/{what}_{number}"]
                np.testing.assert_allclose(said[what][number], recorded, atol=1e-5, rtol=0)
        source = tmp_path / name
        written(source, name)
        found, _ = convert(
            epath.Path(source), epath.Path(tmp_path / f"{name}-export"), "orbax", as_port=True
        )
        verdict = verify(found, open_model(epath.Path(tmp_path / f"{name}-export")))
        assert verdict.by == ("transformers", "bltjax") and verdict.boundaries > 20
        assert max(verdict.entropies, verdict.logits) < TOLERANCE and verdict.differing == 0


def test_transformers_loads_what_we_write(runs, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import bltjax
    from bltjax.convert import convert

    convert(epath.Path(runs.blt), epath.Path(tmp_path / "out"), "transformers")
    peer, said = transformers.BltForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not said["missing_keys"] and not said["unexpected_keys"]
    ours, text = bltjax.load(runs.blt), "the patch begins where the next byte is"
    begins = np.flatnonzero(ours.starts(text))
    ids = torch.from_numpy(encode(text, eos=False)).long()[None]
    lengths = torch.from_numpy(np.diff(np.append(begins, ids.shape[1])))[None]
    with torch.no_grad():
        logits = peer.eval()(ids, patch_lengths=lengths, use_cache=False).logits[0].numpy()
    np.testing.assert_allclose(ours.logits(text), logits, atol=TOLERANCE, rtol=0)


def test_every_tensor_has_one_place():
    for name, config in port.CASES.items():
        run, byte_lm = port.configs_of(config, 1.0)
        pieces = blt_pieces(PORT, run.blt) + byte_lm_pieces(PORT, byte_lm.byte_lm)
        places = [(piece.path, piece.place) for piece in pieces]
        assert len(places) == len(set(places)), name
