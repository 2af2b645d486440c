"""BLT 8B as released ("7b"): 10,553,570,560 parameters, 3.84 billion of them in hash tables.

    python -m bltjax calibrate --records=RECORDS --mean=4.1
    python -m bltjax train --config=configs/blt_8b.py --workdir=WORKDIR \
        --config.entropy_model=BYTE_LM_WORKDIR --config.patching.threshold=NATS \
        --config.data.train.text.path=RECORDS --config.data.held_out.text.path=HELD_OUT_RECORDS

RECORDS are folders that `python -m bltjax entropies` wrote with the byte LM; NATS is the threshold
that calibrate finds on them. The config's own is right only for the released byte LM.

Hardware: 256 chips (v5p:4x8x8, 95 GB each). Parameters, Adam's two moments and gradients in fp32
are 16 bytes per parameter, 168.9 GB in total and 0.66 GB per chip, since all of it is sharded; the
rest is for the activations of 1 row of 16 KiB at a time. So time is the limit, not memory: a step
is 197.6 PFLOP (`bltjax/model/flops.py`), 4.2 s if the chips reach 40 % of their 459 TFLOP/s in
bf16, and 240,000 steps, 4 TB of text, take 12 days. It has never been run: its shapes and its
parameter count are tested, the rest is arithmetic.

The recipe is the paper's: rows of 16 KiB, 16M bytes per step, lr 4e-4, cosine to zero. The paper's
8B, trained on 1T tokens, averages 61.1 on seven tasks (table 1).

Variants, with their PFLOP per step, on the same hardware:

    patch_6   135.5   entropy patches of 6 bytes: a third fewer latent steps
    patch_8   109.3   of 8 bytes, with 3 encoder layers, as the paper has them
    space     135.5   a patch ends with a space or the like: 6.1 bytes in the paper, and 58.0 on the
                      seven tasks (table 1)
    static    200.6   patches of 4 bytes, as in MegaByte

We know of no figures on the seven tasks for patch_6, patch_8 and static. The first two keep the
released threshold, whose patches are shorter: set their own, or rows run out of patches with a
third, or half, of their bytes unused, and the trainer warns.

    python -m bltjax calibrate --records=RECORDS --mean=6
    python -m bltjax train --config=configs/blt_8b.py:patch_6 --workdir=WORKDIR \
        --config.entropy_model=BYTE_LM_WORKDIR --config.patching.threshold=NATS \
        --config.data.train.text.path=RECORDS --config.data.held_out.text.path=HELD_OUT_RECORDS

    python -m bltjax calibrate --records=RECORDS --mean=8
    python -m bltjax train --config=configs/blt_8b.py:patch_8 --workdir=WORKDIR \
        --config.entropy_model=BYTE_LM_WORKDIR --config.patching.threshold=NATS \
        --config.data.train.text.path=RECORDS --config.data.held_out.text.path=HELD_OUT_RECORDS

space and static need no byte LM and no records:

    python -m bltjax train --config=configs/blt_8b.py:space --workdir=WORKDIR \
        --config.data.train.text.path='DATA/*.jsonl' --config.data.held_out.text.path=DATA/val.jsonl
    python -m bltjax train --config=configs/blt_8b.py:static --workdir=WORKDIR \
        --config.data.train.text.path='DATA/*.jsonl' --config.data.held_out.text.path=DATA/val.jsonl
"""

from ml_collections import ConfigDict

# row_patches leaves room for each document's BOS, which is a patch of its own.
VARIANTS = {
    "": dict(row_patches=4096),
    "patch_6": dict(row_patches=2752),
    "patch_8": dict(row_patches=2064, encoder_layers=3),
    "space": dict(row_patches=2752, patching=dict(mode="space")),
    "static": dict(row_patches=4160, patching=dict(mode="static", patch_bytes=4)),
}


def get_config(variant: str = ""):
    if variant not in VARIANTS:
        raise ValueError(f"configs/blt_8b.py:{variant}: write one of {', '.join(VARIANTS)[2:]}")
    settings = VARIANTS[variant]
    config = ConfigDict()
    config.blt = ConfigDict(
        dict(
            local=dict(
                encoder_layers=settings.get("encoder_layers", 1),
                decoder_layers=6,
                width=1280,
                heads=20,
                hidden=3584,
                window=512,
                rope_theta=500000.0,
                remat="full",
            ),
            cross=dict(slots=4, heads=20, encoder="last", decoder="all"),
            latent=dict(
                layers=32,
                width=4096,
                heads=32,
                key_value_heads=32,
                hidden=11008,
                rope_theta=500000.0,
                remat="full",
            ),
            hash=dict(sizes=(3, 4, 5, 6, 7, 8), functions=1, rows=500002),
        )
    )
    entropy = dict(mode="entropy", threshold=1.335442066192627)
    config.patching = ConfigDict(settings.get("patching", entropy))
    by_entropy = config.patching.mode == "entropy"
    config.entropy_model = "runs/byte_lm_100m" if by_entropy else ""
    kind = "records" if by_entropy else "text"
    source = dict(path=f"data/{kind}", weight=1.0, field="text", split_bytes=0)
    config.data = ConfigDict(
        dict(
            train=dict(text=source),
            held_out=dict(text=source | {"path": f"data/held_out_{kind}"}),
            rows=1024,
            row_bytes=16384,
            row_patches=settings["row_patches"],
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
    config.mesh = ConfigDict(dict(data=1, fsdp=256, tensor=1))
    config.compute_dtype = "auto"
    config.attention = "auto"
    config.seed = 0
    config.log_every = 10
    config.evaluate_every = 1000
    return config
