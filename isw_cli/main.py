"""The commands. What computes is imported within them."""

import functools
import logging
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from isw_cli.entry import begun
from isw_cli.errors import InputError
from isw_cli.request import Request

__all__ = ["app"]

app = typer.Typer(
    help="Each image computes only the channels it needs: see sites, gate, measure and export a model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(help="A timm name, a saved folder, or file.py:function.", metavar="MODEL")]
Architecture = Annotated[
    str | None,
    typer.Option("--model", help="What makes the model of a saved folder, where timm does not: file.py:function."),
]
Data = Annotated[Path, typer.Option(help="A folder of images for every class, or val and test with such folders.")]
Size = Annotated[int | None, typer.Option(min=8, max=4096, help="Side of the images; None: as the model declares.")]
Batch = Annotated[int, typer.Option(min=1, help="Images in a batch.")]
Limit = Annotated[int, typer.Option(min=2, help="Images at most, to choose on and to report on each.")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Download a timm model's weights.")]
Weights = Annotated[Path | None, typer.Option(help="Weights for MODEL: safetensors, or a state_dict.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, nothing else.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Drop = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Accuracy that gates may cost, a fraction: 0.01 is a point.")
]
Alpha = Annotated[
    float | None, typer.Option(min=0.0, help="Drop where the variation of norms exceeds this; the model's own, or 0.")
]
Beta = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.99, help="Drop channels below this share of the mean norm; the model's own, or 1."),
]


def _command(name: str, module: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a command of a module whose errors are one line, with an exit code: 1, or 130 after ctrl-C."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def guarded(*args: Any, **kwargs: Any) -> None:
            from isw_cli.output import errors

            def said(message: str, code: int) -> typer.Exit:
                errors.print(f"isw {name}: {' '.join(message.split())}", markup=False)
                return typer.Exit(code)

            logging.basicConfig(format="%(message)s")
            try:
                with warnings.catch_warnings():
                    warnings.showwarning = lambda message, *_: errors.print(f"warning: {message}", markup=False)
                    import_module(module)
                    begun()
                    run(*args, **kwargs)
            except KeyboardInterrupt:
                raise said("stopped; nothing was written", 130) from None
            except (InputError, OSError) as error:
                raise said(str(error), 1) from None
            except (MemoryError, ValueError, RuntimeError) as error:
                from isw_plugin.errors import ISWError

                if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
                    raise said("not enough memory: take a smaller --batch, --size or model", 1) from None
                if not isinstance(error, ISWError):
                    raise
                raise said(str(error), 1) from None

        return app.command(name)(guarded)

    return register


@_command("sites", "isw_cli.look")
def sites(model: Model, architecture: Architecture = None, size: Size = None, json: Json = False) -> None:
    """Show the maps that can be gated, and why the others cannot."""
    from isw_cli.look import show_sites

    show_sites(Request(model, architecture=architecture, size=size, batch=2), json)


@_command("gate", "isw_cli.gating")
def gate(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the page, the gated model and the fast one.")] = Path("gated"),
    max_drop: Drop = 0.01,
    architecture: Architecture = None,
    size: Size = None,
    batch: Batch = 16,
    limit: Limit = 1000,
    pretrained: Pretrained = False,
    weights: Weights = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Choose thresholds on images, measure, write a page, and make the model fast where that is possible."""
    from isw_cli.gating import gate_model

    request = Request(model, data, architecture, size, batch, limit, pretrained, weights)
    gate_model(request, out, max_drop, force, json)


@_command("evaluate", "isw_cli.look")
def evaluate(
    model: Model,
    data: Data,
    architecture: Architecture = None,
    size: Size = None,
    batch: Batch = 16,
    limit: Limit = 1000,
    pretrained: Pretrained = False,
    weights: Weights = None,
    json: Json = False,
) -> None:
    """Accuracy, channels dropped, MACs and time of a model as it is."""
    from isw_cli.look import show_evaluation

    show_evaluation(Request(model, data, architecture, size, batch, limit, pretrained, weights), json)


@_command("bench", "isw_cli.look")
def bench(
    model: Model,
    architecture: Architecture = None,
    size: Size = None,
    batch: Batch = 1,
    alpha: Alpha = None,
    beta: Beta = None,
    json: Json = False,
) -> None:
    """Time a model with its gates, or these, against its best dense form, on noise."""
    from isw_cli.look import show_times

    show_times(Request(model, architecture=architecture, size=size, batch=batch), alpha, beta, json)


@_command("export", "isw_cli.look")
def export(
    model: Model,
    to: Annotated[Path, typer.Option(help="The file: .onnx, or .xml for OpenVINO.")],
    architecture: Architecture = None,
    size: Size = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a gated model, as masks, for another runtime."""
    from isw_cli.look import write_export

    write_export(Request(model, architecture=architecture, size=size, batch=2), to, force, json)


@_command("report", "isw_cli.gating")
def report(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("report"),
    architecture: Architecture = None,
    size: Size = None,
    batch: Batch = 16,
    limit: Limit = 1000,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a page about a gated model and images."""
    from isw_cli.gating import write_report

    write_report(Request(model, data, architecture, size, batch, limit), out, force, json)


@_command("build", "isw_cli.doctor")
def build(json: Json = False) -> None:
    """Build the kernels of this processor ahead of their first use."""
    from isw_cli.doctor import build_kernels

    build_kernels(json)


@_command("doctor", "isw_cli.doctor")
def doctor(json: Json = False) -> None:
    """Say what is here, what is missing, and how to get it."""
    from isw_cli.doctor import examine

    if not examine(json):
        raise typer.Exit(1)
