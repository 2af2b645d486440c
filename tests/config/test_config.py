import argparse
import ast
import copy
import dataclasses
import json
import math
import re
import shlex
import shutil
import tomllib
import typing
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh, AxisType

from bltjax.__main__ import main, program_of
from bltjax.attention import rope
from bltjax.attention.rope import RopeScalingConfig
from bltjax.config import data as data_settings
from bltjax.config import load
from bltjax.config import model as model_settings
from bltjax.config import run as run_settings
from bltjax.config.arguments import parse_scheme
from bltjax.config.data import DataConfig, SourceConfig
from bltjax.config.fields import OLD_NAMES, changes, differences, to_dict
from bltjax.config.model import ModelConfig, Patching
from bltjax.config.run import FaultsConfig, LatentInitConfig, MeshConfig, OptimizerConfig, RunConfig
from bltjax.configured import (
    check_mesh,
    load_config,
    model_config,
    model_shapes,
    parse,
    training_flops,
)
from bltjax.distributed.sharding import AXES, tree_shardings
from bltjax.model import byte_cnn, byte_lm
from bltjax.model.blt import config as config_of_blt
from bltjax.model.blt.config import BLTConfig, LatentConfig
from bltjax.model.byte_cnn import ByteCNNConfig
from bltjax.model.byte_lm import ByteLMConfig
from bltjax.model.params import parameter_count
from bltjax.text import ngram_hash
from bltjax.weights.workdir import read_run_config

CONFIGS = sorted(p for p in Path("configs").glob("*.py") if "ALIAS" not in p.read_text())
SIZES = ("400m", "1b", "2b", "4b", "8b", "8b_patch_6", "8b_patch_8", "8b_space", "8b_static")


QUICK = ("llama", "megabyte", "spacebyte", "mambabyte", "byt5", "canine")
RIVALS = (
    "megabyte", "spacebyte", "spacebyte_1b", "mambabyte_353m", "mambabyte_972m", "byt5_small",
    "byt5_base", "byt5_large", "canine", "llama_1b", "llama_3_8b",
)  # fmt: skip
ARGUMENTS = {
    "quickstart": tuple(f":{model}" for model in ("byte_lm", "byte_cnn", "blt", *QUICK)),
    "blt": tuple(f":{size}" for size in SIZES),
    "rivals": tuple(f":{model}" for model in RIVALS),
}
SPECS = [f"{path}{argument}" for path in CONFIGS for argument in ARGUMENTS.get(path.stem, ("",))]


