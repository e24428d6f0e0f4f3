"""The simulation: real policies in virtual time, deterministic, and the good ones win."""

from __future__ import annotations

import argparse
import json
import xml.dom.minidom

import pytest

from smg.lab import report, simulate_command
from smg.lab.engine_model import EngineSettings
from smg.lab.rivals import RIVALS
from smg.lab.simulate import SimulateSettings, UnknownPolicy, calibrate, run
from smg.lab.trace import Trace, TraceRequest
from smg.lab.traffic import AgentTraffic, agents
from smg.lab.world import ReplayCall, WorldSettings
from smg.policies import POLICIES

TRAFFIC = agents(AgentTraffic(agents=60, duration_s=120.0, templates=6), seed=3)
WORLD = WorldSettings(workers=4)


def simulate(*policies: str, load: float | None = 0.6, **world):
    settings = SimulateSettings(policies=policies, load=load, world=WorldSettings(**{"workers": 4, **world}))
    return {row.policy: row.measured for row in run(TRAFFIC, settings).rows}


def test_every_policy_of_the_shelf_and_every_rival_serves_the_whole_trace():
    told = simulate(*POLICIES, *RIVALS, "cache_aware:8", "cache_aware:threshold", load=None)
    served = {measured.requests for measured in told.values()}
    assert served == {len(TRAFFIC.requests) - len(TRAFFIC.requests) // 10}


def test_cache_aware_is_as_good_as_greedy_with_full_information():
    told = simulate("cache_aware", "oracle", "round_robin", "least_load")
    assert told["cache_aware"].ttft_mean_s <= 1.15 * told["oracle"].ttft_mean_s
    assert told["cache_aware"].hit_ratio >= 0.97 * told["oracle"].hit_ratio
    assert told["cache_aware"].ttft_mean_s < 0.5 * told["round_robin"].ttft_mean_s
    assert told["cache_aware"].ttft_mean_s < 0.5 * told["least_load"].ttft_mean_s


def test_equal_seeds_give_equal_results():
    first, second = simulate("cache_aware", load=None), simulate("cache_aware", load=None)
    assert first["cache_aware"].ttft_s == second["cache_aware"].ttft_s


def test_many_gateways_that_share_lose_little_and_those_that_do_not_lose_much():
    alone = simulate("cache_aware")["cache_aware"]
    shared = simulate("cache_aware", gateways=4, delay_s=0.1)["cache_aware"]
    blind = simulate("cache_aware", gateways=4, delay_s=None)["cache_aware"]
    assert shared.hit_ratio > 0.9 * alone.hit_ratio
    assert blind.hit_ratio < shared.hit_ratio


def test_owners_decide_nearly_as_well_as_one_gateway():
    alone = simulate("cache_aware")["cache_aware"]
    owned = simulate("cache_aware", gateways=4, delay_s=1.0, is_owner_asked=True)["cache_aware"]
    told = simulate("cache_aware", gateways=4, delay_s=1.0)["cache_aware"]
    assert owned.hit_ratio > 0.97 * alone.hit_ratio
    assert owned.ttft_mean_s < told.ttft_mean_s


def test_lost_news_comes_later_and_nothing_stops():
    lossy = simulate("cache_aware", gateways=4, delay_s=0.1, loss_ratio=0.5)["cache_aware"]
    whole = simulate("cache_aware", gateways=4, delay_s=0.1)["cache_aware"]
    assert lossy.requests == whole.requests
    assert lossy.ttft_mean_s != whole.ttft_mean_s
    assert lossy.hit_ratio > 0.9 * whole.hit_ratio


def test_calibration_finds_the_pace_of_a_load():
    factor = calibrate(TRAFFIC, WORLD, 0.5)
    settings = SimulateSettings(policies=("calibrator",), world=WORLD)
    measured = run(TRAFFIC.scaled(factor), settings).rows[0].measured
    assert measured.utilisation == pytest.approx(0.5, abs=0.02)


def test_one_request_takes_what_its_engine_takes():
    trace = Trace("one", (TraceRequest(0.0, 1024, 3, (5, 6)), TraceRequest(9.0, 1024, 3, (5, 6))), 512)
    told = run(
        trace, SimulateSettings(policies=("cache_aware",), world=WorldSettings(workers=2, warm_up_ratio=0.0))
    )
    engine = EngineSettings()
    assert told.rows[0].measured.ttft_s == pytest.approx(
        (engine.prefill_s(1, 1023), engine.prefill_s(1024, 0))
    )


def test_a_replayed_call_has_a_block_of_text_per_block_of_the_trace():
    one = ReplayCall(TraceRequest(0.0, 1000, 1, (7, 8)), 1, 512)
    two = ReplayCall(TraceRequest(0.0, 1500, 1, (7, 9, 10)), 2, 512)
    assert len(one.text()) == 1024
    assert one.text()[:512] == two.text()[:512]
    assert one.text()[512:] != two.text()[512:1024]
    rest = ReplayCall(TraceRequest(0.0, 200, 1, (7,)), 3, 128)  # a record keeps full blocks only
    assert len(rest.text()) == 800


def test_an_unknown_policy_is_refused_before_anything_runs():
    with pytest.raises(UnknownPolicy, match="least_load"):
        run(TRAFFIC, SimulateSettings(policies=("cache_aware", "leastload")))
    with pytest.raises(UnknownPolicy, match="price"):
        run(TRAFFIC, SimulateSettings(policies=("cache_aware:cheap",)))


def test_the_table_has_a_line_per_policy_and_the_plot_is_xml():
    settings = SimulateSettings(policies=("cache_aware", "oracle"), seeds=(1, 2), world=WORLD)
    result = run(TRAFFIC, settings)
    lines = report.table(result).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("cache_aware")
    assert "4 workers" in lines[0]
    document = xml.dom.minidom.parseString(report.plot(result))
    assert len(document.getElementsByTagName("polyline")) == 2
    rows = json.loads(report.as_json(result))["rows"]
    assert [(row["policy"], row["seed"]) for row in rows] == [
        ("cache_aware", 1),
        ("cache_aware", 2),
        ("oracle", 1),
        ("oracle", 2),
    ]


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    simulate_command.add_arguments(parser)
    return simulate_command.main(parser.parse_args(words))


def test_the_command_prints_a_table_and_draws_a_plot(capsys, tmp_path):
    plot = tmp_path / "out.svg"
    words = ["--trace", "agents", "--limit", "300", "--workers", "3", "--policy", "cache_aware,random"]
    assert command(*words, "--plot", str(plot)) == 0
    assert "cache_aware" in capsys.readouterr().out
    assert plot.read_text().startswith("<svg")


def test_the_command_refuses_nonsense_in_one_sentence(capsys):
    assert command("--trace", "agents", "--policy", "nope") == 2
    assert command("--trace", "/does/not/exist") == 2
    assert (
        command("--trace", "agents", "--plot", "/does/not/exist.svg") == 2
    )  # told before the work, not after
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert all(line.startswith("smg simulate: ") for line in said)
    assert ["--trace: '/does/not/exist'" in said[1], "--plot: '/does/not/exist.svg'" in said[2]] == [
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--delay", "soon"), ("--delay", "-1"), ("--seed", "a,b"), ("--poll", "0"), ("--poll", "nan")],
)
def test_a_wrong_number_is_refused_by_name(capsys, flag, value):
    with pytest.raises(SystemExit):
        command("--trace", "agents", flag, value)
    said = capsys.readouterr().err
    assert flag in said.splitlines()[-1] and value in said.splitlines()[-1]
