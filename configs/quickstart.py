"""The quickstart's runs, on a CPU with 2 cores in a few minutes each.

    bash launch/quickstart.sh

runs the byte LM and BLT; alone they are

    python -m bltjax train --config=configs/quickstart.py:byte_lm --workdir=WORKDIR/byte_lm \
        --config.data.train.text.path='WORKDIR/text/train/*.txt' \
        --config.data.eval.text.path='WORKDIR/text/held_out/*.txt'
    python -m bltjax train --config=configs/quickstart.py:blt --workdir=WORKDIR/blt \
        --config.entropy_model=WORKDIR/byte_lm --config.patching.threshold=NATS \
        --config.data.train.text.path=WORKDIR/records/train \
        --config.data.eval.text.path=WORKDIR/records/held_out

NATS is the threshold that `python -m bltjax calibrate --records=WORKDIR/records/train --mean=4.5`
finds. A step is 46.7 GFLOP for the byte LM and 86.0 for BLT (`bltjax/model/flops.py`), in 350 and
190 steps the same 16.3 TFLOP: the byte LM is BLT's baseline, and also places its patches.
Parameters, Adam's moments and gradients in fp32 take 15 and 171 MB, so any machine holds them.
Expect the figures of a real run in the main README.

Besides, the paper's small CNN scorer:

    python -m bltjax train --config=configs/quickstart.py:byte_cnn --workdir=WORKDIR/byte_cnn \
        --config.data.train.text.path='WORKDIR/text/train/*.txt' \
        --config.data.eval.text.path='WORKDIR/text/held_out/*.txt'

A step is 17.7 GFLOP; state takes 6 MB. Expect 2.644 bits per byte on the held-out books: the result
of a run on 2 vCPUs of an AMD EPYC, after 3 minutes on shared cores. Give its work directory as
--byte_lm to the entropies command and as --config.entropy_model to a BLT.

The rivals, each of about BLT's FLOPs per byte and with as many in all, to 1 %. They read the same
text:

    python -m bltjax tokenizer --source='WORKDIR/text/train/*.txt' --vocab=8000 \
        --out=WORKDIR/tokenizer.json
    python -m bltjax train --config=configs/quickstart.py:llama --workdir=WORKDIR/llama \
        --config.llama.tokenizer=WORKDIR/tokenizer.json \
        --config.data.train.text.path='WORKDIR/text/train/*.txt' \
        --config.data.eval.text.path='WORKDIR/text/held_out/*.txt'
    python -m bltjax train --config=configs/quickstart.py:megabyte --workdir=WORKDIR/megabyte \
        --config.data.train.text.path='WORKDIR/text/train/*.txt' \
        --config.data.eval.text.path='WORKDIR/text/held_out/*.txt'
    python -m bltjax train --config=configs/quickstart.py:spacebyte --workdir=WORKDIR/spacebyte \
        --config.data.train.text.path='WORKDIR/text/train/*.txt' \
        --config.data.eval.text.path='WORKDIR/text/held_out/*.txt'
    python -m bltjax train --config=configs/quickstart.py:mambabyte --workdir=WORKDIR/mambabyte \
        --config.data.train.text.path='WORKDIR/text/train/*.txt' \
        --config.data.eval.text.path='WORKDIR/text/held_out/*.txt'
    python -m bltjax train --config=configs/quickstart.py:byt5 --workdir=WORKDIR/byt5 \
        --config.data.train.text.path='WORKDIR/text/train/*.txt' \
        --config.data.eval.text.path='WORKDIR/text/held_out/*.txt'
    python -m bltjax train --config=configs/quickstart.py:canine --workdir=WORKDIR/canine \
        --config.data.train.text.path='WORKDIR/text/train/*.txt' \
        --config.data.eval.text.path='WORKDIR/text/held_out/*.txt'

    name       parameters  GFLOP  MFLOP  steps  lr
    llama      8,358,656    85.6   3.48   191    0.004
    megabyte   6,481,344    86.3   3.51   189    0.002
    spacebyte  4,564,480    88.1   3.58   185    0.0025
    mambabyte  1,641,600    84.7   3.45   193    0.0025
    byt5       1,511,040   108.4   4.41   151    0.002
    canine     3,512,064    90.0   3.66   181    0.001

GFLOP: of a step; MFLOP: forward, per byte of a row (CANINE: per character; Llama: rows of 512
tokens, as the Bible's 4.24 bytes per token give). No rate was tuned. MegaByte's is the better of
two that were tried, for 40 steps each: 3.80 bits per byte in training at the last, 3.85 with 0.004.
The others are reasoned: SpaceByte's is that of its code for a width of 256, MambaByte's is
published at a width of 1024 and grows as the width falls, Llama's is BLT's, whose latent block it
has, ByT5's and CANINE's are careful ones. Sweep a rate before you compare.
"""

