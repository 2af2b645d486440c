"""Small models of the transformers port, by rule: no weights are stored, only the port's outputs.

`python tests/port.py` (with torch and transformers) records its outputs to tests/golden/port.npz.
"""

import zlib
from pathlib import Path

import numpy as np
from etils import epath

from bltjax.configured import leaf_shapes
from bltjax.text.alphabet import encode
from bltjax.weights.lazy import Tensor
from bltjax.weights.released.hf_settings import read_settings
from bltjax.weights.released.llama import block_shapes, latent_config
from bltjax.weights.released.mapping import LLAMA, PORT, blt_parts, byte_lm_parts, latent_parts
from bltjax.weights.released.tensors import tensor_shapes
from bltjax.weights.safetensors import write_file

RECORDED = Path(__file__).parent / "golden" / "port.npz"
TEXT = "A byte. 补丁从难猜的字节开始。 🚀 def f(x):\n    return x + 1\n" * 2
TEXTS = (TEXT[:9], TEXT)  # shorter and longer than the window of 16
ROWS = 12  # of the logits, spread over the text, are recorded
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip


def case(
    *, E=32, D=48, K=2, encoder_layers=1, encoder_all=False, decoder_all=True, window=16, heads=4,
    shared=4, rope=None, functions=1, longest_patch=None, encoder_hidden=64,
) -> dict:  # fmt: skip
    """The port's config.json, small, with every field that the importer reads."""
    rope = rope or {"rope_type": "default", "rope_theta": 500000.0}

    def stack(width, layers, hidden, **more):
        return {
            "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": heads, "intermediate_size": hidden,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        } | more  # fmt: skip

    cross = {"cross_attn_k": K, "hidden_size_global": D}
    return {
        "architectures": ["BltForCausalLM"], "model_type": "blt", "vocab_size": 260,
        "max_position_embeddings": 512, "patching_mode": "entropy", "patch_size": 4,
        "max_patch_length": longest_patch, "local_attention_window_len": window,
        "cross_attn_k": K, "encoder_hash_byte_group_size": [3, 4, 8],
        "encoder_hash_byte_group_vocab": 97, "encoder_hash_byte_group_nb_functions": functions,
        "patcher_config": stack(
            32, 2, 48, sliding_window=16,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        "encoder_config": stack(
            E, encoder_layers, encoder_hidden, cross_attn_all_layers=encoder_all, **cross
        ),
        "decoder_config": stack(E, 2, 64, cross_attn_all_layers=decoder_all, **cross),
        "global_config": stack(D, 2, 64, rope_parameters=rope) | {"num_key_value_heads": shared},
    }  # fmt: skip


CASES = {
    "projected": case(),
    "unprojected": case(D=64),
    "two_functions": case(functions=2),
    "two_encoder_layers": case(encoder_layers=2, encoder_hidden=48),
    "pools_each_layer": case(encoder_layers=2, encoder_all=True),
    "decoder_first": case(decoder_all=False, K=3),
    "no_window": case(window=None),
    "longest_patch": case(longest_patch=3),
    "grouped_and_scaled": case(shared=2, rope=LLAMA3),
}
LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64,
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "max_position_embeddings": 512, "rope_parameters": LLAMA3,
}  # fmt: skip