@pytest.mark.parametrize("spec", SPECS)
def test_every_config_loads_and_survives_json(spec):
    config = load_config(spec)
    assert parse(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


def quick_flops(model: str) -> tuple[RunConfig, int]:
    """A config of the quickstart, and the FLOPs of its step."""
    config = load_config(f"configs/quickstart.py:{model}")
    data = config.data
    # A Llama's row has the tokens of 2,048 bytes at 4.24 bytes each, rounded up to 64.
    slots = data.max_patches or 512
    return config, training_flops(config.model, data.batch_size, data.seq_len, slots)


@pytest.mark.parametrize("model", ["byte_lm", *QUICK])
def test_quickstart_spends_equal_flops(model):
    (blt, of_blt), (config, step) = quick_flops("blt"), quick_flops(model)
    assert step * config.optimizer.steps == pytest.approx(of_blt * blt.optimizer.steps, rel=0.01)
    data = config.data
    assert data.batch_size * data.seq_len == blt.data.batch_size * blt.data.seq_len
    if model in QUICK:
        assert 3.3e6 < step / (3 * data.batch_size * data.seq_len) < 4.5e6  # BLT: 3.5


def test_overrides():
    config = load_config(
        "configs/blt.py:1b",
        ["optimizer.lr=1e-3", "blt.hash.sizes=(3,4)", "data.train.text.path=7", "optimizer.clip=2"],
    )
    assert config.optimizer.lr == 1e-3 and config.model.hash.sizes == (3, 4)
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
        ("data.max_patches=99999", r"max_patches \(99999\) must not exceed seq_len \(16384\)"),
        ("mesh.tensor=3", r"mesh.tensor \(3\) must divide latent.heads \(16\)"),
        (
            "mesh.fsdp=768",
            r"x mesh.fsdp \(768\) must divide data.batch_size / .* \(256\)",
        ),
        (
            "optimizer.grad_accum_steps=3",
            r"grad_accum_steps \(3\) must divide data.batch_size \(1024\)",
        ),
        ("patching.mode=bpes", r"patching.mode is 'bpes', not one of entropy, space, .*, bpe"),
        ("optimizer.warmup_steps=999999", r"warmup_steps \(999999\) must lie in 0"),
        ("optimizer.steps=5", r"5 steps needs a --config.optimizer.warmup_steps of at most 5"),
        ("optimizer.steps=4000000000", r"steps \(4000000000\) must be below 2\^31"),
        ("optimizer.b1=1.5", r"optimizer.b1 is 1.5, not in \[0, 1\)"),
        ("optimizer.b2=1", r"optimizer.b2 is 1.0, not in \[0, 1\)"),
        ("optimizer.eps=-1", r"optimizer.eps is -1.0, not > 0"),
        ("optimizer.weight_decay=-1", r"optimizer.weight_decay is -1.0, not >= 0"),
        ("optimizer.final_lr_ratio=5", r"optimizer.final_lr_ratio is 5.0, not in \[0, 1\]"),
        ("optimizer.lr=0", r"optimizer.lr is 0.0, not > 0"),
        ("optimizer.lr=1e999", r"config.optimizer.lr is inf, not a finite number"),
        ("optimizer.lr=1" + 400 * "0", r"config.optimizer.lr has 401 digits: too large"),
        ("optimizer.clip=0", r"optimizer.clip is 0.0, not > 0"),
        ("latent_init.lr_multiplier=-1", r"latent_init.lr_multiplier is -1.0, not >= 0"),
        ("blt.latent.norm_eps=0", r"latent.norm_eps is 0.0, not > 0"),
        ("blt.local.rope_theta=-1", r"local.rope_theta is -1.0, not > 0"),
        ("patching.threshold=-1e999", r"patching.threshold is -inf, not a finite number"),
        ("patching.max_patch_bytes=0", r"patching.max_patch_bytes is 0, not > 0"),
        ("data.train.text.weight=1e999", r"data.train.text.weight is inf, not a finite number"),
        ("faults.spike=1e999", r"faults.spike is inf, not a finite number"),
        ("faults.hang_seconds=0", r"faults.hang_seconds is 0.0, not > 0"),
        ("seed=-1", r"seed is -1, not in 0 ... 2\^63 - 1"),
        ("seed=9223372036854775808", r"seed is 9223372036854775808, not in 0"),
    ],
)
def test_bad_settings_name_the_rule_and_the_numbers(override, message):
    with pytest.raises(ValueError, match=message):
        load_config("configs/blt.py:1b", [override])


def test_settings_that_the_file_does_not_mention_can_be_overridden():
    overrides = [
        "mesh.tensor=2",
        "optimizer.b1=0.8",
        "patching.threshold_add=0.5",
        "blt.local.remat=products",
    ]
    config = load_config("configs/quickstart.py:blt", overrides)
    assert config.mesh.tensor == 2 and config.optimizer.b1 == 0.8
    assert config.patching.threshold_add == 0.5 and config.model.local.remat == "products"


