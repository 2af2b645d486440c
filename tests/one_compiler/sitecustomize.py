"""Processes of one machine find in the persistent cache what one of them compiled, as GPUs do.

A Python that is started with this folder in PYTHONPATH runs this file first. jax's key of a CPU's
program has the process in it that asks for it; without that, four processes on two cores need not
compile the same program four times. Here the kind of each device stands for the whole.
"""

import sys

if any(word.startswith("--process=") for word in sys.orig_argv):
    from jax._src import cache_key

    if not {"_hash_accelerator_config", "_hash_devices"} <= vars(cache_key).keys():
        raise SystemExit(f"{__file__}: this version of jax makes its keys in another way")
    cache_key._hash_accelerator_config = cache_key._hash_devices
