"""What the server says on one connection, and how it ends it: answers, refusals, closing, and goodbye.

The half of a connection (connection.py) that speaks. It counts the publishes that are still to be answered: a
connection that is to leave has that done first, and its session saved.
"""

import random
from contextlib import suppress

from ..errors import CloseCode, Refusal, Unavailable
from ..eventloop import at_turn_end
from ..frames import frame
from ..protocol import Command, dump, encode_error
from ..session import Session
from ..sink import Sink
from .context import Context, now_ms
from .wire import Wire


class Outgoing:
    """The base of Connection, which makes sink and wire, and says in `seen` when it last heard anything."""

    __slots__ = ("_context", "_leave", "_unanswered", "_wire", "closed", "seen", "session", "sink")

    sink: Sink
    _wire: Wire
    seen: float

    def __init__(self, context: Context) -> None:
        self._context = context
        self.session = Session()
        self.closed = False
        # Publishes that the broker has not answered yet.
        self._unanswered = 0
        # It is to leave, and to come back after so many ms.
        self._leave: int | None = None

    # Answers

    def answer(self, payload: bytes) -> None:
        if not self._wire.is_closing():
            self.sink.answer(frame(payload))

    def answer_soon(self, data: bytes) -> None:
        """Send frames at the end of this turn of the loop, together with others."""
        if self.sink.gather(data):
            at_turn_end(self.sink.release)

    def refuse_command(self, refusal: Refusal, command: Command | None = None) -> None:
        context = self._context
        if refusal.message_id is None and command is not None:
            refusal.message_id = getattr(command, "message_id", None)
        if refusal.channel is None and command is not None:
            refusal.channel = getattr(command, "channel", None)
        if refusal.setting:
            context.refusals.add(
                self.seen,
                "limit" if refusal.setting.startswith("[limits]") else "rule",
                refusal.message,
                client_id=self.session.client_id,
                setting=refusal.setting,
                channel=refusal.channel,
            )
        self.answer(
            encode_error(
                refusal.code,
                refusal.message,
                now_ms(),
                message_id=refusal.message_id,
                channel=refusal.channel,
                retry_after=refusal.retry_after,
            )
        )
        if refusal.code == "rate_limited" and self.session.is_flooding(context.config.limits, self.seen):
            self.end_for_now(CloseCode.RATE_IGNORED, 5000, flush=False)

    # The end

    def end(self, code: CloseCode, reason: str = "", *, flush: bool = True) -> None:
        """Close the connection from our side, after what is queued or in its place."""
        if self.closed:
            return
        if not flush:
            self.sink.forget()
        self._wire.close(int(code), reason)

    def end_for_now(self, code: CloseCode, retry_after: int, *, flush: bool = True) -> None:
        """The same with a reason that says when to come back, within so many ms: another time for each."""
        self._end_until(code, round(retry_after * random.uniform(0.1, 1.0)), flush=flush)

    def _end_until(self, code: CloseCode, retry_after: int, *, flush: bool = True) -> None:
        self.end(code, dump({"retryAfter": retry_after}).decode(), flush=flush)

    def leave(self, retry_after: int) -> None:
        """Send the client away, to come back after so many ms.

        What it has published is answered before, and what it has acked is saved; nothing new is begun.
        """
        if self._leave is None:
            self._leave = retry_after
            self._leave_if_done()

    @property
    def is_leaving(self) -> bool:
        return self._leave is not None

    def _leave_if_done(self) -> None:
        if self._leave is None or self._unanswered or self.closed:
            return
        if self.session.changed:
            self._context.spawn(self._save_and_leave())
        else:
            self.leave_now()

    async def _save_and_leave(self) -> None:
        # What cannot be saved now comes again.
        with suppress(Unavailable):
            await self._context.keeper.save(self.session, self.end)
        self.leave_now()

    def leave_now(self) -> None:
        """Wait for nothing more."""
        self._end_until(CloseCode.RESTART, self._leave or 1)
