"""The six rivals of BLT at their published sizes: `configs/rivals.py:NAME`.

    python -m bltjax plan --config=configs/rivals.py:megabyte --topology=v5e:4x4
    python -m bltjax train --config=configs/rivals.py:megabyte --workdir=WORKDIR \
        --config.data.train.text.path='DATA/*.jsonl' --config.data.eval.text.path=DATA/val.jsonl

A Llama reads tokens, so it needs the tokenizer, too; a row has the tokens of 16 KiB of text at
Llama 3's 4.4 bytes each, or with --config.data.max_patches=0 as many as are measured:

    python -m bltjax train --config=configs/rivals.py:llama_1b --workdir=WORKDIR \
        --config.llama.tokenizer=TOKENIZER.json \
        --config.data.train.text.path='DATA/*.jsonl' --config.data.eval.text.path=DATA/val.jsonl

    name            parameters     v5e  GB     per chip  PFLOP   s      days   MFLOP
    megabyte          934,205,440  4x4   14.9  0.93        4.08   3.23    1.4    648
    spacebyte         256,172,544  4x4    4.1  0.26        0.22   0.18    0.1    190
    spacebyte_1b      985,637,376  4x4   15.8  0.99        1.11   0.88    0.6    706
    mambabyte_353m    353,632,256  4x4    5.7  0.35        0.84   0.67    0.6    713
    mambabyte_972m    973,394,688  4x4   15.6  0.97        2.31   1.83    8.1   1957
    byt5_small        299,272,704  4x4    4.8  0.30        1.55   1.23   14.2    422
    byt5_base         581,272,320  4x4    9.3  0.58        3.06   2.43   28.1    835
    byt5_large      1,227,802,624  4x4   19.6  1.23        6.56   5.20   60.2   1789
    canine            171,419,136  4x4    2.7  0.17        2.55   2.02    2.9    101
    llama_1b        1,235,814,400  4x4   19.8  1.24       31.54  25.02   69.5    627
    llama_3_8b      8,030,261,248  8x8  128.5  2.01      185.59  36.80  102.2   3687

v5e: chips of 15.75 GiB each. GB: parameters, Adam's two moments and gradients in fp32, 16 bytes per
parameter, all sharded. PFLOP: of a step (`forward_flops` of each family, three times); s: of a step
at 40 % of 197 TFLOP/s per chip in bf16; days: of all steps; MFLOP: forward, per byte of a full row
(CANINE: per character, with its head; Llama: per byte of the 16 KiB). None was trained: shapes and
parameter counts are tested, `plan` compiles the steps, the rest is arithmetic.

    megabyte        the paper's 758M + 262M, patches of 8 bytes, rows of 8 KiB: 80 GB of text. Its
                    layers and widths give 705M + 227M
    spacebyte       the paper's 201M + 50M, of 1e19 FLOPs: 17 GB
    spacebyte_1b    the paper's 793M + 184M, 30 GB. Layers, widths, window and slots are those that
                    give its parameters and its 728 MFLOP per byte
    mambabyte_353m  the paper's, 31 GB, and 972m, 149 GB: 353,628,160 and 973,387,520 parameters
                    with the released alphabet of 256 ids, to which ours adds 4
    byt5_small      the released ones: 299,637,760, base 581,653,248 and large 1,228,183,552
                    parameters with 384 ids, of which ours has 260
    canine          the released 132,082,944, and a head for masked characters
    llama_1b        the shape of Llama 3.2 1B, tied, without its scaling of rotary positions
    llama_3_8b      Llama 3 8B

Recipes are the papers', as far as they are published. MegaByte's batch and rate are not: 2M bytes
and 2e-4 are usual at its size. SpaceByte's rate is that of its code for a width of 1024 or 1536;
its decay is half a cosine there, a whole one here. ByT5 was trained with Adafactor and CANINE with
LAMB; their rates here are for AdamW, and were never tried. Llamas have BLT's recipe, as in its
paper. Expect each paper's figures at best; no run has checked one.
"""

from ml_collections import ConfigDict

