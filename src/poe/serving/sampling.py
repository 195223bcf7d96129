"""Choose the next token of one row: greedily, or at random with a temperature, a nucleus and a seed of its own."""

import secrets
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a row's tokens are chosen.

    `temperature` 0 takes the most likely token. `top_p` keeps the smallest set of tokens with at least this
    probability. Rows with the same `seed` and the same logits choose the same tokens; None is a random seed.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def make_generator(self) -> torch.Generator:
        """Return the random numbers of one row."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return torch.Generator().manual_seed(seed % 2**63)

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """Return a token for logits (V)."""
        if self.temperature < 1e-5:  # nearly 0 would overflow
            return int(logits.argmax())
        probabilities = (logits.cpu().double() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, tokens = probabilities.sort(descending=True, stable=True)
            kept = ordered.cumsum(-1) - ordered < self.top_p  # always the first one
            return int(tokens[torch.multinomial(ordered * kept, 1, generator=generator)])
        return int(torch.multinomial(probabilities, 1, generator=generator))


GREEDY = Sampling()


@dataclass(frozen=True)
class TokenScore:
    """A token that was chosen, with its log-probability in nats, and the most likely tokens at its place.

    They are the model's own, before temperature, nucleus and grammar.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def score_token(logits: Tensor, token: int, count: int) -> TokenScore:
    """Return the score of a token for logits (V), with the `count` most likely tokens."""
    logprobs = logits.log_softmax(-1)
    values, tokens = logprobs.topk(min(count, len(logprobs)))
    return TokenScore(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
