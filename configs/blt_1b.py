"""BLT 1B as released: 4,533,879,808 parameters, 3.07 billion of them in hash tables.

    python -m bltjax calibrate --records=RECORDS --mean=4.1
    python -m bltjax train --config=configs/blt_1b.py --workdir=WORKDIR \
        --config.entropy_model=BYTE_LM_WORKDIR --config.patching.threshold=NATS \
        --config.data.train.text.path=RECORDS --config.data.held_out.text.path=HELD_OUT_RECORDS

RECORDS are folders that `python -m bltjax entropies` wrote with the byte LM; NATS is the threshold
that calibrate finds on them. The config's own is right only for the released byte LM.

Hardware: 64 chips (v5p:4x4x4, 95 GB each). Parameters, Adam's two moments and gradients in fp32 are
16 bytes per parameter, 72.5 GB in total and 1.13 GB per chip, since all of it is sharded; the rest
is for the activations of 4 rows of 16 KiB at a time. So time is the limit, not memory: a step is
54.9 PFLOP (`bltjax/model/flops.py`), 4.7 s if the chips reach 40 % of their 459 TFLOP/s in bf16,
and 240,000 steps, 4 TB of text, take 13 days. It has never been run: its shapes and its parameter
count are tested, the rest is arithmetic.

The recipe is the paper's: rows of 16 KiB, 16M bytes per step, lr 4e-4, cosine to zero. Expect
patches of 4.14 to 4.17 bytes on DCLM at the released threshold with the released byte LM, as a
reproduction measured; for bits per byte, the curve of 1B in the paper's figure 6.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.blt = ConfigDict(
        dict(
            local=dict(
                encoder_layers=1,
                decoder_layers=9,
                width=1024,
                heads=16,
                hidden=2816,
                window=512,
                rope_theta=500000.0,
                remat="full",
            ),
            cross=dict(slots=2, heads=16, encoder="last", decoder="all"),
            latent=dict(
                layers=25,
                width=2048,
                heads=16,
                key_value_heads=16,
                hidden=5632,
                rope_theta=500000.0,
                remat="full",
            ),
            hash=dict(sizes=(3, 4, 5, 6, 7, 8), functions=1, rows=500002),
        )
    )
    config.entropy_model = "runs/byte_lm_100m"
    config.patching = ConfigDict(dict(mode="entropy", threshold=1.335442066192627))
    source = dict(path="data/records", weight=1.0, field="text", split_bytes=0)
    config.data = ConfigDict(
        dict(
            train=dict(text=source),
            held_out=dict(text=source | {"path": "data/held_out_records"}),
            rows=1024,
            row_bytes=16384,
            row_patches=4096,
            look_ahead=32,
            skip_bad=False,
        )
    )
    config.optimizer = ConfigDict(
        dict(
            steps=240_000,
            lr=4e-4,
            warmup_steps=2000,
            final_lr_ratio=0.0,
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            clip=1.0,
            accumulate=4,
        )
    )
    config.checkpoint = ConfigDict(dict(every=1000, keep=2))
    config.mesh = ConfigDict(dict(data=1, fsdp=64, tensor=1))
    config.compute_dtype = "auto"
    config.attention = "auto"
    config.seed = 0
    config.log_every = 10
    config.evaluate_every = 1000
    return config
