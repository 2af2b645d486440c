"""Meta's files: read with every field accounted for, and written back unchanged."""

import json

import numpy as np
import pytest
from etils import epath
from port import write_tensors
from test_golden import META, arrays, weights_of

from bltjax.convert.convert import as_dtype, convert, open_model
from bltjax.weights.lazy import Tensor, blocks
from bltjax.weights.released.meta import read_meta, write_meta
from bltjax.weights.released.meta_settings import (
    blt_settings,
    feed_forward_rule,
    hidden_width,
    read_patching,
)

ARGS = META["blocklocal"]["args"]
PATCHER = {"patching_mode": "entropy", "threshold": 1.5, "monotonicity": False, "device": "cuda"}
SETTINGS = {"name": "run", "model": ARGS, "data": {"patcher_args": PATCHER, "seq_len": 8}}
BYTE_LM = META["entropy_lm"]["args"]


def tensors(name: str, dtypes: dict | None = None) -> dict[str, Tensor]:
    found = {}
    for key, array in weights_of(arrays(name)).items():
        array = array.astype((dtypes or {}).get(key, np.float32))
        found[key] = Tensor(array.shape, array.dtype, lambda a, b, x=array: x[a:b], name)
    return found


def hub_folder(folder, dtypes=None, *, byte_lm=True) -> epath.Path:
    """The golden model as its Hugging Face folder, with its byte LM."""
    write_tensors(folder, tensors("blt_blocklocal", dtypes))
    (folder / "config.json").write_text(json.dumps({"args": ARGS}))
    (folder / "train_args.json").write_text(json.dumps(SETTINGS))
    if byte_lm:
        write_tensors(folder / "entropy_model", tensors("entropy_lm"))
        (folder / "entropy_model" / "params.json").write_text(
            json.dumps({"entropy_model": BYTE_LM})
        )
    return epath.Path(folder)


def pickled_folder(folder, byte_lm=True):
    """The same as `consolidated.pth` and `params.json`."""
    torch = pytest.importorskip("torch")
    for part, name, settings in (
        ("", "blt_blocklocal", SETTINGS),
        ("entropy_model", "entropy_lm", {"entropy_model": BYTE_LM}),
    ):
        (folder / part).mkdir(parents=True)
        weights = {k: torch.from_numpy(v.all()) for k, v in tensors(name).items()}
        torch.save({"model": weights, "optim": None}, folder / part / "consolidated.pth")
        (folder / part / "params.json").write_text(json.dumps(settings))
    return epath.Path(folder)


def test_settings(tmp_path):
    files = read_meta(hub_folder(tmp_path))
    blt, patching = files.config.model, files.config.patching
    assert (blt.local.width, blt.latent.width, blt.cross.slots, blt.cross.heads) == (32, 48, 2, 2)
    assert (blt.local.hidden, blt.latent.hidden, blt.local.window) == (96, 128, 6)
    assert blt.hash.sizes == (3, 4, 8) and blt.hash.functions == 2 and blt.hash.rows == 97
    assert (patching.mode, patching.threshold, patching.monotonic) == ("entropy", 1.5, False)
    assert files.byte_lm.config.model.window == 6 and not files.notes


def test_released_hidden_widths():
    for width, hidden in ((768, 2048), (1024, 2816), (1280, 3584), (2048, 5632), (4096, 11008)):
        assert hidden_width(width, 1.0, 256) == hidden == hidden_width(width, None, 256)
    assert feed_forward_rule([(1024, 2816), (2048, 5632)])["multiple_of"] == 256
    with pytest.raises(ValueError, match="no rule of theirs gives 32 -> 95"):
        feed_forward_rule([(32, 95)])


def test_what_is_left_out_is_said(tmp_path):
    notes = []
    assert read_patching({}, "x", notes).threshold == 1.335442066192627
    assert "patching_mode entropy, threshold 1.335442066192627, as released" in notes[0]
    folder = hub_folder(tmp_path, byte_lm=False)
    args = ARGS | {"cross_attn_window_encoder": 512}
    del args["local_attention_window_len"]
    (tmp_path / "config.json").write_text(json.dumps({"args": args}))
    files = read_meta(folder)
    assert files.config.model.local.window == 512 and files.byte_lm is None
    assert [note.partition(" ")[0] for note in files.notes] == [
        "cross_attn_window_encoder=512",
        "local_attention_window_len",
    ]


def test_a_byte_lm_with_its_whole_training_file(tmp_path):
    """Its params.json may describe a BLT too: the tensors decide."""
    write_tensors(tmp_path, tensors("entropy_lm"))
    settings = {"model": ARGS, "entropy_model": BYTE_LM}
    (tmp_path / "params.json").write_text(json.dumps(settings))
    assert read_meta(epath.Path(tmp_path)).config.model.layers == 2


def same_files(one: epath.Path, other: epath.Path) -> None:
    """Every tensor bit for bit, and every JSON file."""
    from bltjax.weights.released.torch_file import read_pth
    from bltjax.weights.safetensors import read_folder

    read = read_pth if (one / "consolidated.pth").exists() else None
    first, second = (
        read(f / "consolidated.pth") if read else read_folder(f, []) for f in (one, other)
    )
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert (tensor.all().view(np.uint8) == second[name].all().view(np.uint8)).all(), name
    names = {path.name for path in one.glob("*.json")}
    assert names == {path.name for path in other.glob("*.json")}
    for name in names:
        assert json.loads((one / name).read_text()) == json.loads((other / name).read_text())


