"""`make bench-checkpoint`: how long saving stops a training loop, against peers and against the physical limit.

    make bench-checkpoint                                                    installs the peers, then runs everything
    python tests/training/bench_checkpoint.py --peers .bench/checkpoint [--sizes 0.15,0.5] [--rounds 3] [--skip A,B]
    python tests/training/bench_checkpoint.py --alone --sizes 1.5            Reprise and torch.save + fsync only

One process, interleaved rounds: in each round every way of saving is used once, in rotating order, with a real training
step around it, and the yardsticks (one memcpy and one write + fsync of the same bytes) are taken beside it. Ratios are
formed inside a round, and their medians are what the bars of the project apply to; absolute times belong to the
machine. `--peers` is a folder (pip install --target) that holds lightning, accelerate and torch_checkpointing; those
that are missing are reported as not installed, and a bar without its peers is not judged. Exit 1 when a bar is missed.
Not covered: GPUs (gpu_checkpoint.py).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(1, str(Path(__file__).parent))

import torch
from checkpoint_peers import WAYS, Memcpy, Reprise, RepriseBlocking, TorchSaveFsync, Way, closing_all, make_ways
from transformer_block import Block

SHAPES = {"0.15": (4, 512, 1000, 256), "0.5": (6, 768, 1000, 256), "1.5": (12, 768, 50257, 128)}  # layers, width, words


class Language(torch.nn.Module):
    """A decoder with tied input and output words."""

    def __init__(self, layers: int, width: int, words: int) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(words, width)
        self.blocks = torch.nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = torch.nn.LayerNorm(width), torch.nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Loop:
    """A training loop that can be stopped between backward and the optimizer's step."""

    def __init__(self, layers: int, width: int, words: int, tokens: int) -> None:
        torch.manual_seed(0)
        self.model = Language(layers, width, words)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.tokens = torch.randint(0, words, (tokens // 128, 128))
        for _ in range(2):
            self.step()

    def forward_backward(self) -> None:
        logits = self.model(self.tokens)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.tokens.flatten()).backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, before_update: Callable[[], None] | None = None) -> None:
        self.forward_backward()
        if before_update is not None:
            before_update()
        self.update()

    def nbytes(self) -> int:
        state = [v for s in self.optimizer.state.values() for v in s.values()]
        return sum(t.nbytes for t in [*self.model.parameters(), *state])


def seconds(call: Callable[..., Any], *arguments: Any) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


def measure_stall(way: Way, loop: Loop, step: int) -> tuple[float, float]:
    """(stall, seconds from the call until complete) of one save inside one training step."""
    started = time.perf_counter()
    way.save(step)
    stall = time.perf_counter() - started
    loop.forward_backward()
    stall += seconds(way.before_update)
    loop.update()
    way.drain()
    return stall, time.perf_counter() - started


def measured(
    way: Way, loop: Loop, step: int, ways: list[Way], tell: Callable[[str], None]
) -> tuple[float, float] | None:
    """`measure_stall`; a peer that fails is told and taken out of `ways`."""
    try:
        return measure_stall(way, loop, step)
    except Exception as error:
        if isinstance(way, Reprise):
            raise
        tell(f"{way.name}: failed at save {step} with torch {torch.__version__} ({type(error).__name__}: {error})")
        ways.remove(way)
        return None


def one_size(size: str, rounds: int, folder: Path, skip: set[str], tell: Callable[[str], None]) -> dict[str, Any]:
    """All rounds of one state size: lists by name. Ways named in `skip` are left out."""
    loop = Loop(*SHAPES[size])
    nbytes = loop.nbytes()
    memcpy = Memcpy(nbytes)
    memcpy()
    stalls, durables, ratios = defaultdict(list), defaultdict(list), defaultdict(list)
    ways = make_ways(loop.model, loop.optimizer, folder, skip, tell)
    with closing_all([*ways]):
        for way in [*ways]:  # the first save of each allocates and spawns
            measured(way, loop, 0, ways, tell)
            way.clean(0)
        reprise = next(way for way in ways if type(way) is Reprise)
        for number in range(1, rounds + 1):
            order = ways[number % len(ways) :] + ways[: number % len(ways)]
            gc.collect()
            copies = []
            for way in order:
                copies.append(seconds(memcpy))
                if (figures := measured(way, loop, number, ways, tell)) is None:
                    continue
                stall, durable = figures
                copies.append(seconds(memcpy))
                stalls[way.name].append(stall)
                durables[way.name].append(durable)
                if isinstance(way, Reprise):
                    ratios[f"{way.name} / memcpy"].append(stall / statistics.mean(copies[-2:]))
                way.clean(number)
            stalls["memcpy"].append(statistics.median(copies))
            ours = stalls[Reprise.name][-1]
            peers = {way.name: stalls[way.name][-1] for way in ways if not isinstance(way, Reprise)}
            if TorchSaveFsync.name in peers:
                ratios["torch.save + fsync / overlapped"].append(peers[TorchSaveFsync.name] / ours)
            if len(peers) > 1:
                ratios["overlapped / lowest peer"].append(ours / min(peers.values()))
            ratios["step while saving / idle step"].append(slowdown(reprise, loop, 1000 + number))
            ratios["durable / plain write + fsync"].append(durability(reprise, memcpy, folder / "plain", 2000 + number))
    return {"bytes": nbytes, "rounds": rounds, "stalls": stalls, "durables": durables, "ratios": ratios}


