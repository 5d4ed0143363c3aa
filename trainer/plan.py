"""What a model costs, as arithmetic on its config: parameters and floating-point operations.

Legend: L layers, h hidden size, f feed-forward size, s sequence length, V vocabulary.
"""

from trainer.config import ModelConfig


def num_parameters(model: ModelConfig, *, padded: bool = False) -> int:
    """Weights of the model, exactly; a matrix shared by the embedding and the output layer counts once.

    Args:
        padded: count the vocabulary rows that are held in memory (a multiple of `config.VOCAB_MULTIPLE`) and not only
            those that stand for a token. Published counts are unpadded.
    """
    h, f = model.hidden_size, model.ffn_size
    vocab_rows = model.padded_vocab_size if padded else model.vocab_size
    token_matrices = 1 if model.tied_embeddings else 2
    embeddings = token_matrices * vocab_rows * h + model.seq_length * h
    final_norm = 2 * h if model.norm_placement == "pre" else 0
    return embeddings + model.num_layers * _layer_parameters(h, f) + final_norm


def _layer_parameters(h: int, f: int) -> int:
    """Every linear layer has a bias, every norm a weight and a bias."""
    attention = (h * 3 * h + 3 * h) + (h * h + h)
    feed_forward = (h * f + f) + (f * h + h)
    norms = 2 * 2 * h
    return attention + feed_forward + norms


def model_flops_per_token(model: ModelConfig) -> int:
    """Floating-point operations that training on one token needs: forward plus backward, without recomputation.

    6 per weight of a matrix product (a multiply and an add, once forward and twice backward), plus 12 L h s for
    attention's two products of s x s, counted in full although a causal kernel may skip half of them. With f = 4h this
    is 72 L h^2 (1 + s / 6h + V / 12Lh): Narayanan et al. 2021 (arXiv:2104.04473), section 5.1, less the forward
    pass that its equation 3 repeats for recomputation; Chowdhery et al. 2022 (PaLM, arXiv:2204.02311), appendix B,
    counts attention the same way. The output layer counts with the true vocabulary; the embedding is a look-up.

    Known error: norms, softmax, GELU, biases, dropout and the optimizer are left out (about 1 % at h = 1024, s = 2048,
    less in wider models), and a causal kernel does only half of the attention counted, so that a run on one is
    credited with too much: 1.4 % for GPT-3 175B, 13 % for GPT-3 Small.
    """
    h, s, layers = model.hidden_size, model.seq_length, model.num_layers
    matrix_weights = layers * (4 * h * h + 2 * h * model.ffn_size) + model.vocab_size * h
    return 6 * matrix_weights + 12 * layers * h * s