def test_arguments_of_a_config():
    with pytest.raises(ValueError, match=r"write one of :byte_lm, :byte_cnn, .*, :canine"):
        load_config("configs/quickstart.py")
    with pytest.raises(ValueError, match="takes no argument; drop ':big'"):
        load_config("configs/byte_lm_100m.py:big")
    with pytest.raises(ValueError, match="has no function get_config"):
        load_config("tests/config/test_config.py")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", "line 1: SyntaxError: invalid syntax"),
        ("import nothing_of_that_name\n", "line 1: ModuleNotFoundError: No module named"),
        ("def get_config():\n    return\n", r"get_config\(\) returns NoneType, not an ml_coll"),
        ("def get_config():\n    return 1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
        ("def get_config():\n    raise ValueError('of a\\nkind')\n", "line 2: of a kind"),
        ("def get_config(size):\n    return size\n", "needs an argument: .*odd.py:SIZE"),
        ("def get_config(a, b):\n    return a\n", r"get_config\(a, b\) can't be called with none"),
        ("get_config = 3\n", "has no function get_config"),
        (
            "from ml_collections import ConfigDict\n"
            "def get_config():\n    return ConfigDict(dict(byte_lm=dict(layer=2)))\n",
            "odd.py: config.byte_lm.layer is no setting; did you mean 'layers'",
        ),
    ],
)
def test_errors_of_a_config_file_name_its_line(text, message, tmp_path, capsys):
    file = tmp_path / "odd.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        load_config(str(file))
    assert str(raised.value).startswith(str(file)) and "\n" not in str(raised.value)
    assert main(["train", f"--config={file}", f"--workdir={tmp_path / 'run'}"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_errors_of_overrides_do_not_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"^config\.optimizer\.steps is 'x', not int"):
        load_config("configs/blt.py:1b", ["optimizer.steps=x"])


def test_values_of_text_settings_are_never_literals(tmp_path):
    """A folder may be called 123 or None; a config file may have left the setting None."""
    (tmp_path / "odd.py").write_text(
        Path("tests/tiny.py").read_text(encoding="utf-8").replace('config.entropy_model = ""', "")
        + "\n\nof_model = get_config\n\n\ndef get_config():\n    config = of_model('byte_lm')\n"
        + "    config.entropy_model = None\n    return config\n"
    )
    for value in ("123", "None", "(1, 2)", "'x'", "a=b", "x" * 5000):
        overrides = [f"data.{part}.text.path={value}" for part in ("train", "eval")]
        config = load_config(f"{tmp_path}/odd.py", [*overrides, f"entropy_model={value}"])
        assert config.entropy_model == config.data.train["text"].path == value


@pytest.mark.parametrize("folder", ["a:b", "x.py:y", "C:", "sp ace [1]"])
def test_a_config_file_s_path_may_have_colons(folder, tmp_path):
    (tmp_path / folder).mkdir()
    shutil.copy("configs/quickstart.py", tmp_path / folder)
    assert load_config(f"{tmp_path / folder}/quickstart.py:byte_cnn").model.group == "byte_cnn"
    for name in ("blt.py", "blt_1b.py"):
        shutil.copy(f"configs/{name}", tmp_path / folder)
    assert load_config(f"{tmp_path / folder}/blt_1b.py").model.group == "blt"


def test_configs_that_came_with_the_package(tmp_path, monkeypatch, caplog):
    """A wheel's are found from any folder; a file in the working directory comes first."""
    shutil.copytree("configs", tmp_path / "installed")
    monkeypatch.setattr(load, "SHIPPED", (tmp_path / "none", tmp_path / "installed"))
    (tmp_path / "here" / "configs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with caplog.at_level("INFO"):
        assert load_config("configs/quickstart.py:byte_lm").model.group == "byte_lm"
    assert f"using {tmp_path / 'installed' / 'quickstart.py'}" in caplog.text
    with pytest.raises(ValueError, match=r"did you mean 'configs/quickstart.py'"):
        load_config("configs/quikstart.py")
    (tmp_path / "here" / "configs" / "quickstart.py").write_text("broken")
    with pytest.raises(ValueError, match="line 1: NameError"):
        load_config("configs/quickstart.py:byte_lm")


def test_a_wheel_has_every_package_and_the_configs():
    built = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = {".".join(path.parent.parts) for path in Path("bltjax").rglob("*.py")}
    assert sorted(built["packages"]) == sorted({*packages, "bltjax.configs"})
    assert built["package-dir"] == {"bltjax.configs": "configs"}
    assert built["package-data"] == {"bltjax.viz": ["templates/*.html"]}


def test_missing_file_names_its_neighbour():
    with pytest.raises(ValueError, match=r"did you mean 'configs/blt_1b.py'"):
        load_config("configs/blt_1.py")


@pytest.mark.parametrize(
    ("variant", "mean"),
    [("8b", 4.1), ("8b_patch_6", 6), ("8b_patch_8", 8), ("8b_space", 6.1), ("8b_static", 4)],
)
def test_variants_of_the_8b(variant, mean):
    config = load_config(f"configs/blt.py:{variant}")
    by_entropy = variant in ("8b", "8b_patch_6", "8b_patch_8")
    assert (config.patching.mode == "entropy") == by_entropy == bool(config.entropy_model)
    assert config.model.local.encoder_layers == (3 if variant == "8b_patch_8" else 1)
    # Rows are full of bytes just before they are full of patches of that mean.
    data = config.data
    assert 0.97 * mean <= data.seq_len / data.max_patches <= mean
    with pytest.raises(ValueError, match=r"write one of 400m, 1b, .*8b_static"):
        load_config("configs/blt.py:8b_patch_7")


def test_one_model_a_run():
    with pytest.raises(ValueError, match=r"one of byte_lm, byte_cnn, blt, .* and byt5"):
        parse(RunConfig, {})
    with pytest.raises(ValueError, match=r"one of byte_lm, byte_cnn, blt, .* and byt5"):
        parse(RunConfig, {"byte_lm": {}, "blt": {}})


def test_small_rows_and_meshes():
    with pytest.raises(ValueError, match="a row needs 2 bytes and 2 patches"):
        DataConfig(seq_len=1, max_patches=1)
    with pytest.raises(ValueError, match="at most one -1"):
        MeshConfig(data=-1, fsdp=-1)


def test_differences():
    old = to_dict(RunConfig(ByteLMConfig()))
    new = to_dict(dataclasses.replace(RunConfig(ByteLMConfig(layers=3)), seed=5))
    assert differences(old, new) == ["byte_lm.layers: 14 -> 3", "seed: 0 -> 5"]


def test_overriding_one_source_leaves_the_other():
    paths = ["data.train.text.path=a", "data.eval.text.path=b"]
    data = load_config("tests/tiny.py:blt", paths).data
    assert (data.train["text"].path, data.eval["text"].path) == ("a", "b")


def test_old_names_of_settings_are_read(tmp_path, caplog):
    """In config files, on the command line and in config.json, with a line that names the new."""
    (tmp_path / "old.py").write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        "    source = dict(text=dict(path='a'))\n"
        "    data = dict(train=source, held_out=source, rows=4, row_bytes=64, row_patches=32)\n"
        "    steps = dict(accumulate=2)\n"
        "    return ConfigDict(dict(byte_lm=dict(layers=2), data=data, optimizer=steps))\n"
    )
    with caplog.at_level("INFO"):
        config = load_config(f"{tmp_path}/old.py", ["data.rows=8", "data.held_out.text.path=b"])
    data = config.data
    assert (data.batch_size, data.seq_len, data.max_patches) == (8, 64, 32)
    assert (data.train["text"].path, data.eval["text"].path) == ("a", "b")
    assert config.optimizer.grad_accum_steps == 2
    assert "data.row_bytes is now data.seq_len" in caplog.text
    assert "config.data.rows is now config.data.batch_size" in caplog.text
    values = to_dict(config)
    for old, new in OLD_NAMES.items():
        group, _, name = old.partition(".")
        values[group][name] = values[group].pop(new.partition(".")[2])
    assert parse(RunConfig, values) == config
    values["data"]["batch_size"] = 8
    with pytest.raises(ValueError, match=r"data\.rows is the old name of config\.data\.batch_size"):
        parse(RunConfig, values)


def row_of(path: Path, name: str) -> list[str]:
    """The words of the row of a model in a config's table, without its name."""
    (row,) = re.findall(rf"^    {name} +(\d[\d,]+ .*)$", docstring(path), re.MULTILINE)
    return row.split()


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False)


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_the_commands_in_docstrings_are_valid(path):
    """Each names its own file, every setting that it overrides exists, and so does every option."""
    lines = docstring(path).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("    python -m bltjax ")]
    documented = set()
    for words in commands:
        parser = argparse.ArgumentParser(allow_abbrev=False)
        program_of(words[3]).add_arguments(parser)
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
        documented.add(args.config)
        # Only entropy patching needs a byte LM, its threshold and its records.
        # A row of tokens that are measured has no size yet.
        data = dataclasses.replace(config.data, max_patches=config.data.max_patches or 512)
        by_entropy = model_config(dataclasses.replace(config, data=data)).by_entropy
        named = {override.partition("=")[0] for override in overrides}
        assert by_entropy == ({"entropy_model", "patching.threshold"} <= named)
    mine = {spec for spec in SPECS if spec.partition(":")[0] == str(path)}
    # Sizes differ by the word alone.
    assert documented <= mine and (documented == mine or path.stem in ("blt", "rivals"))


