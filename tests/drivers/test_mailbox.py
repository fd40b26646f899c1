"""A queue that is emptied at once, and what may be taken on the spot."""

import asyncio

from multilora.drivers.mailbox import LoopTurns, Mailbox


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 5))


async def waiting(box: Mailbox) -> asyncio.Task:
    task = asyncio.create_task(box.take())
    await asyncio.sleep(0)
    return task


def test_all_that_has_come_is_taken_in_order():
    async def scenario():
        box = Mailbox[int]()
        task = await waiting(box)
        box.put(1)
        box.put(2)
        assert await task == [1, 2]
        box.put(3)
        assert await box.take() == [3]

    run(scenario)


def test_others_run_before_what_is_there_is_taken():
    async def scenario():
        box = Mailbox[int]()
        box.put(1)
        asyncio.get_running_loop().call_soon(box.put, 2)
        assert await box.take() == [1, 2]

    run(scenario)


def test_a_cancelled_reader_loses_nothing():
    async def scenario():
        box = Mailbox[int]()
        task = await waiting(box)
        box.put(1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        box.put(2)
        assert await box.take() == [1, 2]

    run(scenario)


def test_items_are_taken_on_the_spot_only_while_the_reader_waits():
    async def scenario():
        box, taken = Mailbox[int](), []

        def direct(item: int) -> bool:
            if item % 2:
                taken.append(item)
            return item % 2 == 1

        box.direct = direct
        box.put(1)
        assert await box.take() == [1], "nobody waited"
        task = await waiting(box)
        box.put(3)
        box.put(5)
        assert taken == [3, 5] and not task.done()
        box.put(4)
        box.put(7)  # behind one that waits
        assert await task == [4, 7]
        assert taken == [3, 5]

    run(scenario)


def test_turns_of_the_loop_are_counted():
    async def scenario():
        turns = LoopTurns()
        first = turns.now
        assert turns.now == first
        await asyncio.sleep(0)
        assert turns.now == first + 1

    run(scenario)