def by_rule(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights of a name: a hash of each index, scaled as in a fresh model."""
    x = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint32)
    x += np.uint32(1000003 * (zlib.crc32(name.encode()) % 100000) % 2**32)
    for _ in range(2):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x45D9F3B)
    x ^= x >> np.uint32(16)
    unit = (2 * x.astype(np.float64) / 2**32 - 1).reshape(shape)
    if len(shape) == 1:
        unit = 1 + 0.2 * unit
    elif "embed" not in name or "projection" in name:
        unit *= (3 / shape[1]) ** 0.5
    return unit.astype(np.float32)


def tensors_by_rule(shapes: dict, dtypes: dict | None = None) -> dict[str, Tensor]:
    found = {}
    for name, shape in shapes.items():
        array = by_rule(name, shape).astype((dtypes or {}).get(name, np.float32))
        found[name] = Tensor(shape, array.dtype, lambda a, b, x=array: x[a:b], "rule")
    return found


def shapes_of(config, byte_lm) -> dict:
    """The shape of each tensor of the port, from our configs."""
    found = tensor_shapes(blt_parts(PORT, config.model), leaf_shapes(config))
    parts = byte_lm_parts(PORT, byte_lm.model)
    return found | tensor_shapes(parts, leaf_shapes(byte_lm))


def llama_shapes(latent) -> dict:
    blocks = tensor_shapes(latent_parts(LLAMA, latent, rotary="half_split"), block_shapes(latent))
    width = latent.width
    return blocks | {
        "model.embed_tokens.weight": (64, width), "model.norm.weight": (width,),
        "lm_head.weight": (64, width),
    }  # fmt: skip


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_file(epath.Path(folder / "model.safetensors"), tensors, lambda _: None)


def rows_of(logits: np.ndarray) -> np.ndarray:
    return logits[np.linspace(0, len(logits) - 1, ROWS).round().astype(int)]


def llama_inputs() -> np.ndarray:
    """float32 [1, 80, 48]: longer than the positions before the scaling."""
    return np.random.default_rng(0).standard_normal((1, 80, 48)).astype(np.float32)


def record_port(config: dict, tensors: dict[str, Tensor], threshold: float | None) -> dict:
    """The port's own entropies and logits; the threshold is chosen where no entropy is near."""
    import torch
    from transformers import BltConfig, BltForCausalLM

    peer = BltForCausalLM(BltConfig(**config)).eval()
    weights = peer.state_dict()
    assert weights.keys() == tensors.keys()
    with torch.no_grad():
        for name, tensor in tensors.items():
            weights[name].copy_(torch.from_numpy(tensor.all()))
        ids = [torch.from_numpy(encode(text, eos=False)).long()[None] for text in TEXTS]
        entropies = [peer.model.patcher(x, patch_size=4, threshold=1.0)[0][0].numpy() for x in ids]
        if threshold is None:
            ordered = np.sort(entropies[1])
            gaps = np.diff(ordered)[len(ordered) // 2 : -len(ordered) // 6]
            at = len(ordered) // 2 + int(gaps.argmax())
            threshold = float(ordered[at] + ordered[at + 1]) / 2
        peer.config.patching_threshold = threshold
        logits = [rows_of(peer(x, use_cache=False).logits[0].numpy()) for x in ids]
    return {"threshold": np.float64(threshold), "entropies": entropies, "logits": logits}


def record_llama(tensors: dict[str, Tensor]) -> np.ndarray:
    """The output of Llama's last layer, before the final norm, [80, 48]."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    peer = LlamaForCausalLM(LlamaConfig(**LLAMA_CONFIG)).eval()
    weights, hidden = peer.state_dict(), []
    with torch.no_grad():
        for name, tensor in tensors.items():
            weights[name].copy_(torch.from_numpy(tensor.all()))
        peer.model.layers[-1].register_forward_hook(lambda m, i, out: hidden.append(out))
        peer.model(inputs_embeds=torch.from_numpy(llama_inputs()))
    out = hidden[0][0] if isinstance(hidden[0], tuple) else hidden[0]
    return out.numpy().reshape(80, 48)


def configs_of(config: dict, threshold: float, *, as_port: bool = True):
    """Our configs of a case, through the importer's own reading of its config.json."""
    run, byte_lm, _ = read_settings(config | {"patching_threshold": threshold}, "case", as_port)
    return run, byte_lm


def record() -> None:
    found = {}
    for name, config in CASES.items():
        tensors = tensors_by_rule(shapes_of(*configs_of(config, 1.0)))
        said = record_port(config, tensors, None)
        found[f"{name}/threshold"] = said["threshold"]
        for number in range(len(TEXTS)):
            found[f"{name}/entropies_{number}"] = said["entropies"][number]
            found[f"{name}/logits_{number}"] = said["logits"][number]
        print(name, said["threshold"])
    tensors = tensors_by_rule(llama_shapes(latent_config(LLAMA_CONFIG, "case", "none")))
    found["llama/hidden"] = record_llama(tensors)
    np.savez_compressed(RECORDED, **found)
    print(RECORDED, RECORDED.stat().st_size)


if __name__ == "__main__":
    record()