def test_the_arithmetic_of_the_quickstart():
    documented = docstring(Path("configs/quickstart.py")).replace("\n", " ")
    for model, pattern in (
        ("byte_lm", r"A step is ([\d.]+) GFLOP for the byte LM"),
        ("blt", r"GFLOP for the byte LM and ([\d.]+) for BLT"),
        ("byte_cnn", r"A step is ([\d.]+) GFLOP; state"),
    ):
        _, flops = quick_flops(model)
        assert float(re.search(pattern, documented).group(1)) == pytest.approx(
            flops / 1e9, abs=0.06
        )


@pytest.mark.parametrize("model", QUICK)
def test_the_table_of_quick_rivals(model):
    """Parameters, FLOPs, steps and rates in the docstring of configs/quickstart.py."""
    row = row_of(Path("configs/quickstart.py"), model)
    config, step = quick_flops(model)
    total = parameter_count(model_shapes(config), config.model)["total"]
    data = config.data
    assert int(row[0].replace(",", "")) == total
    assert float(row[1]) == pytest.approx(step / 1e9, abs=0.06)
    per_byte = step / (3 * data.batch_size * data.seq_len)
    assert float(row[2]) == pytest.approx(per_byte / 1e6, abs=0.006)
    assert (int(row[3]), float(row[4])) == (config.optimizer.steps, config.optimizer.lr)


