"""The released entropy model: 14 layers of 768, window 512, 99,512,064 parameters.

    python -m bltjax train --config=configs/byte_lm_100m.py --workdir=WORKDIR \
        --config.data.train.text.path='DATA/*.jsonl' --config.data.held_out.text.path=DATA/val.jsonl

Hardware: one TPU slice of 8 chips or more; rows of 8192 bytes, 64 rows a step. Not run here: this
project's machines have no TPU. Expect about 1 bit per byte on English web text (paper 4.2); mean
patches of about 4.5 bytes need a threshold near 1.34 nats.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.byte_lm = ConfigDict(
        dict(
            layers=14, width=768, heads=12, hidden=2048, window=512, rope_theta=10000.0, remat=True
        )
    )
    source = dict(path="data/*.jsonl", weight=1.0, field="text", split_bytes=0)
    config.data = ConfigDict(
        dict(
            train=dict(text=source),
            held_out=dict(text=source | {"path": "data/val.jsonl"}),
            rows=64,
            row_bytes=8192,
            row_patches=8192,
            look_ahead=32,
            skip_bad=False,
        )
    )
    config.optimizer = ConfigDict(
        dict(steps=100_000, lr=4e-4, warmup_steps=500, final_lr_ratio=0.1, clip=10.0, accumulate=1)
    )
    config.checkpoint = ConfigDict(dict(every=1000, keep=2))
    config.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1))
    config.compute_dtype = "auto"
    config.attention = "auto"
    config.seed = 0
    config.log_every = 10
    config.evaluate_every = 1000
    return config
