"""BLT whose latent transformer begins as Llama 3.1 8B ("byteifying", paper 6.2, table 5).

    python -m bltjax calibrate --records=RECORDS --mean=4.5
    python -m bltjax train --config=configs/blt_8b_from_llama3.py --workdir=WORKDIR \
        --init_latent_from=LLAMA_DIR \
        --config.entropy_model=BYTE_LM_WORKDIR --config.patching.threshold=NATS \
        --config.data.train.text.path=RECORDS --config.data.eval.text.path=HELD_OUT_RECORDS

LLAMA_DIR holds config.json and the safetensors of Llama 3.1 8B (32 layers of 4096, 32 heads, 8
key/value heads, feed-forward 14336, its rope scaling). For Llama 3 give
`--config.blt.latent.rope_scaling=None`. Its embedding, head and final norm are dropped.

Two stages in one run: for the first 10,000 updates the latent transformer is frozen and the local
models adapt to it; then all of it trains, the latent transformer at a tenth of the others' rate
(`latent_init`).

Hardware: 64 chips (v5p:4x4x4, 95 GB each). 11,056,887,040 parameters, 3.84 billion of them in hash
tables; with Adam's two moments and gradients in fp32, 16 bytes per parameter, 176.9 GB in total and
2.76 GB per chip. A step of 4M bytes is 52.6 PFLOP (`bltjax/model/flops.py`), 4.5 s if the chips
reach 40 % of their 459 TFLOP/s in bf16, and 50,000 steps, 210 GB of text, take 3 days. It was never
run: its shapes and its parameter count are tested, and a small Llama's hidden states; the rest is
arithmetic. The paper's table 5 has the benchmark figures of such a start.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.blt = ConfigDict(
        dict(
            local=dict(
                encoder_layers=1,
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
                key_value_heads=8,
                hidden=14336,
                rope_theta=500000.0,
                rope_scaling=dict(factor=8.0, low_turns=1.0, high_turns=4.0, positions=8192),
                remat="full",
            ),
            hash=dict(sizes=(3, 4, 5, 6, 7, 8), functions=1, rows=500002),
        )
    )
    config.entropy_model = "runs/byte_lm_100m"
    config.latent_init = ConfigDict(
        dict(path="llama-3.1-8b", lr_multiplier=0.1, frozen_steps=10_000)
    )
    config.patching = ConfigDict(dict(mode="entropy", threshold=1.335442066192627))
    config.data = ConfigDict(
        dict(
            train=dict(text=dict(path="data/records")),
            eval=dict(text=dict(path="data/held_out_records")),
            batch_size=256,
            seq_len=16384,
            max_patches=4096,
        )
    )
    config.optimizer = ConfigDict(
        dict(
            steps=50_000,
            lr=4e-4,
            warmup_steps=2000,
            b1=0.9,
            b2=0.95,
            weight_decay=0.1,
            clip=1.0,
            grad_accum_steps=4,
        )
    )
    config.checkpoint = ConfigDict(dict(every=1000, keep=2))
    config.mesh = ConfigDict(dict(data=1, fsdp=64, tensor=1))
    config.evaluate_every = 1000
    return config
