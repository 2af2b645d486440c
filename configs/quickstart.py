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
"""

from ml_collections import ConfigDict

ROWS, ROW_BYTES, ROW_PATCHES = 4, 2048, 456  # 4.49 bytes per patch
BYTE_LM_STEPS, BLT_STEPS = 350, 190  # equal training FLOPs, to 1 %


def get_config(model: str = ""):
    if model not in ("byte_lm", "byte_cnn", "blt"):
        raise ValueError(f"configs/quickstart.py:{model}: write :byte_lm, :byte_cnn or :blt")
    config = ConfigDict()
    is_blt = model == "blt"
    if is_blt:
        config.blt = ConfigDict(
            dict(
                local=dict(
                    encoder_layers=1, decoder_layers=2, width=128, heads=2, hidden=384, window=64
                ),
                cross=dict(slots=2, heads=2, encoder="last", decoder="all"),
                latent=dict(
                    layers=4, width=256, heads=4, key_value_heads=4, hidden=768, remat="none"
                ),
                hash=dict(sizes=(3, 4, 5, 6, 7, 8), functions=1, rows=8000),
            )
        )
        config.entropy_model = "runs/quickstart/byte_lm"
    elif model == "byte_cnn":
        config.byte_cnn = ConfigDict(dict(context=2, width=128, layers=2, hidden=384))
    else:
        config.byte_lm = ConfigDict(dict(layers=4, width=128, heads=2, hidden=384, window=64))
    source = "runs/quickstart/records/{}" if is_blt else "runs/quickstart/text/{}/*.txt"
    config.data = ConfigDict(
        dict(
            train=dict(text=dict(path=source.format("train"), split_bytes=1000)),
            eval=dict(text=dict(path=source.format("held_out"), split_bytes=1000)),
            batch_size=ROWS,
            seq_len=ROW_BYTES,
            max_patches=ROW_PATCHES if is_blt else ROW_BYTES,
        )
    )
    steps = BLT_STEPS if is_blt else BYTE_LM_STEPS
    config.optimizer = ConfigDict(dict(steps=steps, lr=4e-3, warmup_steps=40, weight_decay=0.1))
    config.checkpoint = ConfigDict(dict(every=100, keep=2))
    config.compute_dtype = "float32"
    config.log_every = 20
    config.evaluate_every = 200
    return config
