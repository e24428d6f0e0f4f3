"""Health: when a worker is ready, when not, and when it is asked next (HLT-1 to HLT-3, WRK-1 to WRK-3)."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg.fleet.health import TRANSITIONS, Health, HealthRules, health_rules, is_alive
from smg.fleet.worker import HealthOverrides, Status
from smg.settings import Health as HealthSettings
from smg.settings import Workers

RULES = HealthRules(interval_s=60.0, failure_threshold=3, success_threshold=2, startup_timeout_s=1800.0)


class Probed:
    """A health machine whose wishes come true, as the registry makes them."""

    def __init__(self, rules: HealthRules = RULES, seed: int = 1) -> None:
        self.health = Health(rules)
        self.health.entered(Status.PENDING, 0.0)
        self.rng = Random(seed)
        self.now = 0.0

    def at(self, now: float) -> Probed:
        self.now = now
        return self

    def obey(self, status: Status | None) -> Status:
        if status is not None:
            assert status in TRANSITIONS[self.health.status]
            self.health.entered(status, self.now)
        return self.health.status

    def ok(self) -> Status:
        return self.obey(self.health.observed_ok(self.now))

    def miss(self, refused: bool = False) -> Status:
        return self.obey(self.health.observed_miss(self.now, refused))

    def wait(self) -> float:
        """Seconds until the next probe; time goes there."""
        at = self.health.next_probe_at(self.rng)
        assert at == self.health.next_probe_at(self.rng), "asking twice changed the answer"
        waited = at - self.now
        self.now = at
        return waited


def ready(rules: HealthRules = RULES) -> Probed:
    probed = Probed(rules)
    assert probed.ok() is Status.READY
    return probed


@pytest.mark.parametrize("status", [200, 204, 299, 401, 403, 404, 405, 501])
def test_a_server_that_answers_at_all_lives(status: int):
    assert is_alive(status)


@pytest.mark.parametrize("status", [100, 301, 400, 408, 429, 500, 502, 503, 504])
def test_other_answers_do_not_make_a_worker_ready(status: int):
    assert not is_alive(status)


def test_a_pending_worker_is_probed_at_once_then_after_a_tenth_and_doubling_up_to_the_check_interval():
    probed = Probed()
    assert probed.wait() == 0.0
    waits = []
    for _ in range(8):
        assert probed.miss(refused=True) is Status.PENDING
        waits.append(round(probed.wait(), 3))
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]


def test_the_first_hit_makes_a_pending_worker_ready():
    assert Probed().at(5.0).ok() is Status.READY


def test_the_start_delay_moves_the_first_probe():
    probed = Probed(HealthRules(startup_delay_s=7.0))
    assert probed.wait() == 7.0


def test_a_pending_worker_fails_after_the_startup_timeout_is_still_probed_and_comes_back():
    probed = Probed()
    assert probed.at(1799.0).miss() is Status.PENDING
    assert probed.at(1800.0).miss() is Status.FAILED
    assert probed.wait() < math.inf
    assert probed.ok() is Status.FAILED
    assert probed.wait() <= 1.0
    assert probed.ok() is Status.READY


def test_a_ready_worker_leaves_after_threshold_misses_in_a_row_and_not_before():
    probed = ready()
    assert [probed.miss(), probed.miss()] == [Status.READY, Status.READY]
    assert probed.ok() is Status.READY
    assert [probed.miss(), probed.miss(), probed.miss()] == [Status.READY, Status.READY, Status.NOT_READY]


def test_it_comes_back_after_success_threshold_hits_in_a_row():
    probed = ready()
    for _ in range(3):
        probed.miss()
    assert probed.ok() is Status.NOT_READY
    assert probed.miss() is Status.NOT_READY
    assert probed.ok() is Status.NOT_READY
    assert probed.ok() is Status.READY


def test_not_ready_fails_after_three_times_the_threshold_more_misses():
    probed = ready()
    for _ in range(3):
        probed.wait()
        probed.miss()
    statuses = []
    for _ in range(9):
        probed.wait()
        statuses.append(probed.miss())
    assert statuses == [Status.NOT_READY] * 8 + [Status.FAILED]
    assert probed.health.next_probe_at(Random(1)) < math.inf
    assert [probed.ok(), probed.ok()] == [Status.FAILED, Status.READY]


def test_regular_probes_come_within_a_tenth_of_the_interval_and_not_all_at_once():
    waits = set()
    for seed in range(50):
        probed = Probed(seed=seed)
        probed.ok()
        waits.add(probed.wait())
    assert all(54.0 <= wait <= 66.0 for wait in waits)
    assert len(waits) > 40


def test_a_refused_request_starts_a_probe_at_once_and_refusals_take_the_worker_out_within_a_second():
    probed = ready()
    probed.wait()
    probed.ok()
    start = probed.now + 20.0
    probed.at(start).health.note_refused(start)
    assert probed.wait() == 0.0
    assert probed.miss(refused=True) is Status.READY
    probed.wait()
    assert probed.miss(refused=True) is Status.NOT_READY
    assert probed.now - start < 1.0


def test_a_worker_that_refuses_is_probed_every_second_until_it_is_back():
    probed = ready()
    probed.miss(refused=True)
    probed.wait()
    probed.miss(refused=True)
    for _ in range(5):
        assert probed.wait() == pytest.approx(1.0)
        assert probed.miss(refused=True) is Status.NOT_READY
    probed.wait()
    assert probed.ok() is Status.NOT_READY
    assert probed.wait() == pytest.approx(1.0)
    assert probed.ok() is Status.READY
    assert probed.wait() >= 54.0


def test_hasty_probes_of_a_refusing_worker_do_not_fail_it_sooner_than_regular_ones():
    probed = ready()
    probed.miss(refused=True)
    probed.wait()
    probed.miss(refused=True)
    left_at = probed.now
    while probed.miss(refused=True) is not Status.FAILED:
        probed.wait()
        assert probed.now < 10_000.0
    assert probed.now - left_at >= 9 * 54.0 - 1.0


def test_one_refusal_between_hits_does_no_harm():
    probed = ready()
    for _ in range(10):
        assert probed.miss(refused=True) is Status.READY
        assert probed.ok() is Status.READY


def test_a_slow_miss_between_refusals_starts_their_count_again():
    probed = ready(HealthRules(failure_threshold=10))
    probed.miss(refused=True)
    probed.miss(refused=False)
    assert probed.miss(refused=True) is Status.READY


def test_a_worker_without_checks_and_a_draining_one_are_never_probed():
    disabled = Health(HealthRules(is_disabled=True))
    disabled.entered(Status.PENDING, 0.0)
    assert disabled.is_disabled and disabled.next_probe_at(Random(1)) == math.inf
    probed = ready()
    probed.health.entered(Status.DRAINING, 1.0)
    assert probed.health.next_probe_at(Random(1)) == math.inf
    assert probed.health.observed_miss(2.0, True) is None
    assert probed.health.observed_ok(2.0) is None


def test_a_workers_own_numbers_win():
    rules = health_rules(
        HealthSettings(),
        Workers(),
        HealthOverrides(check_interval_secs=5.0, health_check_endpoint="/ping", disable_health_check=True),
    )
    assert (rules.interval_s, rules.endpoint, rules.is_disabled) == (5.0, "/ping", True)
    assert rules.timeout_s == HealthSettings().health_check_timeout_secs
    assert rules.startup_check_interval_s == Workers().worker_startup_check_interval


@given(st.lists(st.sampled_from(["ok", "miss", "refused", "note"]), max_size=120), st.integers(0, 99))
def test_under_any_sequence_only_legal_changes_happen_and_two_hits_always_bring_it_back(
    seen: list[str], seed: int
):
    probed = Probed(seed=seed)
    for what in seen:
        wait = probed.wait()
        assert 0.0 <= wait <= 66.0
        if what == "ok":
            probed.ok()
        elif what == "note":
            probed.health.note_refused(probed.now)
        else:
            probed.miss(refused=what == "refused")
    probed.ok()
    assert probed.ok() is Status.READY
