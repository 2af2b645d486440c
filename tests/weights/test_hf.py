"""The transformers port against ours: recorded outputs always, the port itself where installed."""

import dataclasses
import json

import numpy as np
import port
import pytest
from etils import epath

from bltjax.config.model import Patching
from bltjax.convert.verify import our_model
from bltjax.text.alphabet import encode
from bltjax.text.patching import patch_lengths
from bltjax.weights.lazy import DTYPES, NotFinite, Tensor, blocks
from bltjax.weights.released.hf import port_settings, read_port
from bltjax.weights.released.hf_settings import read_settings
from bltjax.weights.released.leftovers import (
    latent_rotary,
    rotary_stacks,
    without_leftovers,
    without_wrappers,
)
from bltjax.weights.released.mapping import PORT, blt_parts, byte_lm_parts
from bltjax.weights.released.tensors import tensors_of

BFLOAT16 = DTYPES["bfloat16"]

TOLERANCE = 2e-5
RECORDED = np.load(port.RECORDED)


def written(folder, name, **changes):
    """A case's folder, as written by `save_pretrained`; returns its config."""
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
    """Pooling once, a patch that starts after the end: the port's behaviour must be requested."""
    written(tmp_path / "pools", "pools_each_layer")
    model = our_model(read_port(epath.Path(tmp_path / "pools")))
    assert not model.config.model.cross.repools
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
    run = dataclasses.replace(run, patching=Patching(mode="byte"))
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
        (
            {"patching_threshold": float("nan")},
            r"config.json: patching_threshold is nan, not a fin",
        ),
        (
            {"patching_threshold": float("inf")},
            r"config.json: patching_threshold is inf, not a fin",
        ),
        ({"max_patch_length": 2.5}, r"config.json: max_patch_length is 2.5, not int"),
        ({"cross_attn_k": 10**12}, r"cross_attn_k is larger than 2147483647"),
        (
            {"encoder_hash_byte_group_size": [3, "x"]},
            r"config.json: encoder_hash_byte_group_size is",
        ),
        ({"encoder_hash_byte_group_size": [1]}, r"config.json: hash.sizes \(1,\) must lie in 2"),
        (
            {
                "decoder_config": port.CASES["projected"]["decoder_config"]
                | {"num_hidden_layers": 999}
            },
            r"its config asks for 999 layers",
        ),
    ],
)
def test_bad_config(change, message, tmp_path):
    written(tmp_path, "projected", **change)
    with pytest.raises(ValueError, match=message) as caught:
        read_port(epath.Path(tmp_path))
    assert str(tmp_path) in str(caught.value)


ROTARY = {"rope_theta": 5e5, "rope_type": "default"}


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        ({"rope_theta": 1e4, "rope_parameters": ROTARY}, r"gives rope_theta twice, as 10000.0 and"),
        ({"rope_scaling": port.LLAMA3, "rope_parameters": ROTARY}, r"gives rope_type twice, as 'd"),
        (
            {"rope_parameters": {"full_attention": ROTARY}},
            r"have full_attention .*for one kind of l",
        ),
        (
            {"rope_parameters": ROTARY | {"partial_rotary_factor": 0.5}},
            r"partial_rotary_factor is 0",
        ),
        (
            {"rope_parameters": port.LLAMA3 | {"attention_factor": 2}},
            r"attention_factor is 2; supp",
        ),
        (
            {"rope_parameters": port.LLAMA3 | {"mscale": 1.0}},
            r"'llama3' have mscale \(1.0\), which is",
        ),
        (
            {"rope_parameters": ROTARY | {"factor": 8.0}},
            r"'default' have factor \(8.0\), which is not",
        ),
        (
            {"rope_parameters": ROTARY | {"type": "linear"}},
            r"gives rope_type twice, as 'default' and",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_type is 'linear'; supported"),
        ({"rope_parameters": {"rope_theta": "x"}}, r"rope_theta is 'x', not float"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, r"rope_theta is nan, not a finite"),
        ({"rope_theta": 0}, r"rope_theta is 0, not > 0"),
        ({"rope_parameters": port.LLAMA3 | {"factor": [8]}}, r"factor is \[8\], not float"),
    ],
)
def test_bad_rotary_settings(stack, message):
    for part in ("global_config", "patcher_config"):
        config = port.CASES["projected"]
        own = {k: v for k, v in config[part].items() if k != "rope_parameters"}
        with pytest.raises(ValueError, match=rf"x: {part}.*{message}"):
            read_settings(config | {part: own | stack}, "x", False)


