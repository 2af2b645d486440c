"""Serves the programs of an export without bltjax: jax, numpy and tensorstore are enough.

    python -m bltjax convert SRC EXPORT --serving=4096     # EXPORT/serving, beside the weights
    python launch/serve_export.py EXPORT < PROMPTS         # one prompt per line, one text per line

Decoding is greedy, one prompt at a time. This file is a model to copy: it reads `serving.json`,
which lists the arrays, the programs and their arguments, and imports nothing of ours.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.export
import numpy as np
import tensorstore


class Server:
    """The weights and programs of an export, ready to continue prompts."""

    def __init__(self, export: str | Path):
        self.export = Path(export)
        about = json.loads((self.export / "serving/serving.json").read_text(encoding="utf-8"))
        alphabet = about["alphabet"]
        self.bos, self.eos = alphabet["bos"], alphabet["eos"]
        self.first_byte = alphabet["first_byte"]
        self.writable = np.delete(np.arange(alphabet["size"]), alphabet["never_written"])
        self.weights = self.program("prepare")(tuple(map(self.array, about["arrays"])))
        self.prefill = {size: self.program(f"prefill_{size}") for size in about["prompts"]}
        self.step = self.program("step", donate_argnums=1)  # caches are updated in place

    def array(self, entry: dict) -> np.ndarray:
        store = {"driver": "file", "path": str(self.export / entry["path"])}
        return tensorstore.open({"driver": "zarr", "kvstore": store}).result().read().result()

    def program(self, name: str, **options):
        stored = bytearray((self.export / "serving" / f"{name}.bin").read_bytes())
        return jax.jit(jax.export.deserialize(stored).call, **options)

    def continued(self, prompt: bytes, max_bytes: int) -> Iterator[int]:
        """The bytes that follow a prompt, until EOS, `max_bytes` or the export's last position.

        Raises:
          ValueError: for a prompt that is longer than the largest prefill program.
        """
        ids = [self.bos, *(self.first_byte + byte for byte in prompt)]
        if len(ids) > max(self.prefill):
            raise ValueError(
                f"the prompt has {len(prompt)} bytes; this export takes at most"
                f" {max(self.prefill) - 1}"
            )
        size = min(size for size in self.prefill if size >= len(ids))
        row = np.array([ids + [0] * (size - len(ids))], np.int32)
        logits, room, memory = self.prefill[size](self.weights, row, np.int32([len(ids)]))
        for _ in range(max_bytes):
            new = int(self.writable[np.argmax(logits[0, self.writable])])
            if new == self.eos or room[0] < 0:
                return
            yield new - self.first_byte
            logits, room, memory = self.step(
                self.weights, memory, np.int32([new]), np.array([True])
            )


def main() -> int:
    parser = argparse.ArgumentParser(description="Continue prompts with an export's programs.")
    parser.add_argument("export", help="folder that `convert --serving` wrote")
    parser.add_argument("--max_bytes", type=int, default=200)
    args = parser.parse_args()
    server = Server(args.export)
    for line in sys.stdin.buffer:
        prompt = line.rstrip(b"\r\n")
        try:
            text = bytes(server.continued(prompt, args.max_bytes))
        except ValueError as error:
            print(f"serve_export.py: {error}", file=sys.stderr)
            return 1
        sys.stdout.buffer.write(prompt + text + b"\n")
        sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