@pytest.mark.parametrize("container", ["safetensors", "pth"])
def test_round_trip(container, tmp_path):
    """Meta -> export -> Meta, tensors of several dtypes among one stack."""
    if container == "pth":
        source = pickled_folder(tmp_path / "in")
    else:
        odd = {
            "global_transformer.layers.1.attention.wq.weight": np.float16,
            "local_decoder.norm.weight": np.float16,
        }
        source = hub_folder(tmp_path / "in", odd)
    export, back = epath.Path(tmp_path / "export"), epath.Path(tmp_path / "back")
    convert(source, export, "orbax")
    convert(export, back, "meta")
    same_files(source, back)
    same_files(source / "entropy_model", back / "entropy_model")


def test_other_dtypes_round_once(tmp_path):
    files = as_dtype(open_model(hub_folder(tmp_path)), "bfloat16")
    leaf = files.leaves["latent/blocks/q_LDHC"]
    whole = leaf.read((0,), slice(None))
    kept = open_model(epath.Path(tmp_path)).leaves["latent/blocks/q_LDHC"].read((0,), slice(None))
    assert (whole == kept.astype(whole.dtype)).all() and whole.dtype.name == "bfloat16"


def test_our_own_models_in_their_files(runs, tmp_path):
    """A model that never was Meta's gets a params.json that the importer can read."""
    pytest.importorskip("torch")
    source = read_meta(hub_folder(tmp_path / "in"))
    source = source._replace(origin={}, byte_lm=source.byte_lm._replace(origin={}))
    (tmp_path / "out").mkdir()
    write_meta(source, epath.Path(tmp_path / "out"), lambda _: None)
    again = read_meta(epath.Path(tmp_path / "out"))
    assert again.config == source.config and again.byte_lm.config == source.byte_lm.config
    for path, leaf in source.leaves.items():
        for place, rows in blocks(path, leaf):
            assert (leaf.read(place, rows) == again.leaves[path].read(place, rows)).all(), path
    with pytest.raises(ValueError, match="no rule of theirs gives 16 -> 32, 32 -> 48"):
        blt_settings(open_model(epath.Path(runs.blt)).config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim_globl": 3}, r"field 'dim_globl' \(3\) that is not known; did you mean 'dim_global'"),
        ({"cross_attn_encoder": False}, r"cross_attn_encoder is False; supported: True"),
        ({"dim_global": "48"}, r"dim_global is '48', not int"),
        ({"cross_attn_k": None}, r"does not give cross_attn_k"),
        ({"dim_local_decoder": 64}, r"dim_local_encoder \(32\) and dim_local_decoder \(64\)"),
        ({"n_layers_global": 3}, r"lacks tensor global_transformer.layers.2.* and 8 more"),
        ({"n_layers_global": 1}, r"has tensor global_transformer.layers.1.*no place for"),
        ({"multiple_of": 64}, r"tensor .*feed_forward.w1.weight has shape .*asks for"),
    ],
)
def test_bad_arguments(change, message, tmp_path):
    folder = hub_folder(tmp_path, byte_lm=False)
    (tmp_path / "config.json").write_text(json.dumps({"args": ARGS | change}))
    with pytest.raises(ValueError, match=message):
        read_meta(folder)


def test_a_pth_of_wrapped_names_that_is_cut(tmp_path):
    torch = pytest.importorskip("torch")
    whole = read_meta(pickled_folder(tmp_path / "in"))
    path = tmp_path / "in" / "consolidated.pth"
    state = {
        f"_orig_mod.module.{name}": torch.from_numpy(tensor.all())
        for name, tensor in tensors("blt_blocklocal").items()
    }
    torch.save({"model": state}, path)
    found = read_meta(epath.Path(tmp_path / "in"))
    assert found.notes[0].startswith("all tensors have the prefix _orig_mod.module. of torch's")
    for name, leaf in whole.leaves.items():
        assert (leaf.shape, leaf.dtype) == (found.leaves[name].shape, found.leaves[name].dtype)
    leaf, size = found.leaves["decoder/norm_E"], path.stat().st_size
    assert np.isfinite(leaf.read((), slice(None))).all()
    with path.open("r+b") as file:
        file.truncate(size // 2)
    with pytest.raises(ValueError, match=rf"consolidated.pth has {size // 2} bytes; it had {size}"):
        leaf.read((), slice(None))


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"model": {"x": Evil()}}, tmp_path / "consolidated.pth")
    (tmp_path / "params.json").write_text(json.dumps(SETTINGS))
    with pytest.raises(ValueError, match=r"consolidated.pth is not a plain state dict"):
        read_meta(epath.Path(tmp_path))
    torch.save({"weights": {}}, tmp_path / "consolidated.pth")
    with pytest.raises(ValueError, match=r"no state dict under 'model'; it has \['weights'\]"):
        read_meta(epath.Path(tmp_path))
