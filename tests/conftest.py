"""Set before any test module is imported: ranks are forked from this process, so it must start no threads."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")
