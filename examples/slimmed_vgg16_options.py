"""The options of the main job."""

import argparse
import math
from pathlib import Path

import torch

from isw_plugin.errors import SettingError
from isw_plugin.settings import check_lambda

__all__ = ["check", "options"]


def options(description: str | None, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, cifar10, or a folder of images")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels")
    parser.add_argument("--width", type=float, help="share of VGG16's channels (0.5 on digits, else 1.0)")
    parser.add_argument("--epochs-dense", type=int, help="12")
    parser.add_argument("--epochs-finetune", type=int, help="10 on digits, else 8")
    parser.add_argument("--epochs-budget", type=int, help="with gates on (5 on digits, else 4)")
    parser.add_argument("--macs-left", type=float, default=0.7, help="budget, a share of the slimmed network's MACs")
    parser.add_argument("--batch", type=int, help="training batch (32 on digits, else 128); lambda is tied to it")
    parser.add_argument("--lambda", dest="lambdas", type=float, nargs="+", default=[1e-6], help="feature decay, Eq. 5")
    parser.add_argument("--bn-l1", type=float, default=5e-4, help="L1 penalty on batch norm gamma while dense")
    parser.add_argument("--prune-ratio", type=float, default=0.67, help="share of channels to prune statically")
    parser.add_argument("--max-drop", type=float, default=0.01, help="accuracy that calibration may lose")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="run folder (runs/slimmed_vgg16-DATA)")
    args = parser.parse_args(argv)
    small = args.data == "digits"
    defaults = {
        "width": 0.5 if small else 1.0,
        "epochs_dense": 12,
        "epochs_finetune": 10 if small else 8,
        "epochs_budget": 5 if small else 4,
        "batch": 32 if small else 128,
        "out": Path("runs") / f"slimmed_vgg16-{Path(args.data).name}",
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def check(args: argparse.Namespace) -> None:
    """Raise SettingError for options that a later stage would refuse."""
    for lambda_ in args.lambdas:
        check_lambda(lambda_)
    ranges = {
        "--batch": (args.batch, 1, math.inf),
        "--size": (args.size, 32, math.inf),  # five times halved, a pixel is left
        "--epochs-dense": (args.epochs_dense, 1, math.inf),
        "--epochs-finetune": (args.epochs_finetune, 1, math.inf),
        "--epochs-budget": (args.epochs_budget, 1, math.inf),
        "--macs-left": (args.macs_left, 0.05, 1),
        "--width": (args.width, 0.05, 4),
        "--bn-l1": (args.bn_l1, 0, 1),
        "--prune-ratio": (args.prune_ratio, 0.01, 0.99),
        "--max-drop": (args.max_drop, 0, 1),
        "--seed": (args.seed, 0, 2**32 - 1),  # what scikit-learn takes
    }
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise SettingError(f"{name} {value:.10g}: from {low:g} to {high:.10g}")