def test_spellings_of_rotary_settings():
    config = port.CASES["projected"]
    own = {k: v for k, v in config["global_config"].items() if k != "rope_parameters"}
    scaling = {k: v for k, v in port.LLAMA3.items() if k != "rope_theta"}
    found = [
        read_settings(config | {"global_config": own | stack}, "x", False)[0].model.latent
        for stack in (
            {"rope_parameters": port.LLAMA3 | {"partial_rotary_factor": 1.0}},
            {"rope_theta": 5e5, "rope_scaling": scaling},
            {"rope_theta": 500000, "rope_scaling": scaling, "rope_parameters": None},
            {"rope_theta": 5e5, "rope_parameters": port.LLAMA3 | {"type": "llama3"}},
            {
                "rope_scaling": port.LLAMA3 | {"attention_factor": None},
                "rope_parameters": port.LLAMA3,
            },
        )
    ]
    assert found[0].rope_scaling.positions == 32 and found[0].rope_theta == 5e5
    assert all(one == found[0] for one in found)


def folder_with(folder, more: dict, name="projected", config=None, wrapped=""):
    """A case's folder with more tensors, all named as by a wrapper of torch."""
    config = written(folder, name) | (config or {})
    tensors = port.tensors_by_rule(port.shapes_of(*port.configs_of(config, 1.0)))
    for extra, array in more.items():
        array = tensors[array].all() if isinstance(array, str) else array
        tensors[extra] = Tensor(array.shape, array.dtype, lambda a, b, x=array: x[a:b], "more")
    port.write_tensors(folder, {wrapped + key: tensor for key, tensor in tensors.items()})
    (folder / "config.json").write_text(json.dumps(config))
    return epath.Path(folder)


def same_leaves(one, other) -> bool:
    pairs = [(one, other), (one.byte_lm, other.byte_lm)]
    for a, b in pairs:
        assert a.config == b.config and a.leaves.keys() == b.leaves.keys()
        for path, leaf in a.leaves.items():
            for place, rows in blocks(path, leaf):
                assert (leaf.read(place, rows) == b.leaves[path].read(place, rows)).all()
    return True


def test_names_of_torchs_wrappers(tmp_path):
    written(tmp_path / "plain", "projected")
    plain = read_port(epath.Path(tmp_path / "plain"))
    files = read_port(folder_with(tmp_path / "wrapped", {}, wrapped="_orig_mod.module."))
    assert same_leaves(files, plain)
    assert "all tensors have the prefix _orig_mod.module. of torch's wrappers" in files.notes[0]
    for wrapped in ("module.", "_orig_mod.", "module._orig_mod.", "module.module."):
        notes = []
        assert without_wrappers({f"{wrapped}a": 1, f"{wrapped}module.b": 2}, notes) == {
            "a": 1, "module.b": 2
        } and len(notes) == 1  # fmt: skip
    some = {"module.a": 1, "b": 2}
    assert without_wrappers(some, notes) == some and len(notes) == 1
    assert without_wrappers({}, []) == {}


def test_second_copies(tmp_path):
    """An embedding that is stored twice is read once; a copy with other numbers is refused."""
    table, place = (
        "model.local_encoder.embed_tokens.weight",
        "model.local_decoder.embed_tokens.weight",
    )
    files = read_port(folder_with(tmp_path / "twice", {place: table}))
    written(tmp_path / "plain", "projected")
    assert same_leaves(files, read_port(epath.Path(tmp_path / "plain")))
    assert files.notes == (f"{place} left out: it is {table} once more, bit for bit",)
    other = port.by_rule("other", (260, 32))
    with pytest.raises(
        ValueError, match=rf"has tensor {place} of shape .* which its config has no"
    ):
        read_port(folder_with(tmp_path / "other", {place: other}))
    layer = "model.global_transformer.layers.7.input_layernorm.weight"
    copied = {layer: layer.replace("7", "0")}  # a layer too many is no copy
    with pytest.raises(
        ValueError, match=rf"has tensor {layer} of shape .* which its config has no"
    ):
        read_port(folder_with(tmp_path / "layer", copied))