# Parameters as published, and what differs here: ids of the alphabet and heads.
PUBLISHED = {
    "mambabyte_353m": (353_628_160, (260 - 256) * 1024),
    "mambabyte_972m": (973_387_520, (260 - 256) * 1792),
    "byt5_small": (299_637_760, (260 - 384) * 2 * 1472),
    "byt5_base": (581_653_248, (260 - 384) * 2 * 1536),
    "byt5_large": (1_228_183_552, (260 - 384) * 2 * 1536),
    "llama_3_8b": (8_030_261_248, 0),
}
WITH_THEIR_ALPHABET = {"mambabyte": "mambabyte.alphabet=mambabyte", "byt5": "byt5.alphabet=byt5"}


@pytest.mark.parametrize("model", RIVALS)
def test_the_table_of_rivals(model):
    """Parameters, hardware and times in the docstring of configs/rivals.py."""
    numbers = row_of(Path("configs/rivals.py"), model)
    spec = f"configs/rivals.py:{model}"
    config = load_config(spec)
    data, chips = config.data, math.prod(map(int, numbers[1].split("x")))
    total = parameter_count(model_shapes(config), config.model)["total"]
    assert int(numbers[0].replace(",", "")) == total and chips == config.mesh.fsdp
    state, per_chip, peta, seconds, days = map(float, numbers[2:7])
    assert state == pytest.approx(16 * total / 1e9, abs=0.06)
    assert per_chip == pytest.approx(16 * total / 1e9 / chips, abs=0.006)
    flops = training_flops(config.model, data.batch_size, data.seq_len, data.max_patches)
    step = flops / (0.4 * 197e12 * chips)
    assert peta == pytest.approx(flops / 1e15, abs=0.006)
    assert seconds == pytest.approx(step, abs=0.006)
    assert days == pytest.approx(step * config.optimizer.steps / 86400, abs=0.06)
    mesh = AbstractMesh((1, chips, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    check_mesh(config.model, data.batch_size // config.optimizer.grad_accum_steps, mesh)
    tree_shardings(model_shapes(config), mesh)
    if model in PUBLISHED:
        published, difference = PUBLISHED[model]
        assert total == published + difference
        if difference:
            theirs = load_config(spec, [WITH_THEIR_ALPHABET[config.model.group]])
            assert parameter_count(model_shapes(theirs), theirs.model)["total"] == published
    if model == "canine":  # published without its head
        bare = load_config(spec, ["canine.predicts=False"])
        assert parameter_count(model_shapes(bare), bare.model)["total"] == 132_082_944


@pytest.mark.parametrize("size", SIZES)
def test_the_table_of_sizes(size):
    """Parameters, hardware and times in the docstring of configs/blt.py."""
    (row,) = (line for line in docstring(Path("configs/blt.py")).splitlines()
              if re.match(rf"    {size} +[\d,]{{9,}} ", line))  # fmt: skip
    numbers = row.split()
    total, tables, (state, per_chip, peta, seconds, days) = numbers[1], numbers[2], numbers[5:10]
    config = load_config(f"configs/blt.py:{size}")
    data, chips = config.data, math.prod(map(int, numbers[4].split("x")))
    counts = parameter_count(model_shapes(config), config.model)
    assert int(total.replace(",", "")) == counts["total"] and chips == config.mesh.fsdp
    assert float(tables) == pytest.approx(counts["hash_tables"] / 1e9, abs=0.006)
    assert float(state) == pytest.approx(16 * counts["total"] / 1e9, abs=0.06)
    assert float(per_chip) == pytest.approx(16 * counts["total"] / 1e9 / chips, abs=0.006)
    flops = training_flops(config.model, data.batch_size, data.seq_len, data.max_patches)
    step = flops / (0.4 * 459e12 * chips)
    assert float(peta) == pytest.approx(flops / 1e15, abs=0.06)
    assert float(seconds) == pytest.approx(step, abs=0.06)
    assert float(days) == pytest.approx(step * config.optimizer.steps / 86400, abs=0.55)
    mesh = AbstractMesh((1, chips, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    check_mesh(config.model, data.batch_size // config.optimizer.grad_accum_steps, mesh)
    tree_shardings(model_shapes(config), mesh)


@pytest.mark.parametrize("size", ["400m", "1b", "2b", "4b", "8b", "8b:patch_6"])
def test_old_names_of_configs_are_aliases(size, caplog):
    name, _, variant = size.partition(":")
    with caplog.at_level("INFO"):
        found = load_config(f"configs/blt_{name}.py{variant and ':' + variant}")
    assert found == load_config(f"configs/blt.py:{size.replace(':', '_')}")
    assert f"is now configs/blt.py:{name}" in caplog.text


@pytest.mark.parametrize(
    "spec", [spec for spec in SPECS if not re.search("quickstart|blt.py|rivals", spec)]
)
def test_meshes_fit_their_pods(spec):
    """The mesh has as many chips as the docstring names, and divides every size that it splits."""
    config = load_config(spec)
    documented = docstring(Path(spec.partition(":")[0]))
    chips, topology = re.search(r"(\d+) chips\s+\(v5p:([\dx]+),", documented).groups()
    fsdp = int(chips) if config.mesh.fsdp == -1 else config.mesh.fsdp
    sizes = (config.mesh.data, fsdp, config.mesh.tensor)
    assert math.prod(sizes) == int(chips) == math.prod(map(int, topology.split("x")))
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
    check_mesh(config.model, config.data.batch_size // config.optimizer.grad_accum_steps, mesh)
    tree_shardings(model_shapes(config), mesh)


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem not in ARGUMENTS], ids=str)
def test_the_arithmetic_in_docstrings(path):
    documented, config = docstring(path).replace("\n", " "), load_config(str(path))

    def number(pattern: str) -> float:
        return float(re.search(pattern, documented).group(1).replace(",", ""))

    data, chips = config.data, number(r"(\d+) chips")
    flops = training_flops(config.model, data.batch_size, data.seq_len, data.max_patches)
    assert number(r"([\d.]+) PFLOP ") == pytest.approx(flops / 1e15, rel=0.003)
    seconds = flops / (0.4 * 459e12 * chips)
    assert number(r"([\d.]+) s if the chips") == pytest.approx(seconds, rel=0.03)
    state = 16 * number(r"([\d,]+) parameters") / 1e9
    assert number(r"([\d.]+) GB in total") == pytest.approx(state, rel=0.01)
    assert number(r"([\d.]+) GB per chip") == pytest.approx(state / chips, rel=0.01)
    hours = config.optimizer.steps * seconds / 3600
    per = {"days": 24, "hours": 1}[re.search(r"take \d+ (\w+)", documented).group(1)]
    assert number(r"take (\d+) \w+") == pytest.approx(hours / per, abs=0.7)


# The settings that may change on resume, and how. A new setting is fixed unless listed here.
RESUME = {
    "byte_lm.remat": "may change",
    "blt.local.remat": "may change",
    "blt.latent.remat": "may change",
    "entropy_model": "same content",
    "init_from": "may change",
    "latent_init.path": "renamed",
    "patching.tokenizer": "same content",
    "data.train.*": "same content",
    "data.train.text.weight": "fixed",
    "data.eval.*": "may change",
    "data.prefetch": "may change",
    "data.skip_bad": "may change",
    "optimizer.steps": "length",
    "optimizer.grad_accum_steps": "may change",
    "checkpoint.*": "may change",
    "faults.*": "may change",
    "mesh.*": "may change",
    "attention": "may change",
    "log_every": "may change",
    "evaluate_every": "may change",
}


def leaves(config, path: str = ""):
    """Dotted path, the group that holds it and its name there, of every setting."""
    named = config.items() if isinstance(config, dict) else vars(config).items()
    for name, value in named:
        shown = f"{path}{getattr(value, 'group', name)}"  # a choice is called by its group
        if dataclasses.is_dataclass(value) or (isinstance(value, dict) and value):
            yield from leaves(value, f"{shown}.")
        else:
            yield shown, config, name


def models() -> list[RunConfig]:
    """A config of each model in which no group is missing."""
    source = {"text": SourceConfig("a")}
    data = DataConfig(train=source, eval=copy.deepcopy(source))
    latent = LatentConfig(rope_scaling=RopeScalingConfig())
    kinds = (ByteLMConfig(), ByteCNNConfig(), BLTConfig(latent=latent))
    return [RunConfig(kind, data=data) for kind in kinds]


def test_every_setting_has_a_rule_of_resuming():
    found, used = {}, set()
    for config in models():
        for path, _, _ in leaves(config):
            other = copy.deepcopy(config)
            group, name = next((group, name) for at, group, name in leaves(other) if at == path)
            object.__setattr__(group, name, "something else")  # without its checks
            (change,) = changes(config, other)
            assert (change.path, change.new) == (path, "something else")
            found[path] = change.rule
    for path, rule in found.items():
        group = next((name for name in RESUME if name == path), None)
        group = group or next((n for n in RESUME if path.startswith(n.removesuffix("*"))), None)
        assert rule == RESUME.get(group, "fixed"), path
        used.add(group)
    assert used == RESUME.keys() | {None}


CLASSES = [
    kind
    for module in (
        run_settings,
        data_settings,
        model_settings,
        config_of_blt,
        byte_lm,
        byte_cnn,
        ngram_hash,
        rope,
    )
    for kind in vars(module).values()
    if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_numbers_are_finite(kind):
    """However a config is made: from JSON, where Python allows NaN, or by a program."""
    required = {"path": "a"} if kind is SourceConfig else {}
    required |= {"model": ByteLMConfig()} if kind in (RunConfig, ModelConfig) else {}
    for field in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind)[field.name]
        if float not in (hint, *typing.get_args(hint)):
            continue
        for text in ("NaN", "Infinity", "-Infinity"):
            value = json.loads(text)
            if (kind, field.name, text) == (FaultsConfig, "hang_seconds", "Infinity"):
                assert parse(kind, {field.name: value}) == kind(**{field.name: value})
                continue
            with pytest.raises(ValueError, match=rf"{field.name} is \S+, not a finite"):
                parse(kind, to_dict_of(required) | {field.name: value})
            with pytest.raises(ValueError, match=f"{field.name}"):
                kind(**required | {field.name: value})


def to_dict_of(values: dict) -> dict:
    return {
        getattr(v, "group", k): to_dict(v) if dataclasses.is_dataclass(v) else v
        for k, v in values.items()
    }


def test_thresholds_of_a_scheme_are_finite():
    for text, value in (("nan", "'nan'"), ("1e999", "inf"), ("-1e999", "-inf")):
        with pytest.raises(ValueError, match=f"threshold is {value}, not "):
            parse_scheme(f"entropy:threshold={text}")
    with pytest.raises(ValueError, match=r"threshold_add is nan, not a finite number$"):
        Patching(threshold_add=math.nan)


def test_a_config_of_another_version_names_its_file(tmp_path):
    values = to_dict(RunConfig(ByteLMConfig()))
    values["data"]["shuffle_buffer"] = 7
    (tmp_path / "config.json").write_text(json.dumps(values))
    message = rf"{tmp_path}/config.json: config.data.shuffle_buffer is no setting.*another version"
    with pytest.raises(ValueError, match=message):
        read_run_config(tmp_path)
    # A config from before a setting existed has its default.
    del values["data"]["shuffle_buffer"], values["optimizer"]["table_moments"], values["faults"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_run_config(tmp_path) == RunConfig(ByteLMConfig())


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\x00", "[" * 100000])
def test_a_config_that_holds_something_else_names_its_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        ValueError, match=rf"{tmp_path}/config.json (is empty|is truncated|is not JSON|holds)"
    ):
        read_run_config(tmp_path)


def test_optimizers_that_can_be_meant():
    OptimizerConfig(b1=0, b2=0, weight_decay=0, final_lr_ratio=1, warmup_steps=1000)
    LatentInitConfig(lr_multiplier=0)
    FaultsConfig(spike=1.5, hang_seconds=math.inf)
    RunConfig(ByteLMConfig(), seed=2**63 - 1)
