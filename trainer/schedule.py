"""Learning rate as a function of tokens seen."""

import math

from trainer.config import RunConfig


def learning_rate(config: RunConfig, tokens: int) -> float:
    """Linear warm-up from zero, then a cosine down to `min_lr_fraction` of the peak, then constant.

    The shape is GPT-3's (Brown et al. 2020, appendix B). `tokens` counts those seen once the step that uses this rate
    is done, so that the first step already moves.
    """
    optimizer = config.optimizer
    decay_tokens = config.train.total_tokens if optimizer.decay_tokens is None else optimizer.decay_tokens
    if tokens < optimizer.warmup_tokens:
        return optimizer.lr * tokens / optimizer.warmup_tokens
    if tokens >= decay_tokens:
        return optimizer.lr * optimizer.min_lr_fraction
    progress = (tokens - optimizer.warmup_tokens) / (decay_tokens - optimizer.warmup_tokens)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return optimizer.lr * (optimizer.min_lr_fraction + (1 - optimizer.min_lr_fraction) * cosine)