from ml_collections import ConfigDict

ROWS, ROW_BYTES, ROW_PATCHES = 4, 2048, 456  # 4.49 bytes per patch
BYTE_LM_STEPS, BLT_STEPS = 350, 190  # equal training FLOPs, to 1 %
MODELS = {
    "byte_lm": dict(layers=4, width=128, heads=2, hidden=384, window=64),
    "byte_cnn": dict(context=2, width=128, layers=2, hidden=384),
    "blt": dict(
        local=dict(encoder_layers=1, decoder_layers=2, width=128, heads=2, hidden=384, window=64),
        cross=dict(slots=2, heads=2, encoder="last", decoder="all"),
        latent=dict(layers=4, width=256, heads=4, key_value_heads=4, hidden=768, remat="none"),
        hash=dict(sizes=(3, 4, 5, 6, 7, 8), functions=1, rows=8000),
    ),
    "llama": dict(
        layers=5, width=256, heads=4, key_value_heads=4, hidden=768, vocabulary=8000,
        rope_theta=10000.0, tokenizer="runs/quickstart/tokenizer.json",
    ),
    "megabyte": dict(
        patch_bytes=8, context=2048, global_layers=3, global_width=384, global_heads=6,
        local_layers=5, local_width=128, local_heads=2,
    ),
    "spacebyte": dict(
        window=64, context=2048, global_context=400, initial_layers=2, global_layers=4,
        global_width=256, global_heads=4, local_layers=5, local_width=128, local_heads=2,
    ),
    "mambabyte": dict(layers=9, width=160),
    "byt5": dict(
        encoder_layers=6, decoder_layers=2, width=128, heads=2, channels=64, hidden=256
    ),
    "canine": dict(
        layers=8, width=128, heads=2, hidden=512, buckets=4096, context=2048, classes=512
    ),
}  # fmt: skip
# Steps of equal training FLOPs, to 1 %; and learning rates, where not that of the first three.
STEPS = dict(
    llama=191, megabyte=189, spacebyte=185, mambabyte=193, byt5=151, canine=181, blt=BLT_STEPS
)
LR = dict(megabyte=2e-3, spacebyte=2.5e-3, mambabyte=2.5e-3, byt5=2e-3, canine=1e-3)
# Slots of a row besides bytes. A Llama's tokens are measured on the text.
SLOTS = dict(blt=ROW_PATCHES, llama=0, megabyte=260, spacebyte=400, canine=512)


def get_config(model: str = ""):
    if model not in MODELS:
        known = ", ".join(f":{name}" for name in MODELS)
        raise ValueError(f"configs/quickstart.py:{model}: write one of {known}")
    config = ConfigDict({model: MODELS[model]})
    if model == "blt":
        config.entropy_model = "runs/quickstart/byte_lm"
    kind = "records/{}" if model == "blt" else "text/{}/*.txt"
    source = f"runs/quickstart/{kind}"
    # A ByT5's attention sees whole rows, so its rows hold one document of about 1000 bytes.
    rows, row_bytes = (2 * ROWS, ROW_BYTES // 2) if model == "byt5" else (ROWS, ROW_BYTES)
    config.data = ConfigDict(
        dict(
            train=dict(text=dict(path=source.format("train"), split_bytes=1000)),
            eval=dict(text=dict(path=source.format("held_out"), split_bytes=1000)),
            batch_size=rows,
            seq_len=row_bytes,
            max_patches=SLOTS.get(model, row_bytes),
        )
    )
    config.optimizer = ConfigDict(
        dict(
            steps=STEPS.get(model, BYTE_LM_STEPS),
            lr=LR.get(model, 4e-3),
            warmup_steps=40,
            weight_decay=0.1,
        )
    )
    config.checkpoint = ConfigDict(dict(every=100, keep=2))
    config.compute_dtype = "float32"
    config.log_every = 20
    config.evaluate_every = 200
    return config
