r"""Serve a fast or a gated model by LitServe: batches, what each request's gates decided, a health check.

    pip install 'isw_plugin[serve]'
    python examples/deploy/serve.py gated/fast --port 8000
    curl -d "{\"image\": \"$(base64 -w0 photo.jpg)\"}" -H 'Content-Type: application/json' localhost:8000/predict

A folder of `isw gate` (OUT/fast, or OUT/gated), images in base64; `GET /health` says whether workers are up. A worker
has its own process and as many threads as its share of the cores.
"""

import argparse
import base64
import io
import logging
import socket
from pathlib import Path
from typing import Any

import litserve
import torch
from fastapi import HTTPException
from PIL import Image

from isw_cli.data import preparation
from isw_plugin import load_accelerated, load_pretrained

_LOG = logging.getLogger("isw_plugin.serve")


class Gated(litserve.LitAPI):
    """One worker's model."""

    def __init__(self, folder: Path, size: int, threads: int, batch: int) -> None:
        super().__init__(max_batch_size=batch, batch_timeout=0.005)
        self.folder, self.size, self.threads = folder, size, threads

    def setup(self, device: str) -> None:
        torch.set_num_threads(self.threads)
        self.pruner = None
        if (self.folder / "accelerated.json").is_file():
            self.model: Any = load_accelerated(self.folder)
        else:
            self.pruner = load_pretrained(self.folder)
            self.model = self.pruner.model
        self.prepare = preparation(self.model, self.size)

    def decode_request(self, request: Any) -> torch.Tensor:
        try:
            with Image.open(io.BytesIO(base64.b64decode(request["image"], validate=True))) as picture:
                return self.prepare(picture)
        except (KeyError, TypeError, ValueError, OSError, SyntaxError) as error:  # what base64 and Pillow raise
            raise HTTPException(400, f"no image in base64 under the name image: {error}") from error

    def predict(self, x: torch.Tensor) -> Any:
        """LitServe stacks what came in time; without batches there is one image."""
        images = x if x.dim() == 4 else x[None]
        with torch.inference_mode():
            scores, keeps = self.decided(images)
        channels = sum(keep.shape[1] for keep in keeps)
        answers = [{"scores": each} for each in scores.tolist()]
        if channels:
            for place, answer in enumerate(answers):
                answer["kept"] = sum(int(keep[place].sum()) for keep in keeps) / channels
        return answers if x.dim() == 4 else answers[0]

    def decided(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Class scores, and what each site kept of each image."""
        if self.pruner is not None:
            return self.model(images).softmax(1), list(self.pruner.keep.values())
        with self.model.recording() as record:
            scores = self.model(images).softmax(1)
        return scores, list(record.keep.values())

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        _LOG.info("class %d, channels kept: %s", output["scores"].index(max(output["scores"])), output.get("kept"))
        return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", options.port)) == 0:
            raise SystemExit(f"port {options.port} is in use: pass --port with another")
    if not options.folder.is_dir():
        raise SystemExit(f"{options.folder} is no folder: name what `isw gate` wrote, OUT/fast or OUT/gated")
    logging.basicConfig(level=logging.INFO)
    threads = max(1, torch.get_num_threads() // options.workers)
    api = Gated(options.folder, options.size, threads, options.batch)
    litserve.LitServer(api, accelerator="cpu", workers_per_device=options.workers).run(port=options.port)


if __name__ == "__main__":
    main()
