import argparse
import ast
import dataclasses
import importlib
import json
import math
import re
import shlex
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh, AxisType

from bltjax.config import (
    BLTConfig,
    ByteLMConfig,
    DataConfig,
    MeshConfig,
    RunConfig,
    differences,
    from_dict,
    to_dict,
)
from bltjax.config_file import load_config
from bltjax.flops import training_flops
from bltjax.sharding import AXES, tree_shardings
from bltjax.training_step import check_mesh
from bltjax.weights.model_files import model_shapes

CONFIGS = sorted(Path("configs").glob("*.py"))


ARGUMENTS = {
    "quickstart": (":byte_lm", ":byte_cnn", ":blt"),
    "blt_8b": ("", ":patch_6", ":patch_8", ":space", ":static"),
}
SPECS = [f"{path}{argument}" for path in CONFIGS for argument in ARGUMENTS.get(path.stem, ("",))]


@pytest.mark.parametrize("spec", SPECS)
def test_every_config_loads_and_survives_json(spec):
    config = load_config(spec)
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_quickstart_spends_equal_flops():
    spent = []
    for model in ("byte_lm", "blt"):
        config = load_config(f"configs/quickstart.py:{model}")
        data = config.data
        step = training_flops(config.model, data.rows, data.row_bytes, data.row_patches)
        spent.append(step * config.optimizer.steps)
    assert spent[0] == pytest.approx(spent[1], rel=0.01)


def test_overrides():
    config = load_config(
        "configs/blt_1b.py",
        ["optimizer.lr=1e-3", "blt.hash.sizes=(3,4)", "data.train.text.path=7", "optimizer.clip=2"],
    )
    assert config.optimizer.lr == 1e-3 and config.blt.hash.sizes == (3, 4)
    assert config.data.train["text"].path == "7" and config.optimizer.clip == 2.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.lr=1", r"config.optimiser is no setting; did you mean 'optimizer'"),
        ("optimizer.lrr=1", r"config.optimizer.lrr is no setting; did you mean 'lr'"),
        ("optimizer.lr=fast", r"config.optimizer.lr is 'fast', not float"),
        ("optimizer.steps=1.5", r"config.optimizer.steps is 1.5, not int"),
        ("optimizer.lr", r"has no value"),
        ("blt.latent.remat=some", r"latent.remat is 'some', not one of none, products, full"),
        ("blt.local.heads=3", r"local.heads \(3\) must divide local.width \(1024\)"),
        ("blt.latent.key_value_heads=5", r"key_value_heads \(5\) must divide latent.heads \(16\)"),
        ("data.row_patches=99999", r"row_patches \(99999\) must not exceed row_bytes \(16384\)"),
        ("mesh.tensor=3", r"mesh.tensor \(3\) must divide latent.heads \(16\)"),
        ("mesh.fsdp=768", r"x mesh.fsdp \(768\) must divide data.rows / .*accumulate \(256\)"),
        ("optimizer.accumulate=3", r"accumulate \(3\) must divide data.rows \(1024\)"),
        ("patching.mode=bpes", r"patching.mode is 'bpes', not one of entropy, space, .*, bpe"),
        ("optimizer.warmup_steps=999999", r"warmup_steps \(999999\) must lie in 0"),
    ],
)
def test_bad_settings_name_the_rule_and_the_numbers(override, message):
    with pytest.raises(ValueError, match=message):
        load_config("configs/blt_1b.py", [override])


def test_settings_that_the_file_does_not_mention_can_be_overridden():
    overrides = [
        "mesh.tensor=2",
        "optimizer.b1=0.8",
        "patching.threshold_add=0.5",
        "blt.local.remat=products",
    ]
    config = load_config("configs/quickstart.py:blt", overrides)
    assert config.mesh.tensor == 2 and config.optimizer.b1 == 0.8
    assert config.patching.threshold_add == 0.5 and config.blt.local.remat == "products"


def test_arguments_of_a_config():
    with pytest.raises(ValueError, match="write :byte_lm, :byte_cnn or :blt"):
        load_config("configs/quickstart.py")
    with pytest.raises(ValueError, match="takes no argument; drop ':big'"):
        load_config("configs/blt_1b.py:big")
    with pytest.raises(ValueError, match="has no function get_config"):
        load_config("tests/test_config.py")


def test_missing_file_names_its_neighbour():
    with pytest.raises(ValueError, match=r"did you mean 'configs/blt_1b.py'"):
        load_config("configs/blt_1.py")


@pytest.mark.parametrize(
    ("variant", "mean"),
    [("", 4.1), (":patch_6", 6), (":patch_8", 8), (":space", 6.1), (":static", 4)],
)
def test_variants_of_the_8b(variant, mean):
    config = load_config(f"configs/blt_8b.py{variant}")
    by_entropy = variant in ("", ":patch_6", ":patch_8")
    assert (config.patching.mode == "entropy") == by_entropy == bool(config.entropy_model)
    assert config.blt.local.encoder_layers == (3 if variant == ":patch_8" else 1)
    # Rows are full of bytes just before they are full of patches of that mean.
    data = config.data
    assert 0.97 * mean <= data.row_bytes / data.row_patches <= mean
    with pytest.raises(ValueError, match="write one of patch_6, patch_8, space, static"):
        load_config("configs/blt_8b.py:patch_7")


