"""The released entropy model: 14 layers of 768, window 512, 99,512,064 parameters.

    python -m bltjax train --config=configs/byte_lm_100m.py --workdir=WORKDIR \
        --config.data.train.text.path='DATA/*.jsonl' --config.data.eval.text.path=DATA/val.jsonl

Hardware: 8 chips (v5p:2x2x2, 95 GB each), or one H100. Parameters, Adam's two moments and gradients
in fp32 are 16 bytes per parameter, 1.6 GB in total and 0.20 GB per chip, since all of it is
sharded: only activations need memory, so `remat` is on. A step of 64 rows of 8 KiB is 0.346 PFLOP
(`bltjax/model/flops.py`), 0.24 s if the chips reach 40 % of their 459 TFLOP/s in bf16, and 100,000
steps, 52 GB of text, take 7 hours. It has never been run on TPUs. One H100 trained it in bf16 at
197 kB/s with --config.data.batch_size=8 (`bltjax/benchmark/README.md`): at that speed the text
takes 3 days.

Expect about 1 bit per byte on English web text, an estimate from models of this size: no figure is
published. At the released threshold, 1.335 nats, patches of the released weights average 4.14 to
4.17 bytes on DCLM, as a reproduction measured; `python -m bltjax calibrate` finds that of your own.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.byte_lm = ConfigDict(
        dict(
            layers=14,
            width=768,
            heads=12,
            hidden=2048,
            window=512,
            rope_theta=10000.0,
            remat="full",
        )
    )
    config.data = ConfigDict(
        dict(
            train=dict(text=dict(path="data/*.jsonl")),
            eval=dict(text=dict(path="data/val.jsonl")),
            batch_size=64,
            seq_len=8192,
            max_patches=8192,
        )
    )
    config.optimizer = ConfigDict(
        dict(
            steps=100_000,
            lr=4e-4,
            warmup_steps=500,
            final_lr_ratio=0.1,
            clip=10.0,
        )
    )
    config.checkpoint = ConfigDict(dict(every=1000, keep=2))
    config.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1))
    config.evaluate_every = 1000
    return config
