"""Whether this worker has too much to do, and the one refusal that says so. Knows no clock and no loop.

It is fed with the loop's lag, several times a second, and asked before a connection or a message is taken.
What has been taken is delivered all the same.
"""

from .errors import Refusal, later

# Seconds for which the lag has to stay too high before the worker counts as overloaded, and low before it
# does no more.
PATIENCE = 2.0
# The part of `max_lag` that is low: below it there is room again.
_LOW = 0.5


class Overload:
    """The state of one worker. Owner: its application, which feeds it.

    While it is overloaded a message is refused only as long as the last lag was not low. So a load that stays
    too high is taken in turns, as much of it as can be carried, and the lag is bounded all the while.
    """

    __slots__ = ("_lag", "_turning", "active", "max_lag")

    def __init__(self, max_lag: float) -> None:
        # Seconds; 0: the worker never counts as overloaded. A reload changes it.
        self.max_lag = max_lag
        self.active = False
        # The last one, in seconds.
        self._lag = 0.0
        # Since when the lag has spoken against the present state; None: it does not.
        self._turning: float | None = None

    @property
    def _is_low(self) -> bool:
        return not self.max_lag or self._lag <= self.max_lag * _LOW

    def observe(self, lag: float, now: float) -> bool:
        """Take in how late the loop is, as of `now` on any steady clock (seconds). True: a change."""
        self._lag = lag
        if not (self._is_low if self.active else 0 < self.max_lag < lag):
            self._turning = None
            return False
        if self._turning is None:
            # Too late it has been for a while before that could be seen.
            self._turning = now if self.active else now - lag + self.max_lag
        if now - self._turning < PATIENCE:
            return False
        self.active = not self.active
        self._turning = None
        return True

    def check(self) -> None:
        """Refusal where nothing more may be taken now."""
        if self.active and not self._is_low:
            raise Refusal(
                "unavailable",
                "This worker has too much to do: try again later, with the same messageId.",
                retry_after=later(),
            )
