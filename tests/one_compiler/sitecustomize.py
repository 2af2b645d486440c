"""Processes of one machine share compiled programs through the persistent cache, as GPUs do.

A Python that is started with this folder, and the tests, in PYTHONPATH runs this file first.
"""

import sys

if any(word.startswith("--process=") for word in sys.orig_argv):
    from private_names import share_compiled_programs

    share_compiled_programs()