MEGABYTE = dict(
    patch_bytes=8,
    context=8192,
    global_layers=14,
    global_width=2048,
    global_heads=32,
    local_layers=18,
    local_width=1024,
    local_heads=16,
    remat="full",
)
SPACEBYTE = dict(
    window=512,
    context=6144,
    global_context=1024,
    initial_layers=8,
    global_layers=16,
    global_width=1024,
    global_heads=16,
    local_layers=16,
    local_width=512,
    local_heads=8,
    remat="full",
)
SPACEBYTE_1B = dict(
    window=768,
    context=8192,
    global_context=1344,
    initial_layers=13,
    global_layers=28,
    global_width=1536,
    global_heads=24,
    local_layers=26,
    local_width=768,
    local_heads=12,
    remat="full",
)
BYT5 = dict(channels=64, remat="full")
BYT5_ROWS = dict(batch_size=1024, seq_len=1193, max_patches=1193)
BYT5_RECIPE = dict(steps=1_000_000, lr=1e-3, warmup_steps=10_000, grad_accum_steps=8)
LLAMA = dict(key_value_heads=8, vocabulary=128256, rope_theta=500000.0, remat="full")
LLAMA_ROWS = dict(batch_size=1024, seq_len=16384, max_patches=3776)
LLAMA_RECIPE = dict(steps=240_000, lr=4e-4, warmup_steps=2000)
MAMBABYTE_ROWS = dict(batch_size=48, seq_len=8192, max_patches=8192)
MAMBABYTE_RECIPE = dict(lr=4e-4, warmup_steps=500, clip=0.1)
MODELS = {
    "megabyte": dict(
        megabyte=MEGABYTE,
        data=dict(batch_size=256, seq_len=8192, max_patches=1040),
        optimizer=dict(steps=38_000, lr=2e-4, warmup_steps=500, b2=0.98, grad_accum_steps=2),
    ),
    "spacebyte": dict(
        spacebyte=SPACEBYTE,
        data=dict(batch_size=64, seq_len=6144, max_patches=1024),
        optimizer=dict(steps=43_000, lr=1.25e-3, warmup_steps=430, b2=0.98, weight_decay=0.01),
    ),
    "spacebyte_1b": dict(
        spacebyte=SPACEBYTE_1B,
        data=dict(batch_size=64, seq_len=8192, max_patches=1344),
        optimizer=dict(steps=57_000, lr=1e-3, warmup_steps=570, b2=0.98, weight_decay=0.01),
    ),
    "mambabyte_353m": dict(
        mambabyte=dict(layers=53, width=1024, remat="full"),
        data=MAMBABYTE_ROWS,
        optimizer=MAMBABYTE_RECIPE | dict(steps=80_000),
    ),
    "mambabyte_972m": dict(
        mambabyte=dict(layers=48, width=1792, remat="full"),
        data=MAMBABYTE_ROWS,
        optimizer=MAMBABYTE_RECIPE | dict(steps=380_000, grad_accum_steps=3),
    ),
    "byt5_small": dict(
        byt5=BYT5 | dict(encoder_layers=12, decoder_layers=4, width=1472, heads=6, hidden=3584),
        data=BYT5_ROWS,
        optimizer=BYT5_RECIPE,
    ),
    "byt5_base": dict(
        byt5=BYT5 | dict(encoder_layers=18, decoder_layers=6, width=1536, heads=12, hidden=3968),
        data=BYT5_ROWS,
        optimizer=BYT5_RECIPE,
    ),
    "byt5_large": dict(
        byt5=BYT5 | dict(encoder_layers=36, decoder_layers=12, width=1536, heads=16, hidden=3840),
        data=BYT5_ROWS,
        optimizer=BYT5_RECIPE,
    ),
    "canine": dict(
        canine=dict(
            layers=12, width=768, heads=12, hidden=3072, hashes=8, buckets=16384, remat="full"
        ),
        data=dict(batch_size=4096, seq_len=2048, max_patches=512),
        optimizer=dict(steps=124_000, lr=4e-4, warmup_steps=3100, grad_accum_steps=16),
    ),
    "llama_1b": dict(
        llama=LLAMA | dict(layers=16, width=2048, heads=32, hidden=8192, tied=True),
        data=LLAMA_ROWS,
        optimizer=LLAMA_RECIPE | dict(grad_accum_steps=32),
    ),
    "llama_3_8b": dict(
        llama=LLAMA | dict(layers=32, width=4096, heads=32, hidden=14336),
        data=LLAMA_ROWS,
        optimizer=LLAMA_RECIPE | dict(grad_accum_steps=16),
        chips=64,
    ),
}


def get_config(model: str = ""):
    if model not in MODELS:
        raise ValueError(f"configs/rivals.py:{model}: write one of {', '.join(MODELS)}")
    values = dict(MODELS[model])
    sources = dict(
        train=dict(text=dict(path="data/*.jsonl")), eval=dict(text=dict(path="data/val.jsonl"))
    )
    values["data"] = sources | values["data"]
    values["mesh"] = dict(data=1, fsdp=values.pop("chips", 16), tensor=1)
    values["checkpoint"] = dict(every=1000, keep=2)
    values["evaluate_every"] = 1000
    return ConfigDict(values)
