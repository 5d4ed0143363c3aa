"""Set before any test module is imported: ranks are forked from this process, so it must start no threads."""

import gc
import os
import signal

# Threads that wait for each other by spinning take the cores from other ranks; those of whole runs inherit this.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

gc.disable()  # while tests are collected: a million objects are made to stay, and each collection would walk them all

# A shell starts what runs in its background with SIGINT ignored, and so would be every process started here: the tests
# of Ctrl-C send it to some of them.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What was imported stays to the end: no collection walks it again, here or in a forked rank."""
    gc.collect()
    gc.freeze()
    gc.enable()