def slowdown(way: Reprise, loop: Loop, step: int) -> float:
    """Mean step during a background save over the mean of idle steps just before and just after."""
    os.sync()  # what the ways before left in the page cache is written now, not beside these steps
    idle = [seconds(loop.step) for _ in range(2)]
    way.save(step)
    during = [seconds(loop.step, way.before_update)]
    while way.checkpointer.busy:
        during.append(seconds(loop.step))
    way.drain()
    idle += [seconds(loop.step) for _ in range(2)]
    return statistics.mean(during) / statistics.mean(idle)


def durability(way: Reprise, memcpy: Memcpy, path: Path, step: int) -> float:
    """A save until it is committed over a plain write + fsync of the same bytes, nothing else running."""

    def save() -> None:
        way.save(step)
        way.drain()

    os.sync()
    ours = seconds(save)
    plain = seconds(memcpy.write_and_fsync, path)
    path.unlink()
    return ours / plain


BARS: dict[str, tuple[str, float]] = {
    f"{Reprise.name} / memcpy": ("<=", 0.3),
    f"{RepriseBlocking.name} / memcpy": ("<=", 1.2),
    "torch.save + fsync / overlapped": (">=", 10.0),
    "overlapped / lowest peer": ("<=", 1.0),
    "step while saving / idle step": ("<=", 1.3),
    "durable / plain write + fsync": ("<=", 1.5),
}


def report(size: str, found: dict[str, Any]) -> bool:
    """Print one size's tables; whether all bars hold."""
    copy = statistics.median(found["stalls"]["memcpy"])
    print(f"\n{size} GB: {found['bytes']} bytes of state, {found['rounds']} rounds, medians")
    print(f"  {'way':42} {'stall s':>9} {'/ memcpy':>9} {'complete s':>11}")
    print(f"  {'memcpy of the same bytes':42} {copy:9.4f} {1:9.2f}")
    for name, stalls in found["stalls"].items():
        if name != "memcpy":
            stall, durable = statistics.median(stalls), statistics.median(found["durables"][name])
            print(f"  {name:42} {stall:9.4f} {stall / copy:9.2f} {durable:11.3f}")
    good = True
    for name, (sign, bar) in BARS.items():
        if name not in found["ratios"]:
            print(f"  ----  {name:38} not judged: its peers were left out")
            continue
        value = statistics.median(found["ratios"][name])
        passed = value <= bar if sign == "<=" else value >= bar
        good &= passed
        spread = f"{min(found['ratios'][name]):.3f} .. {max(found['ratios'][name]):.3f}"
        print(f"  {'PASS' if passed else 'FAIL'}  {name:38} {value:9.3f}  bar {sign} {bar:<5} rounds {spread}")
    sys.stdout.flush()
    return good


@contextlib.contextmanager
def scratch(parent: str | None) -> Iterator[Path]:
    """A folder of our own, gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """The program of the module's docstring."""
    parser = argparse.ArgumentParser(description="Checkpoint stall against peers and against a memcpy.")
    parser.add_argument("--sizes", default=",".join(SHAPES), help=f"GB of state, of {', '.join(SHAPES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", help="folder with the optional peers (pip install --target)")
    parser.add_argument("--folder", help="where to write checkpoints; default: the temporary folder")
    parser.add_argument("--skip", default="", help="leave out peers whose name contains one of these words (a,b)")
    parser.add_argument("--alone", action="store_true", help="no peers but torch.save + fsync")
    parser.add_argument("--json", help="write every round's figures to this file")
    options = parser.parse_args()
    if options.peers:
        sys.path.append(options.peers)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), options.peers]))
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    told: list[str] = []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    words = [word for word in options.skip.split(",") if word]
    skip = {way.name for way in WAYS if any(word in way.name for word in words) and not issubclass(way, Reprise)}
    if options.alone:
        skip = {way.name for way in WAYS if not issubclass(way, (Reprise, TorchSaveFsync))}
    results, good = {}, True
    for size in options.sizes.split(","):
        with scratch(options.folder) as folder:
            results[size] = one_size(size, options.rounds, folder, skip, told.append)
        good &= report(size, results[size])
        gc.collect()
    for line in sorted(set(told)):
        print(line)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))
    print("every bar holds" if good else "a bar is missed")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
