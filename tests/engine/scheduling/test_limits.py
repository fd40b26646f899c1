"""Deadlines, and the bounds of the queue, by a clock of our own."""

import pytest
from fakes.timed_engine import Timed

from multilora.engine.messages import Finished, Output


class Ended(Timed):
    """Remembers how each request ended."""

    def __init__(self, *args, **options):
        self.endings: dict[str, Finished] = {}
        super().__init__(*args, **options)

    def take(self, output: Output) -> None:
        super().take(output)
        if output.finished is not None:
            assert output.rid not in self.endings, "a request ends once"
            self.endings[output.rid] = output.finished

    def free(self) -> bool:
        """Whether nothing is held any more, but what the prefix cache keeps."""
        scheduler = self.engine.scheduler
        return not scheduler.running and not scheduler.waiting and not scheduler.unfinished


@pytest.mark.parametrize("policy", ["fcfs", "fair"])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_request_ends_at_its_deadline(policy, ahead):
    world = Ended(lambda n: 0.1, policy=policy, ahead=ahead, max_running=1)
    world.submit("runs", tokens=100, deadline=1.05)
    world.submit("waits", tokens=1, deadline=0.55)
    world.submit("other", tokens=3)
    world.run()
    assert world.endings["runs"].type == "abort"
    assert 9 <= len(world.tokens["runs"]) <= 12, "what came until then was sent"
    assert (world.endings["waits"].type, world.endings["waits"].kind) == ("error", "DeadlineExceeded")
    assert world.endings["other"].type == "length"
    assert world.free()


def test_a_deadline_of_a_request_that_has_ended_means_nothing():
    world = Ended(lambda n: 0.1)
    world.submit("early", tokens=2, deadline=0.5)
    world.submit("late", tokens=20)
    world.run()
    assert {rid: end.type for rid, end in world.endings.items()} == {"early": "length", "late": "length"}


def test_what_cannot_be_met_is_refused_at_once():
    world = Ended(lambda n: 0.001 + 0.001 * n, chunk_tokens=100, max_running=1)
    for i, prompt in enumerate((50, 90, 20, 70)):
        world.submit(f"learn {i}", prompt=prompt)
        world.run()
    now = world.now
    world.submit("too late", prompt=1000, deadline=now + 0.5)  # reading it takes a second
    world.submit("in time", prompt=1000, deadline=now + 1.5)
    world.step()
    assert world.endings["too late"].kind == "QueueFull"
    assert "first token would take about" in world.endings["too late"].message
    assert world.now - now < 0.2
    world.run()
    assert world.endings["in time"].type == "length"


@pytest.mark.parametrize("policy", ["fcfs", "fair", "lpm", "priority"])
def test_the_queue_of_others_counts_where_it_goes_first(policy):
    world = Ended(lambda n: 0.001 + 0.001 * n, chunk_tokens=100, max_running=1, policy=policy)
    for i, prompt in enumerate((50, 90, 20, 70)):
        world.submit(f"learn {i}", prompt=prompt)
        world.run()
    for i in range(10):
        world.submit(f"before {i}", prompt=100, tenant="a")
    world.submit("own", prompt=10, tenant="b", deadline=world.now + 0.5)
    world.step()
    assert ("own" in world.endings and world.endings["own"].kind == "QueueFull") == (policy == "fcfs")


def test_the_queue_is_bounded_in_tokens():
    world = Ended(lambda n: 0.1, max_running=1, max_queued_tokens=100)
    world.submit("huge", prompt=500)  # nobody waits before it
    world.step()
    world.submit("a", prompt=60)
    world.submit("b", prompt=50)
    world.submit("c", prompt=40)
    world.run()
    assert world.endings["b"].kind == "QueueFull"
    assert "--max-queued-tokens" in world.endings["b"].message
    assert [world.endings[rid].type for rid in ("huge", "a", "c")] == ["length"] * 3
