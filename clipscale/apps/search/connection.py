"""A connection that does not wait for ever: uvicorn alone ends only what is idle between two requests."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S = 10.0  # for the headers of a request, and a first request has to begin in it
TAKEN_S = 30.0  # for which an answer may lie untaken


class Connection(H11Protocol):
    """Ended when the headers of a request do not come, or an answer is not taken; a body's time is its reader's."""

    _unasked: asyncio.TimerHandle | None = None
    _untaken: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Someone is there, and has asked nothing yet."""
        super().connection_made(transport)
        self._expect_request()

    def data_received(self, data: bytes) -> None:
        """Something came: of a request's headers, or of its body."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._expect_request()
        elif self._unasked is not None:
            self._unasked.cancel()
            self._unasked = None

    def pause_writing(self) -> None:
        """More of an answer waits to be taken than is kept."""
        super().pause_writing()
        self._untaken = self.loop.call_later(TAKEN_S, self.transport.abort)

    def resume_writing(self) -> None:
        """Enough of it was taken."""
        super().resume_writing()
        if self._untaken is not None:
            self._untaken.cancel()

    def on_response_complete(self) -> None:
        """What is closed first sends what is left, which nobody may take."""
        super().on_response_complete()
        if self.transport.is_closing():
            self.loop.call_later(TAKEN_S, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        """Nothing came after an answer."""
        super().timeout_keep_alive_handler()
        self.loop.call_later(TAKEN_S, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        super().connection_lost(exc)
        for timer in (self._unasked, self._untaken):
            if timer is not None:
                timer.cancel()

    def _expect_request(self) -> None:
        if self._unasked is None:
            self._unasked = self.loop.call_later(HEADERS_S, self.transport.abort)
