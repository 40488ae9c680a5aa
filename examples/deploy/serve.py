"""Serve a fast model over HTTP by LitServe: requests in batches, decisions logged, a process for every group of cores.

    isw gate resnet18 --weights best.safetensors --data photos --out gated
    python examples/deploy/serve.py gated/fast --processes 2 --log decisions.jsonl

    POST /predict {"image": base64 of a JPEG or PNG} -> {"label": 3, "name": "cat", "score": 8.13, "kept": 0.61}
    GET /health -> 200, once every process is ready

"score" is the largest output, "kept" the share of channels that this image kept. What cannot be read as an image is
answered by {"error": ...}, and costs the others in its batch nothing.
"""

from isw_cli.script import in_one_line

import argparse
import base64
import io
import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import litserve
import torch
from PIL import Image
from torch import Tensor, nn

from isw_cli.data import preparation
from isw_cli.errors import InputError
from isw_plugin import load_accelerated


class Classifier(litserve.LitAPI):
    """What one process does."""

    def __init__(self, folder: Path, groups: Sequence[Sequence[int]], log: Path | None, most: int, wait: float) -> None:
        super().__init__(max_batch_size=most, batch_timeout=wait)
        self.folder, self.groups, self.log = folder, groups, log

    def setup(self, device: str) -> None:
        cores = self.groups[int(os.environ["LITSERVE_WORKER_ID"])]
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))
        self.load()

    def load(self) -> None:
        self.model, self.prepare = load_accelerated(self.folder), preparation(nn.Identity(), None, self.folder)

    def decode_request(self, request: litserve.Request) -> Tensor | str:
        try:
            with Image.open(io.BytesIO(base64.b64decode(request["image"], validate=True))) as picture:
                return self.prepare(picture)
        except Exception as error:  # whatever a client sends; raised, it would fail the whole batch
            return f"no image that can be read ({type(error).__name__}): send its base64 as 'image'"

    def batch(self, inputs: list[Tensor | str]) -> list[Tensor | str]:
        return inputs

    def predict(self, inputs: list[Tensor | str]) -> list[dict[str, Any]]:
        images = [given for given in inputs if isinstance(given, Tensor)]
        answers = iter(self.classified(torch.stack(images)) if images else [])
        return [next(answers) if isinstance(given, Tensor) else {"error": given} for given in inputs]

    def classified(self, images: Tensor) -> list[dict[str, Any]]:
        start = time.perf_counter()
        with self.model.recording() as record:
            scores, labels = self.model(images).max(1)
        seconds, channels = time.perf_counter() - start, sum(keep.shape[1] for keep in record.keep.values())
        kept = {site: keep.sum(1).tolist() for site, keep in record.keep.items()}  # none where it runs dense
        names, answers = self.prepare.classes, []
        for at, (score, label) in enumerate(zip(scores.tolist(), labels.tolist(), strict=True)):
            share = sum(of_site[at] for of_site in kept.values()) / channels if channels else 1.0
            answers.append({"label": label, "score": score, "kept": round(share, 4)})
            answers[-1] |= {"name": names[label]} if names else {}
            decided = {"kept_by_site": {site: of_site[at] for site, of_site in kept.items()}}
            self.note(answers[-1] | {"time": time.time(), "batch": len(images), "seconds": seconds} | decided)
        return answers

    def note(self, facts: dict[str, Any]) -> None:
        if self.log is not None:
            with self.log.open("a") as lines:  # whole lines, of any number of processes
                lines.write(json.dumps(facts) + "\n")

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output


class Server(litserve.LitServer):
    """Whose processes leave ctrl-C to the one that started them."""

    def launch_inference_worker(self, *args: Any) -> Any:
        with children():
            return super().launch_inference_worker(*args)

    def _start_server(self, *args: Any, **kwargs: Any) -> Any:
        with children():
            return super()._start_server(*args, **kwargs)


@contextmanager
def children() -> Iterator[None]:
    """Processes that are started inside hear no ctrl-C, and end without a word."""
    quiet = {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in quiet.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def groups_of(processes: int) -> list[list[int]]:
    """The cores of every process."""
    cores = sorted(os.sched_getaffinity(0))
    if processes > len(cores):
        raise InputError(f"--processes {processes}: this process may use {len(cores)} cores, and each needs one")
    bounds = [len(cores) * at // processes for at in range(processes + 1)]
    return [cores[first:last] for first, last in pairwise(bounds)]


def require_free(port: int) -> None:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("127.0.0.1", port))
        except OSError as error:
            raise InputError(f"--port {port}: {error.strerror}; take another") from error


def require_runs(folder: Path, most: int) -> None:
    """A batch of the largest size, before any process starts."""
    prepare = preparation(nn.Identity(), None, folder)
    load_accelerated(folder)(torch.zeros(most, prepare.channels, prepare.size, prepare.size))


def main(args: argparse.Namespace) -> None:
    require_free(args.port)
    groups = groups_of(args.processes)
    require_runs(args.folder, args.batch)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as ctrl-C: containers are stopped so
    api = Classifier(args.folder.absolute(), groups, args.log and args.log.absolute(), args.batch, args.wait)
    server = Server(api, accelerator="cpu", workers_per_device=len(groups), timeout=args.timeout)
    server.run(
        "127.0.0.1" if args.local else "0.0.0.0",
        args.port,
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
    )


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="OUT/fast of `isw gate`, or what fast.save_pretrained wrote")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--local", action="store_true", help="answer this machine only")
    parser.add_argument("--processes", type=int, default=1, help="the cores are divided among them")
    parser.add_argument("--batch", type=int, default=16, help="requests at most that run together")
    parser.add_argument("--wait", type=float, default=0.002, help="seconds that the first waits for others")
    parser.add_argument("--timeout", type=float, default=30, help="seconds after which a request is given up")
    parser.add_argument("--log", type=Path, help="file of decisions, a line of JSON for every image")
    args = parser.parse_args(argv)
    for name, low, high in (("port", 1024, 65535), ("processes", 1, 1024), ("batch", 1, 4096)):
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name} {getattr(args, name)}: from {low} to {high}")
    return args


if __name__ == "__main__":
    try:
        with in_one_line():
            main(arguments())
    finally:
        for child in multiprocessing.active_children():
            child.terminate()
