"""Losses of direct preference optimization: how far a model prefers the right one of two answers more than another did.

    m = (log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected))

for the model p and the one that it began as, q; an answer's log-probability is the sum over its tokens, for ipo the
mean. beta m is the reward margin of the pair.

Sources: sigmoid, Rafailov et al., 2023, arXiv:2305.18290, with label smoothing as in Mitchell, 2023 (conservative DPO);
hinge, Zhao et al., 2023, arXiv:2305.10425; ipo, Azar et al., 2023, arXiv:2310.12036.

Dimensions: `P` pairs.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from schemas.config import DpoConfig


def compute_pair_losses(margins: Tensor, config: DpoConfig) -> Tensor:
    """Return the loss [P] of each pair.

    Args:
        margins: m [P], in nats.
        config: which loss, beta and smoothing.
    """
    if config.loss == "ipo":
        return (margins - 1 / (2 * config.beta)) ** 2
    rewards = config.beta * margins
    if config.loss == "hinge":
        return (1 - rewards).relu()
    return -(1 - config.label_smoothing) * logsigmoid(rewards) - config.label_smoothing * logsigmoid(-rewards)
