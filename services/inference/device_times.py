"""How long work takes on this device, learnt from the work that it did.

For each kind of work seconds = a + b * tokens, fitted by least squares in which older observations
count less and less.
"""

from dataclasses import dataclass

_MEMORY = 0.95
"""What an observation still counts once the next one has come."""


@dataclass
class _Fit:
    """Weighted sums over (tokens, seconds)."""

    weight: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    tokens_squared: float = 0.0
    tokens_seconds: float = 0.0

    def observe(self, tokens: float, seconds: float) -> None:
        self.weight = _MEMORY * self.weight + 1
        self.tokens = _MEMORY * self.tokens + tokens
        self.seconds = _MEMORY * self.seconds + seconds
        self.tokens_squared = _MEMORY * self.tokens_squared + tokens * tokens
        self.tokens_seconds = _MEMORY * self.tokens_seconds + tokens * seconds

    def predict(self, tokens: float) -> float:
        mean_tokens, mean = self.tokens / self.weight, self.seconds / self.weight
        spread = self.tokens_squared / self.weight - mean_tokens**2
        covariance = self.tokens_seconds / self.weight - mean_tokens * mean
        # Neither a negative slope nor a negative start makes sense; noise gives both.
        slope = covariance / spread if spread > 1e-9 * mean_tokens**2 else 0.0
        slope = min(max(slope, 0.0), mean / mean_tokens)
        return mean + slope * (tokens - mean_tokens)


class DeviceTimes:
    """Seconds by kind of work and tokens."""

    def __init__(self) -> None:
        self._fits: dict[str, _Fit] = {}

    def observe(self, kind: str, tokens: int, seconds: float) -> None:
        self._fits.setdefault(kind, _Fit()).observe(max(tokens, 1), seconds)

    def predict(self, kind: str, tokens: int) -> float:
        """Seconds; 0 for a kind that has not run yet."""
        fit = self._fits.get(kind)
        return fit.predict(max(tokens, 1)) if fit else 0.0
