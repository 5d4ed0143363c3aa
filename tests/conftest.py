"""Set before any test module is imported: ranks are forked from this process, so it must start no threads."""

import signal

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

# A shell starts what runs in its background with SIGINT ignored, and so would be every process started here: the tests
# of Ctrl-C send it to some of them.
signal.signal(signal.SIGINT, signal.default_int_handler)
