"""Load servers of fast models, one after the other, and say what clients see: latency, images a second, wrong answers.

    python examples/deploy/load.py gated/fast dense --data photos --seconds 60 --clients 16

Each FOLDER is served by serve.py on this machine. Every client sends one image after the other over a connection of its
own. Answers are compared with those of the model in this process; memory is that of the server and all that it started,
after a quarter of the time and at the end.
"""

from isw_cli.script import in_one_line

import argparse
import base64
import http.client
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve import Classifier
from torch import nn

from isw_cli.data import images_in, preparation
from isw_cli.errors import InputError

_AGREE = 1e-3  # of a score: batches of other sizes round otherwise


@dataclass
class Seen:
    """By all clients.

    Attributes:
        seconds: Of every answer.
        wrong: Answers that are not the model's.
        memory: MB, early and late.
    """

    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    def row(self, name: str, elapsed: float) -> str:
        cuts = statistics.quantiles(self.seconds, n=100)
        times = " | ".join(f"{1e3 * cuts[at]:.1f}" for at in (49, 98))
        memory = " | ".join(f"{each:.0f}" for each in self.memory)
        counts = f"{len(self.seconds):,} | {len(self.wrong)} | {len(self.seconds) / elapsed:.1f}"
        return f"| {name} | {counts} | {times} | {memory} |"


_HEAD = "| model | answers | wrong | images/s | p50 ms | p99 ms | MB early | MB late |\n" + "|---" * 8 + "|"


@contextmanager
def served(folder: Path, options: Sequence[str]) -> Any:
    """A server; its port and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(Path(__file__).with_name("serve.py")), str(folder), "--local", f"--port={port}"]
    process = subprocess.Popen([*command, *options])
    try:
        _wait_for(port, process)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(60)


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + 120
    while time.monotonic() < limit and process.poll() is None:
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.2)
    raise InputError(f"the server did not start: {' '.join(map(str, process.args))}")  # type: ignore[arg-type]


def ask(connection: http.client.HTTPConnection, body: str) -> Any:
    connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
    return json.loads(connection.getresponse().read())


def expected(folder: Path, data: Path, count: int) -> list[tuple[str, dict[str, Any]]]:
    """Requests, and the answer to each of the model in this process."""
    images, _ = images_in(data, preparation(nn.Identity(), None, folder), 1, count)
    asked = [json.dumps({"image": base64.b64encode(file.read_bytes()).decode()}) for file in images.files]
    here = Classifier(folder, [], None, 2, 0)  # of this process, one image after the other
    here.load()
    return [(body, here.predict([here.decode_request(json.loads(body))])[0]) for body in asked]


def loaded(port: int, pid: int, asked: Sequence[tuple[str, dict[str, Any]]], clients: int, seconds: float) -> Seen:
    """What clients see in this time."""
    seen, end, lock = Seen(), time.monotonic() + seconds, threading.Lock()

    def client(first: int) -> None:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            at = first
            while time.monotonic() < end:
                body, wanted = asked[at % len(asked)]
                start = time.perf_counter()
                answer = ask(connection, body)
                taken, at = time.perf_counter() - start, at + clients
                with lock:
                    seen.seconds.append(taken)
                    if answer.get("label") != wanted["label"] or abs(answer["score"] - wanted["score"]) > _AGREE:
                        seen.wrong.append(f"{answer}, not {wanted}")

    threads = [threading.Thread(target=client, args=(first,)) for first in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 4)
    seen.memory.append(memory_of(pid))
    time.sleep(max(0.0, end - time.monotonic() - 0.5))
    seen.memory.append(memory_of(pid))
    for thread in threads:
        thread.join()
    return seen


def memory_of(pid: int) -> float:
    """MB of a process and all that it started."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = {int(child) for file in tasks for child in file.read_text().split()}
    return int(status["VmRSS"].split()[0]) / 1024 + sum(map(memory_of, children))


def main(args: argparse.Namespace) -> int:
    wrong = 0
    print(_HEAD)
    for folder in args.folders:
        asked = expected(folder, args.data, args.images)
        with served(folder, args.options) as (port, pid):
            loaded(port, pid, asked, args.clients, args.seconds / 10)  # warms up
            start = time.monotonic()
            seen = loaded(port, pid, asked, args.clients, args.seconds)
            print(seen.row(str(folder), time.monotonic() - start), flush=True)
        wrong += len(seen.wrong)
        for text in seen.wrong[:5]:
            print("wrong:", text, file=sys.stderr)
    return min(wrong, 1)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="fast models, such as a gated one and its dense form")
    parser.add_argument("--data", type=Path, required=True, help="a folder of images for every class")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--images", type=int, default=64, help="different ones, at most")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="of serve.py; the last")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with in_one_line():
        sys.exit(main(arguments()))
