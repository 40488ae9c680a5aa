"""What the CUDA kernels compile to, for any GPU and without one: nothing runs and nothing is timed.

    python -m benchmarks.speed.cuda.assembly --capability 90

Counts come from the PTX, registers and spills from ptxas. 16-byte asynchronous copies (cp.async) and tensor-core
instructions (wgmma from 9.0 on, mma before) in the convolution are what its design is for.
"""

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from isw_plugin.engine import pack_weight
from isw_plugin.engine.tiles import output_size, padded_channels, pixel_slots
from isw_plugin.engine.triton_launch import Launch, compact, conv, depthwise, indices, keep, sum_squares

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LAYERS = ((256, 256, 3, 28), (512, 512, 3, 14), (64, 64, 3, 56), (512, 512, 1, 7), (129, 53, 3, 16), (512, 512, 3, 4))

COUNTS = {  # what is counted in the PTX
    "wgmma": r"wgmma\.mma_async",
    "mma": r"\bmma\.sync",
    "cp.async 16 B": r"cp\.async\.c[ag].*, 0x10, ",
    "cp.async 4 B": r"cp\.async\.c[ag].*, 0x4, ",
    "ld": r"ld\.global",
    "st": r"st\.global",
    "atomics": r"\b(?:atom|red)\.",
}


def source(launch: Launch) -> ASTSource:
    """The kernel with the specialisation that a launch on aligned tensors gets."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        constant = parameter.is_constexpr or value is None or (type(value) is int and value == 1)
        if constant:
            signature[parameter.name], constants[(place,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
        if not constant and (isinstance(value, Tensor) or (type(value) is int and value % 16 == 0)):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def report(launch: Launch, capability: int) -> dict[str, int]:
    """Counts for one launch: instructions by kind, registers, spilled bytes, shared memory in bytes."""
    built = triton.compile(source(launch), target=GPUTarget("cuda", capability, 32), options=launch.options)
    ptx, cubin = built.asm["ptx"], built.asm["cubin"]
    counts = {name: len(re.findall(pattern, ptx)) for name, pattern in COUNTS.items()}
    return counts | resources(cubin) | {"shared": built.metadata.shared}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack, which is where spills go, of the one kernel in a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        done = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
    found = re.findall(r"REG:(\d+) STACK:(\d+)", done.stdout)[-1]
    return {"registers": int(found[0]), "stack": int(found[1])}


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return tensor.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else tensor


def gated_layer(c_in: int, c_out: int, kernel: int, side: int, dtype: torch.dtype, n: int = 32) -> dict[str, Launch]:
    """The launches of a gated convolution (N, C_in, side, side) that decides from statistics."""
    size = output_size((side, side), (kernel, kernel), (1, 1), (kernel // 2, kernel // 2))
    x, y = empty(n, c_in, side, side, dtype=dtype), empty(n, c_out, *size, dtype=dtype)
    squares = empty(n, pixel_slots(side * side), c_in, dtype=torch.float32)
    out_squares = empty(n, pixel_slots(size[0] * size[1]), c_out, dtype=torch.float32)
    index, count = empty(n, c_in, dtype=torch.int32), empty(n, dtype=torch.int32)
    compacted = empty(n, padded_channels(c_in, x.element_size()), side, side, dtype=dtype)
    weight, bias = pack_weight(empty(c_out, c_in, kernel, kernel, dtype=dtype)), empty(c_out, dtype=dtype)
    padding = (kernel // 2, kernel // 2)
    operands = (weight, bias, (1, 1), padding, "relu")
    return {
        "indices": indices(squares, 0.5, 1.0, index, count),
        "compact": compact(x, index, count, compacted),
        "conv": conv(compacted, *operands, (index, count), None, None, y, out_squares),
    }


def other_launches(dtype: torch.dtype) -> dict[str, Launch]:
    """The remaining kernels, and the convolution in other forms, on a map of 144 channels, 28 px."""
    x, squares = empty(32, 144, 28, 28, dtype=dtype), empty(32, pixel_slots(784), 144, dtype=torch.float32)
    mask, bias, planes = empty(32, 144, dtype=torch.bool), empty(144, dtype=dtype), x.contiguous()
    weight = torch.empty(144, 1, 3, 3, dtype=dtype, device="meta")
    index, count = empty(32, 144, dtype=torch.int32), empty(32, dtype=torch.int32)
    operands = (pack_weight(empty(144, 144, 3, 3, dtype=dtype)), bias, (1, 1), (1, 1), "relu6")
    return {
        "keep": keep(squares, 0.5, 1.0, mask),
        "indices of a mask": indices(mask, 0.0, 0.0, index, count),
        "depthwise": depthwise(x, weight, bias, (1, 1), (1, 1), "relu6", mask, x, squares),
        "sum_squares": sum_squares(x, squares),
        "conv + gated residual": conv(x, *operands, (index, count), x, mask, x, squares),
        "conv, all kept": conv(x, *operands, None, None, None, x, squares),
        "conv, all kept, NCHW": conv(planes, *operands, None, planes, None, x, squares),
    }


def row(name: str, launch: Launch, capability: int) -> str:
    found = report(launch, capability)
    tile = "x".join(str(launch.arguments[key]) for key in ("PIXELS", "CHANNELS", "DEPTH") if key in launch.arguments)
    return f"| {name} | {tile} | {launch.warps} | {' | '.join(str(count) for count in found.values())} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="80, 86, 89, 90, 100 ...")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    args = parser.parse_args()
    print(f"sm_{args.capability}, {args.dtype}, batch 32, Triton {triton.__version__}; compiled, not run")
    columns = ("kernel", "tile", "warps", *COUNTS, "registers", "stack", "shared")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    dtype = DTYPES[args.dtype]
    for c_in, c_out, kernel, side in LAYERS:
        launches = gated_layer(c_in, c_out, kernel, side, dtype)
        wanted = launches if side == LAYERS[0][3] else {"conv": launches["conv"]}
        for name, launch in wanted.items():
            print(row(f"{name} {kernel}x{kernel} {c_in} -> {c_out} @ {side}", launch, args.capability), flush=True)
    for name, launch in other_launches(dtype).items():
        print(row(name, launch, args.capability), flush=True)


if __name__ == "__main__":
    main()