def test_buffers_of_rotary_rates(tmp_path):
    """Older checkpoints have them: dropped where the config agrees, else refused."""
    rates = 5e5 ** (-np.arange(0, 8, 2) / 8)
    slow = 1e4 ** (-np.arange(0, 8, 2) / 8)
    latent = latent_rotary(port.configs_of(port.CASES["grouped_and_scaled"], 1.0)[0].model.latent)
    assert not np.allclose(latent.rates, 5e5 ** (-np.arange(0, 12, 2) / 12), rtol=0.1)
    good = {
        "model.local_encoder.rotary_emb.inv_freq": rates.astype(np.float32),
        "model.local_decoder.layers.0.self_attn.rotary_emb.inv_freq": rates.astype(BFLOAT16),
        "model.global_transformer.rotary_emb.inv_freq": latent.rates.astype(np.float32),
        "model.global_transformer.rotary_emb.original_inv_freq": (
            latent._replace(scaling=None).rates.astype(np.float16)
        ),
        "model.patcher.rotary_emb.inv_freq": slow.astype(np.float32),
    }
    files = read_port(folder_with(tmp_path / "good", good, "grouped_and_scaled"))
    assert "inv_freq and 3 more left out: the rotary rates of the config" in files.notes[0]
    assert "model.patcher.rotary_emb.inv_freq left out" in files.byte_lm.notes[0]
    for name, array in good.items():
        bad = array.copy()
        bad[2] *= 1.1
        tensors = {name: Tensor(bad.shape, bad.dtype, lambda a, b, x=bad: x[a:b], "the file")}
        stacks = rotary_stacks(PORT, files.config.model) | rotary_stacks(
            PORT, files.byte_lm.config.model
        )
        with pytest.raises(ValueError, match=rf"the file: {name} is [\d.e-]+ at 2; .* is [\d.e-]+"):
            without_leftovers(tensors, set(), stacks, [])
        tensors = {name: tensors[name]._replace(shape=(3,))}
        with pytest.raises(ValueError, match=r"has shape \(3,\); its config has \d rotary rates"):
            without_leftovers(tensors, set(), stacks, [])


@pytest.mark.parametrize("dtype", ["float64", "int32", "F8_E5M2"])
def test_dtypes_that_are_refused(dtype, tmp_path):
    config = written(tmp_path, "projected")
    tensors = port.tensors_by_rule(port.shapes_of(*port.configs_of(config, 1.0)))
    name = "model.local_decoder.norm.weight"
    array = tensors[name].all().astype("float64" if dtype.startswith("F8") else dtype)
    tensors[name] = Tensor(array.shape, array.dtype, lambda a, b: array[a:b], "")
    port.write_tensors(tmp_path, tensors)
    if dtype.startswith("F8"):  # of one byte each, where the norm's eight were
        data = (tmp_path / "model.safetensors").read_bytes()
        data = data.replace(b'"F64","shape":[32]', b'"F8_E5M2","shape":[256]')
        size = int.from_bytes(data[:8], "little") + len('"F8_E5M2","shape":[256]') - 18
        (tmp_path / "model.safetensors").write_bytes(size.to_bytes(8, "little") + data[8:])
    with pytest.raises(ValueError, match=rf"model.safetensors: tensor {name} has dtype {dtype}"):
        read_port(epath.Path(tmp_path))


def test_dtypes_of_each_tensor(tmp_path):
    """float32, bfloat16 and float16 within one stack: each is read as stored."""
    config = port.CASES["projected"] | {"patching_threshold": 1.0}
    shapes = port.shapes_of(*port.configs_of(config, 1.0))
    kinds = (np.float32, BFLOAT16, np.float16)
    dtypes = {name: kinds[number % 3] for number, name in enumerate(shapes)}
    tensors = port.tensors_by_rule(shapes, dtypes)
    port.write_tensors(tmp_path, tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    files = read_port(epath.Path(tmp_path))
    back = tensors_of(files.leaves, blt_parts(PORT, files.config.model), {})
    assert back.keys() < tensors.keys() and len(back) > 30
    for name, tensor in back.items():
        stored = tensors[name].all()
        assert (tensor.all().astype(np.float32) == stored.astype(np.float32)).all(), name


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite(value, tmp_path):
    name = "model.global_transformer.layers.1.mlp.up_proj.weight"
    array = port.by_rule(name, (64, 48))
    array[3, 5] = array[7, 1] = value
    files = read_port(folder_with(tmp_path, {name: array}))
    leaf = files.leaves["latent/blocks/up_LDF"]
    leaf.read((0,), slice(None))
    with pytest.raises(NotFinite) as caught:
        leaf.read((1,), slice(None))
    assert str(caught.value) == (
        f"{tmp_path}/model.safetensors: tensor {name} holds numbers that are not finite: {value} at"
        " [3, 5]; 2 of the 3,072 read with it"
    )


def test_the_port_itself(tmp_path):
    """With torch and transformers installed: the recording equals their output, and `verify`
    agrees."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from bltjax.convert.convert import convert, open_model
    from bltjax.convert.verify import verify

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
    from bltjax.convert.convert import convert

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
        parts = blt_parts(PORT, run.model) + byte_lm_parts(PORT, byte_lm.model)
        indices = [(part.path, part.index) for part in parts]
        assert len(indices) == len(set(indices)), name
