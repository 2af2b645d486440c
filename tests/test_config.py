import ast
import dataclasses
import json
import shlex
from pathlib import Path

import pytest

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

CONFIGS = sorted(Path("configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_config_loads_and_survives_json(path):
    for argument in (":byte_lm", ":blt") if path.stem == "quickstart" else ("",):
        config = load_config(f"{path}{argument}")
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
        ("blt.local.heads=3", r"local.heads \(3\) must divide local.width \(1024\)"),
        ("blt.latent.key_value_heads=5", r"key_value_heads \(5\) must divide latent.heads \(16\)"),
        ("data.row_patches=99999", r"row_patches \(99999\) must not exceed row_bytes \(16384\)"),
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
        "blt.local.remat=True",
    ]
    config = load_config("configs/quickstart.py:blt", overrides)
    assert config.mesh.tensor == 2 and config.optimizer.b1 == 0.8
    assert config.patching.threshold_add == 0.5 and config.blt.local.remat


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


@pytest.mark.parametrize("variant", ["patch_6", "patch_8", "space", "static"])
def test_variants_of_the_8b(variant):
    config = load_config(f"configs/blt_8b.py:{variant}")
    by_entropy = variant.startswith("patch")
    assert (config.patching.mode == "entropy") == by_entropy == bool(config.entropy_model)
    assert config.blt.local.encoder_layers == (3 if variant == "patch_8" else 1)
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


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_the_commands_in_docstrings_are_valid(path):
    """Each names its own file, and every setting that it overrides exists."""
    docstring = ast.get_docstring(ast.parse(path.read_text()), clean=False).replace("\\\n", " ")
    commands = [shlex.split(line) for line in docstring.splitlines() if "bltjax train" in line]
    assert commands
    for words in commands:
        assert words[:4] == ["python", "-m", "bltjax", "train"]
        options = dict(word.split("=", 1) for word in words[4:])
        overrides = [
            f"{key.removeprefix('--config.')}={'1.5' if value == 'NATS' else value}"
            for key, value in options.items()
            if key.startswith("--config.")
        ]
        assert options["--config"].partition(":")[0] == str(path) and "--workdir" in options
        load_config(options["--config"], overrides)
