"""`python -m isw_plugin.ops build`: builds the kernels ahead of the first call."""

import argparse
import time

from isw_plugin.ops.build import BuildError, build
from isw_plugin.ops.cpu import ADVICE, available, use


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m isw_plugin.ops")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("build", help="build and load the kernels of this processor")
    command.add_argument("--isa", choices=available(), default=available()[0])
    isa = parser.parse_args().isa
    start = time.perf_counter()
    try:
        use(isa)
        built = build(isa)
    except BuildError as error:
        raise SystemExit(f"{error}. To get kernels, {ADVICE}.") from error
    print(f"processor: {', '.join(available())}; chosen: {isa}")
    print(f"compiler:  {built.compiler}")
    print(f"library:   {built.operators}")
    print(f"kernels:   {built.kernels} ({time.perf_counter() - start:.1f} s)")


if __name__ == "__main__":
    _main()