def test_one_model_a_run():
    with pytest.raises(ValueError, match="one of byte_lm, byte_cnn and blt"):
        RunConfig()
    with pytest.raises(ValueError, match="one of byte_lm, byte_cnn and blt"):
        RunConfig(byte_lm=ByteLMConfig(), blt=BLTConfig())


def test_small_rows_and_meshes():
    with pytest.raises(ValueError, match="a row needs 2 bytes and 2 patches"):
        DataConfig(row_bytes=1, row_patches=1)
    with pytest.raises(ValueError, match="at most one -1"):
        MeshConfig(data=-1, fsdp=-1)


def test_differences():
    old = to_dict(RunConfig(byte_lm=ByteLMConfig()))
    new = to_dict(dataclasses.replace(RunConfig(byte_lm=ByteLMConfig(layers=3)), seed=5))
    assert differences(old, new) == ["byte_lm.layers: 14 -> 3", "seed: 0 -> 5"]


def test_overriding_one_source_leaves_the_other():
    paths = ["data.train.text.path=a", "data.held_out.text.path=b"]
    data = load_config("tests/tiny.py:blt", paths).data
    assert (data.train["text"].path, data.held_out["text"].path) == ("a", "b")


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text()), clean=False)


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_the_commands_in_docstrings_are_valid(path):
    """Each names its own file, every setting that it overrides exists, and so does every option."""
    lines = docstring(path).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("    python -m bltjax ")]
    told = set()
    for words in commands:
        parser = argparse.ArgumentParser(allow_abbrev=False)
        importlib.import_module(f"bltjax.{words[3]}").add_arguments(parser)
        args, rest = parser.parse_known_args(words[4:])
        if words[3] != "train":
            assert not rest
            continue
        overrides = [
            word.removeprefix("--config.").replace("NATS", "1.5")
            for word in rest
            if word.startswith("--config.")
        ]
        assert args.config.partition(":")[0] == str(path) and len(overrides) == len(rest)
        config = load_config(args.config, overrides)
        told.add(args.config)
        # Only who places patches by entropy needs a byte LM, its threshold and its records.
        by_entropy = config.blt is not None and config.patching.mode == "entropy"
        named = {override.partition("=")[0] for override in overrides}
        assert by_entropy == ({"entropy_model", "patching.threshold"} <= named)
    assert told == {spec for spec in SPECS if spec.partition(":")[0] == str(path)}


def test_the_arithmetic_of_the_quickstart():
    told = docstring(Path("configs/quickstart.py")).replace("\n", " ")
    for model, pattern in (
        ("byte_lm", r"A step is ([\d.]+) GFLOP of the byte LM"),
        ("blt", r"GFLOP of the byte LM and ([\d.]+) of BLT"),
        ("byte_cnn", r"A step is ([\d.]+) GFLOP; state"),
    ):
        config = load_config(f"configs/quickstart.py:{model}")
        data = config.data
        flops = training_flops(config.model, data.rows, data.row_bytes, data.row_patches)
        assert float(re.search(pattern, told).group(1)) == pytest.approx(flops / 1e9, abs=0.06)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "quickstart" not in spec])
def test_meshes_fit_their_pods(spec):
    """The mesh has the chips that the docstring names, and divides all that it splits."""
    config = load_config(spec)
    told = docstring(Path(spec.partition(":")[0]))
    chips, topology = re.search(r"(\d+) chips\s+\(v5p:([\dx]+),", told).groups()
    fsdp = int(chips) if config.mesh.fsdp == -1 else config.mesh.fsdp
    sizes = (config.mesh.data, fsdp, config.mesh.tensor)
    assert math.prod(sizes) == int(chips) == math.prod(map(int, topology.split("x")))
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
    check_mesh(config.model, config.data.rows // config.optimizer.accumulate, mesh)
    tree_shardings(model_shapes(config), mesh)


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem != "quickstart"], ids=str)
def test_the_arithmetic_in_docstrings(path):
    told, config = docstring(path).replace("\n", " "), load_config(str(path))

    def number(pattern: str) -> float:
        return float(re.search(pattern, told).group(1).replace(",", ""))

    data, chips = config.data, number(r"(\d+) chips")
    flops = training_flops(config.model, data.rows, data.row_bytes, data.row_patches)
    assert number(r"([\d.]+) PFLOP ") == pytest.approx(flops / 1e15, rel=0.003)
    seconds = flops / (0.4 * 459e12 * chips)
    assert number(r"([\d.]+) s if the chips") == pytest.approx(seconds, rel=0.03)
    state = 16 * number(r"([\d,]+) parameters") / 1e9
    assert number(r"([\d.]+) GB in all") == pytest.approx(state, rel=0.01)
    assert number(r"([\d.]+) GB a chip") == pytest.approx(state / chips, rel=0.01)
    hours = config.optimizer.steps * seconds / 3600
    per = {"days": 24, "hours": 1}[re.search(r"take \d+ (\w+)", told).group(1)]
    assert number(r"take (\d+) \w+") == pytest.approx(hours / per, abs=0.7)
    for variant, peta in re.findall(r"(patch_\d|space|static) +([\d.]+) ", told):
        variant = load_config(f"{path}:{variant}")
        data = variant.data
        flops = training_flops(variant.model, data.rows, data.row_bytes, data.row_patches)
        assert float(peta) == pytest.approx(flops / 1e15, abs=0.06)
