"""BLT 8B as released ("7b"): 10,553,570,560 parameters, 3.84 billion of them in hash tables.

    python -m bltjax train --config=configs/blt_8b.py --workdir=WORKDIR \
        --config.entropy_model=BYTE_LM_WORKDIR \
        --config.data.train.text.path=RECORDS --config.data.held_out.text.path=HELD_OUT_RECORDS

RECORDS are folders that `python -m bltjax entropies` wrote. Hardware: 256 chips (v5p).
Not run here: this project's machines have no TPU. The paper's recipe: rows of about
16k bytes, 16M bytes a step, lr 4e-4, cosine to zero.
The paper's 8B, trained on 1T tokens, averages 61.1 on seven tasks (table 1).

Variants, as `configs/blt_8b.py:patch_6`; their figures, where there are any, are the paper's:

    patch_6    entropy patches of 6 bytes: a third fewer latent steps. Give the threshold that
               `python -m bltjax calibrate --mean=6` finds: --config.patching.threshold=NATS
    patch_8    of 8 bytes, with 3 encoder layers, as the paper has them; calibrate with --mean=8
    space      a patch ends with a space or the like: 6.1 bytes in the paper, 58.0 on the seven
               tasks. It needs no byte LM: give raw text as data
    static     patches of 4 bytes, as in MegaByte; raw text as well
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
                remat=True,
            ),
            cross=dict(slots=4, heads=20, encoder="last", decoder="all"),
            latent=dict(
                layers=32,
                width=4096,
                heads=32,
                key_value_heads=32,
                hidden=11008,
                rope_theta=500000.0,
                remat=True,
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
    config.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1))
    config.compute_dtype = "auto"
    config.attention = "auto"
    config.seed = 0
    config.log_every = 10
    config.evaluate_every = 1000
    return config
