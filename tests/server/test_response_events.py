"""The log of a background response's events: readers from anywhere, before and after its end.

Covers `responses/event_log.py` too.
"""

import asyncio

from fakes.server_app import run

from multilora.server.responses.event_log import EventLog, event_frame


def test_readers_follow_from_where_they_like() -> None:
    async def scenario() -> None:
        log = EventLog()
        log.append(event_frame({"type": "one"}))

        async def read(start: int) -> list[bytes]:
            return [frame async for frame in log.frames(start)]

        readers = [asyncio.create_task(read(start)) for start in (0, 1, 2)]
        for name in ("two", "three"):
            await asyncio.sleep(0)
            log.append(event_frame({"type": name}))
        log.append(event_frame({"type": "four"}))
        await asyncio.sleep(0)
        assert not any(reader.done() for reader in readers)
        log.end()
        frames = await readers[0]
        assert [frame.split(b"\n")[0] for frame in frames] == [
            b"event: " + name for name in (b"one", b"two", b"three", b"four")
        ]
        assert [await reader for reader in readers[1:]] == [frames[1:], frames[2:]]
        assert await read(3) == frames[3:]
        assert (len(log), log.nbytes) == (4, sum(map(len, frames)))

    run(scenario())


def test_a_frame_shows_its_event_as_it_was() -> None:
    async def scenario() -> None:
        log, event = EventLog(), {"type": "x", "items": [1]}
        log.append(event_frame(event))
        event["items"] += [2]
        log.end()
        assert [frame async for frame in log.frames(0)] == [b'event: x\ndata: {"type":"x","items":[1]}\n\n']

    run(scenario())
