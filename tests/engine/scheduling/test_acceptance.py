import pytest

from multilora.engine.scheduling.acceptance import (
    FIRST_RATE,
    FIRST_TRIAL,
    LAST_TRIAL,
    MOST_KEPT,
    Acceptance,
    AcceptanceTable,
)


def test_the_rate_is_that_of_tokens_whose_predecessors_were_right():
    acceptance = Acceptance()
    assert acceptance.rate == FIRST_RATE
    for _ in range(200):
        acceptance.observe(drafted=5, accepted=3)  # three right, one wrong, one that says nothing
    assert acceptance.rate == pytest.approx(3 / 4, abs=1e-3)
    for _ in range(200):
        acceptance.observe(drafted=5, accepted=5)
    assert acceptance.rate == pytest.approx(1, abs=1e-3)


def test_trials_become_rare_and_often_again_once_it_is_worth_it():
    acceptance = Acceptance()
    waits = []
    for _ in range(8):
        refused = 0
        while not acceptance.due:
            acceptance.refuse()
            refused += 1
        waits.append(refused)
        acceptance.begin_trial()
    assert waits == [16, 32, 64, 128, 256, 512, 512, 512]
    assert (waits[0], waits[-1]) == (FIRST_TRIAL, LAST_TRIAL)
    acceptance.resume()
    for _ in range(FIRST_TRIAL):
        assert not acceptance.due
        acceptance.refuse()
    assert acceptance.due


def test_compositions_are_kept_apart_and_bounded():
    table = AcceptanceTable()
    table.of(((1, 1.0),)).observe(4, 0)
    assert table.of(((1, 1.0),)).rate < FIRST_RATE == table.of(()).rate == table.of(((1, 0.5),)).rate
    kept = table.of(((1, 1.0),))
    for version in range(2, 2 + MOST_KEPT):
        table.of(((version, 1.0),))
        assert table.of(((1, 1.0),)) is kept  # it is in use
    assert len(table) == MOST_KEPT
