"""The story that scripts/demo tells: one trace, three times, through one node, three strangers, and three that are one.

Owns the order of events and what is printed of them. Every number comes from requests that were really answered: hits
from `cached_tokens` in the engines' usage, times from the client's clock. It ends all processes that it started,
however it ends itself.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio
from demo_client import Run, replay
from demo_figures import Act, hit_ratio, milliseconds, table
from demo_fleet import ENGINES, MODEL, Fleet, Node, NotReady
from demo_picture import draw
from demo_processes import CannotStart, Processes

from smg.lab.conversations import Conversation, ConversationTraffic, conversations

FOLDER = Path("build/demo")
NODES = 3
SEED = 5
KILL_AT, START_AT = 0.4, 0.6
"""Shares of the requests answered when a node is killed, and when it is started again."""
HITS_OF_ONE_NODE_MIN = 0.9
"""A cluster below this did not end well; it should be above 0.97, but one run on a busy machine proves little."""
SETTLE_S = 3.0

WHOLE = ConversationTraffic()
WHOLE_ENGINE_TOKENS = 44_000
"""Caches of six engines hold every open conversation once, with some room; not twice."""
SHORT = ConversationTraffic(
    conversations=28, arrivals_s=0.8, turns=(3, 4), think_s=(0.2, 0.5), opening_tokens=(600, 1_500)
)
SHORT_ENGINE_TOKENS = 16_000

Begin = Callable[[], Awaitable[list[Node]]]


@dataclass(frozen=True)
class Play:
    """One run of the trace: what the nodes are, and what they can know."""

    title: str
    why: str
    is_disturbed: bool = False
    """A node is killed on the way and started again."""


class Story:
    """All that is told, in the order in which it happens."""

    def __init__(self, processes: Processes, fleet: Fleet, trace: Sequence[Conversation]) -> None:
        self._processes = processes
        self._fleet = fleet
        self._trace = trace
        self._began_s = trio.current_time()

    def say(self, text: str) -> None:
        """One line, with the time."""
        print(f"{trio.current_time() - self._began_s:5.1f} s  {text}", flush=True)

    async def tell(self) -> list[Act]:
        """Everything."""
        fleet = self._fleet
        await fleet.start_engines()
        requests = sum(len(conversation.turns) for conversation in self._trace)
        self.say(
            f"{ENGINES} simulated engines are up; {len(self._trace)} conversations, {requests} requests to come"
        )
        async with trio.open_nursery() as nursery:
            # The nodes of one act end while those of the next one start.
            return [
                await self._act(
                    nursery, Play("one node", "it sees every request"), lambda: fleet.start_alone(1)
                ),
                await self._act(
                    nursery,
                    Play(f"{NODES} nodes, no mesh", "each knows only what it has sent itself"),
                    lambda: fleet.start_alone(NODES),
                ),
                await self._act(
                    nursery,
                    Play(
                        f"{NODES} nodes, one mesh",
                        "only node 1 was told where the engines are",
                        is_disturbed=True,
                    ),
                    lambda: fleet.start_mesh(NODES),
                ),
            ]

    async def _act(self, ending: trio.Nursery, play: Play, begin: Begin) -> Act:
        nodes = await begin()
        await self._fleet.empty_caches()
        balancer, port = await self._fleet.start_balancer(nodes)
        self.say(f"{play.title}, ready behind the load balancer; {play.why}")
        run = Run(sum(len(conversation.turns) for conversation in self._trace))
        events: list[tuple[float, str]] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._report, run)
            if play.is_disturbed:
                nursery.start_soon(self._disturb, run, nodes[0], events)
            await replay(self._trace, run, port, MODEL)
        in_flight = await self._in_flight(nodes)
        act = Act(play.title, run.answers, events, in_flight)
        self.say(
            f"  all answered: hits {act.hit_ratio:.1%}, first token after {milliseconds(act.ttft_mean_s)} on the mean"
        )
        ending.start_soon(self._processes.end, [balancer, *(node.process for node in nodes)])
        return act

    async def _report(self, run: Run) -> None:
        for share in (0.25, 0.5, 0.75):
            await run.wait_answers(share)
            self.say(
                f"  {len(run.answers)} of {run.total} answered, hits so far {hit_ratio(run.answers):.0%}"
            )

    async def _disturb(self, run: Run, node: Node, events: list[tuple[float, str]]) -> None:
        """Kills a node, the one that knew the engines, and starts it again."""
        await run.wait_answers(KILL_AT)
        await node.process.kill()
        events.append((trio.current_time() - run.began_s, f"kill -9 {node.name}"))
        self.say(f"  kill -9 {node.name}, process {node.process.id}; its clients connect again and ask again")
        await run.wait_answers(START_AT)
        started_s, latest = trio.current_time(), run.latest
        await self._fleet.start_again(node)
        matched, blocks = await self._fleet.wait_warm(node, latest)
        now_s = trio.current_time()
        events.append((now_s - run.began_s, f"{node.name} is back"))
        self.say(
            f"  {node.name} is back after {now_s - started_s:.1f} s, and warm: it knows {matched} of {blocks} blocks of a prompt "
            "that it never served"
        )

    async def _in_flight(self, nodes: Sequence[Node]) -> int:
        """Requests that nodes still count when all are answered: none, after a moment."""
        with trio.move_on_after(SETTLE_S):
            while True:
                count = sum([await self._fleet.in_flight(node) for node in nodes])
                if not count:
                    break
                await trio.sleep(0.05)
        return count


def judge(acts: Sequence[Act]) -> list[str]:
    """What did not go as it should; empty when all is well."""
    faults = []
    for act in acts:
        failures = [answer.problem for answer in act.answers if answer.problem]
        faults += [f"{act.title}: failed: {problem}" for problem in failures[:3]]
        if act.in_flight:
            faults.append(f"{act.title}: {act.in_flight} requests are still counted as in flight")
    one, strangers, mesh = acts
    if mesh.hit_ratio < HITS_OF_ONE_NODE_MIN * one.hit_ratio:
        faults.append("the mesh did not hit as often as one node")
    if strangers.hit_ratio > mesh.hit_ratio:
        faults.append("nodes without a mesh hit more often than with one")
    return faults


async def main(arguments: argparse.Namespace) -> int:
    """Tells the story; 0 when it ended well, 1 when it did not, 128 + the signal when one ended it."""
    code = 1
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            nonlocal code
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
                async for number in signals:
                    code = 128 + number
                    print("\nending all processes ...", file=sys.stderr)
                    nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        traffic, tokens = (SHORT, SHORT_ENGINE_TOKENS) if arguments.short else (WHOLE, WHOLE_ENGINE_TOKENS)
        async with Processes(FOLDER) as processes:
            trace = conversations(traffic, arguments.seed)
            try:
                acts = await Story(processes, Fleet(processes, FOLDER, tokens), trace).tell()
            except* (CannotStart, NotReady, OSError) as group:
                print("\n".join(str(error) for error in leaves(group)), file=sys.stderr)
            else:
                code = conclude(acts, arguments.picture)
        nursery.cancel_scope.cancel()
    return code


def conclude(acts: Sequence[Act], picture: Path) -> int:
    """Prints the table, draws the picture, and says whether it went well."""
    print("", *table(acts), "", sep="\n")
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_text(draw(acts))
    print(f"picture: {picture}")
    faults = judge(acts)
    if faults:
        print(*faults, f"This did not end as it should; logs are in {FOLDER}/", sep="\n")
        return 1
    print("No request failed.")
    return 0


def leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The exceptions of a group, however deep."""
    return [
        leaf
        for error in group.exceptions
        for leaf in (leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of scripts/demo."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description=__doc__.partition("\n")[0] if __doc__ else ""
    )
    parser.add_argument(
        "--short", action="store_true", help="a quarter of a minute instead of one: fewer and shorter talks"
    )
    parser.add_argument("--seed", type=int, default=SEED, help="of the conversations (default: %(default)s)")
    parser.add_argument(
        "--picture",
        type=Path,
        default=Path("build/demo.svg"),
        help="where the picture goes (default: %(default)s)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(trio.run(main, parse()))
