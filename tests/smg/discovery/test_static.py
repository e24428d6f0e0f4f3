"""The workers of the command line."""

from __future__ import annotations

import trio

from smg.discovery import SOURCES, sources_of
from smg.discovery.static import Static, specs_of
from smg.fleet.worker import WorkerSpec
from smg.settings import Discovery, Prefill, PrefillDecode, Settings, Workers


def test_urls_of_the_command_line_become_workers_with_key_and_engine() -> None:
    settings = Settings(
        workers=Workers(
            worker_urls=("http://a:1", "http://b:2", "http://a:1"), worker_api_key="k", backend="vllm"
        )
    )
    assert specs_of(settings) == (
        WorkerSpec("http://a:1", runtime_type="vllm", api_key="k"),
        WorkerSpec("http://b:2", runtime_type="vllm", api_key="k"),
    )


def test_prefill_and_decode_workers_keep_their_kind_and_bootstrap_port() -> None:
    settings = Settings(
        pd=PrefillDecode(
            pd_disaggregation=True,
            prefill=(Prefill("http://p:1", 9000), Prefill("http://p:2")),
            decode=("http://d:1",),
        )
    )
    assert [(spec.worker_type, spec.bootstrap_port) for spec in specs_of(settings)] == [
        ("prefill", 9000),
        ("prefill", None),
        ("decode", None),
    ]


async def test_the_command_line_reports_once(nursery: trio.Nursery) -> None:
    reports: list[tuple[WorkerSpec, ...]] = []
    await nursery.start(Static(Settings(workers=Workers(worker_urls=("http://a",)))).run, reports.append)
    assert reports == [(WorkerSpec("http://a"),)]


def test_sources_are_those_that_the_settings_ask_for_flags_first() -> None:
    assert [source.name for source in sources_of(Settings())] == ["flags"]
    with_file = Settings(discovery=Discovery(discovery_file="/x"))
    assert [source.name for source in sources_of(with_file)] == ["flags", "file"]
    assert set(SOURCES) == {"flags", "file"}
