from multilora.engine.scheduling.slots import Slots


def test_a_slot_is_given_out_again_only_when_its_last_step_has_been_read() -> None:
    slots = Slots()
    assert [slots.acquire() for _ in range(3)] == [0, 1, 2]
    slots.release(1, fence=5)
    assert slots.recycle(completed=4) == []
    assert slots.acquire() == 3
    assert slots.recycle(completed=5) == [1]
    assert slots.recycle(completed=5) == []
    assert slots.acquire() == 1


def test_low_slots_first() -> None:
    slots = Slots()
    for _ in range(4):
        slots.acquire()
    for slot in (3, 0, 2):
        slots.release(slot, fence=0)
    assert slots.recycle(completed=0) == [3, 0, 2]
    assert [slots.acquire() for _ in range(4)] == [0, 2, 3, 4]
