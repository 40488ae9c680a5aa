"""What operations do to maps, by their names in a graph."""

__all__ = [
    "ACTIVATIONS",
    "BLANKS",
    "CLAMPS",
    "CUTS",
    "FOLDS",
    "JOINS",
    "PASSES",
    "POOLS",
    "REDUCTIONS",
    "SPLITS",
    "VIEWS",
]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ACTIVATIONS = _names(
    "relu gelu silu hardswish hardtanh hardsigmoid leaky_relu mish elu celu selu softplus sigmoid tanh clamp clamp_min "
    "clamp_max prelu _prelu_kernel rrelu rrelu_with_noise threshold hardshrink softshrink relu6 pow abs exp neg"
)
PASSES = _names("alias detach clone contiguous _to_copy dropout native_dropout lift_fresh")
JOINS = frozenset(["add", "sub", "maximum", "minimum"])
SPLITS = frozenset(["split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk"])
# Each looks at places of one channel alone, and gives 0 for zeros.
POOLS = _names(
    "max_pool2d_with_indices max_pool2d avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d "
    "max_pool1d avg_pool1d adaptive_avg_pool1d max_pool3d_with_indices avg_pool3d _adaptive_avg_pool3d "
    "adaptive_avg_pool3d adaptive_max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d "
    "_upsample_nearest_exact1d _upsample_nearest_exact2d upsample_linear1d upsample_bilinear2d upsample_bicubic2d "
    "upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d reflection_pad2d "
    "reflection_pad3d replication_pad1d replication_pad2d replication_pad3d"
)
REDUCTIONS = frozenset(["mean", "amax", "amin", "max", "min", "sum"])
CLAMPS = ("clamp", "clamp_min")
VIEWS = frozenset(["view", "_unsafe_view", "reshape", "flatten", "squeeze", "unsqueeze"])
CUTS = SPLITS | {"slice", "select", "index", "index_select"}  # what they give may be a part of a map
FOLDS = frozenset(["pixel_shuffle", "glu", "index", "index_select"])  # several channels give one, or take places
BLANKS = frozenset(["new_empty", "empty", "new_zeros", "zeros", "zeros_like", "empty_like"])
