"""Distillation against what its endpoint allows: python benchmarks/distill.py [--rows N] [--rounds N] [--concurrency N] [--latency S] [--memory N,N,...]

A stand-in endpoint (tests/stand_ins/teacher.py) answers every request after the same latency. In each round, one after the other:
  ideal    concurrency / latency: what no client can pass
  bare     a client that sends the same requests and throws the answers away: what this machine's endpoint allows
  ours     python -m src.distill recipe.order=[answer], with its journal on disk, from the first request to the last as the endpoint saw them
Shares are medians over the rounds. Then the whole command's peak memory at each number of rows, as the kernel gives it, the endpoint without latency.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import aiohttp

ROOT = Path(__file__).resolve().parent.parent


class Endpoint:
    """The stand-in in a process of its own."""

    def __init__(self, **behaviour):
        self._process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "stand_ins" / "teacher.py", json.dumps(behaviour)], stdout=subprocess.PIPE, text=True
        )
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.wait()

    def times(self) -> list[float]:
        return json.load(urllib.request.urlopen(f"{self.url}/stand_in", timeout=60))["times"]


def write_prompts(path: Path, count: int) -> None:
    with open(path, "w") as file:
        for n in range(count):
            file.write(json.dumps({"prompt": f"Question {n}: what is {n} times 7, and why? " + "Take your time. " * 20}) + "\n")


async def bare(url: str, count: int, concurrency: int) -> float:
    """Rows a second."""
    numbers = iter(range(count))

    async def work(session: aiohttp.ClientSession) -> None:
        for n in numbers:
            body = {"model": "m", "messages": [{"role": "user", "content": f"Question {n}. " + "Take your time. " * 20}], "max_tokens": 64}
            async with session.post(f"{url}/v1/chat/completions", json=body) as response:
                await response.json()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        start = time.perf_counter()
        await asyncio.gather(*(work(session) for _ in range(concurrency)))
        return count / (time.perf_counter() - start)


def ours(url: str, path: Path, outputs: Path, concurrency: int) -> tuple[float, float]:
    """(seconds of the whole command, its peak memory in MB)."""
    command = [sys.executable, "-m", "src.distill", f"outputs={outputs}", f"prompts.path={path}", f"teacher.url={url}", "teacher.model=m"]
    command += ["recipe.order=[answer]", f"teacher.limits.concurrency={concurrency}"]
    measure = "import resource,subprocess,sys; c=subprocess.run(sys.argv[1:]).returncode; print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(c)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", measure, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - start, int(done.stdout.split()[-1]) / 1000


def throughput(folder: Path, rows: int, concurrency: int, latency: float, rounds: int) -> None:
    write_prompts(folder / "prompts.jsonl", rows)
    print(f"{rows:,} rows, {concurrency} at once, {latency * 1000:g} ms each")
    print(f"  ideal  {concurrency / latency:7.0f} rows/s")
    shares = []
    for number in range(rounds):
        with Endpoint(latency=latency, steady=True) as endpoint:
            allowed = asyncio.run(bare(endpoint.url, rows, concurrency))
        with Endpoint(latency=latency, steady=True) as endpoint:
            seconds, _ = ours(endpoint.url, folder / "prompts.jsonl", folder / f"throughput{number}", concurrency)
            times = endpoint.times()
        pace = len(times) / (max(times) - min(times) + latency)
        shares.append((pace / allowed, pace * latency / concurrency))
        print(f"  bare   {allowed:7.0f} rows/s\n  ours   {pace:7.0f} rows/s; {seconds:.1f} s with start and end", flush=True)
    of_bare, of_ideal = (statistics.median(column) for column in zip(*shares))
    print(f"  ours is {of_bare:.0%} of bare, {of_ideal:.0%} of ideal")


def memory(folder: Path, counts: list[int], concurrency: int) -> None:
    for count in counts:
        path = folder / f"prompts{count}.jsonl"
        write_prompts(path, count)
        with Endpoint() as endpoint:
            seconds, peak = ours(endpoint.url, path, folder / f"memory{count}", concurrency)
        print(f"  {count:7,} rows: {peak:5.0f} MB at most, {seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=6400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.1)
    parser.add_argument("--memory", default="1000,10000,100000")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.rounds:
            throughput(Path(folder), args.rows, args.concurrency, args.latency, args.rounds)
        memory(Path(folder), [int(n) for n in args.memory.split(",") if n], args.concurrency)


if __name__ == "__main__":
    main()
