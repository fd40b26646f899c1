"""An engine in the caller's process, stepped by hand.

Owns no state: `step` waits where there is nothing to compute, `call` steps until its reply has come. What `client.py`
is to an engine in another process. Used by `LLM`.
"""

import select

from multilora.engine.engine import Engine
from multilora.engine.messages import FromEngine, LoadAdapter, Reply, UnloadAdapter
from multilora.errors import from_wire


class LocalEngine:
    def __init__(self, engine: Engine):
        self.engine = engine

    def step(self) -> list[FromEngine]:
        messages = self.engine.step()
        if not messages and not self.engine.running:
            self._wait(ms=1)  # something is on its way from the loader, or to the device
        return messages

    def call(self, message: LoadAdapter | UnloadAdapter) -> Reply:
        """Nothing else runs meanwhile. Raises the engine's error."""
        self.engine.handle(message)
        while True:
            for reply in self.step():
                if isinstance(reply, Reply) and reply.call == message.call:
                    if not reply.ok:
                        raise from_wire(reply.kind, reply.message)
                    return reply

    def _wait(self, ms: int) -> None:
        """Less if the loader says something."""
        poller = select.poll()
        loader = self.engine.adapters.fileno()
        if loader is not None:
            poller.register(loader, select.POLLIN)
        poller.poll(ms)
