"""A run so small that tests can afford it, in the form of the files in configs/."""

from ml_collections import ConfigDict


def get_config(model: str):
    config = ConfigDict()
    if model == "blt":
        config.blt = ConfigDict(
            dict(
                local=dict(
                    encoder_layers=1, decoder_layers=1, width=16, heads=2, hidden=32, window=8
                ),
                cross=dict(slots=2, heads=2, encoder="last", decoder="all"),
                latent=dict(
                    layers=2, width=32, heads=2, key_value_heads=2, hidden=48, remat="none"
                ),
                hash=dict(sizes=(3, 5), functions=1, rows=300),
            )
        )
    elif model == "byte_cnn":
        config.byte_cnn = ConfigDict(dict(context=2, width=16, layers=1, hidden=32))
    else:
        config.byte_lm = ConfigDict(dict(layers=2, width=16, heads=2, hidden=32, window=8))
    config.entropy_model = ""
    config.patching = ConfigDict(dict(mode="entropy", threshold=3.0, max_patch_bytes=12))
    source = dict(path="", weight=1.0, field="text", split_bytes=0)
    config.data = ConfigDict(
        dict(
            train=dict(text=source),
            eval=dict(text=source),
            batch_size=4,
            seq_len=64,
            max_patches=32 if model == "blt" else 64,
            look_ahead=4,
            prefetch=2,
            skip_bad=False,
        )
    )
    config.optimizer = ConfigDict(dict(steps=12, lr=3e-3, warmup_steps=2, grad_accum_steps=1))
    config.checkpoint = ConfigDict(dict(every=4, keep=2))
    config.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1))
    config.compute_dtype = "float32"
    config.attention = "auto"
    config.seed = 0
    config.log_every = 1
    config.evaluate_every = 6
    return config
