"""A run of each rival, so small that tests can afford it, in the form of the files in configs/."""

from ml_collections import ConfigDict

SEQ_LEN = 96
SLOTS = {
    "megabyte": 36,
    "spacebyte": 48,
    "llama": 64,
    "canine": 24,
}  # per row, where a row counts them
MODELS = {
    "llama": dict(layers=2, width=32, heads=4, key_value_heads=2, hidden=48, vocabulary=300),
    "megabyte": dict(
        patch_bytes=4, context=128, global_layers=2, global_width=32, global_heads=4,
        local_layers=1, local_width=16, local_heads=2,
    ),
    "spacebyte": dict(
        window=8, context=128, global_context=64, initial_layers=1, local_layers=2,
        local_width=16, local_heads=2, global_layers=1, global_width=32, global_heads=4,
    ),
    "mambabyte": dict(layers=2, width=24, states=4),
    "byt5": dict(
        encoder_layers=2, decoder_layers=1, width=16, heads=2, channels=8, hidden=32, buckets=8,
        farthest=16, objective=dict(mean_span=4.0),
    ),
    "canine": dict(
        layers=1, width=32, heads=2, hidden=48, hashes=2, buckets=96, block=16, types=2,
        context=96, classes=256,
    ),
}  # fmt: skip


def get_config(model: str):
    config = ConfigDict({model: ConfigDict(MODELS[model])})
    config.data = ConfigDict(
        dict(
            train=dict(text=dict(path="train.jsonl")),
            eval=dict(text=dict(path="held_out.jsonl")),
            batch_size=4,
            seq_len=SEQ_LEN,
            max_patches=SLOTS.get(model, SEQ_LEN),
        )
    )
    config.optimizer = ConfigDict(dict(steps=50, lr=1e-2, warmup_steps=5))
    config.checkpoint = ConfigDict(dict(every=25, keep=2))
    config.compute_dtype = "float32"
    config.log_every = 1
    config.evaluate_every = 25
    return config
