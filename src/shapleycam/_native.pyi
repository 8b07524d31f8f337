"""The compiled extension (csrc/bindings.cpp): the C ABI of csrc/include/shapleycam.h. A test compares this with the module.

Tensors are addresses, dtypes and rows are codes, strides count elements; a status other than 0 is an error (status_text).
"""

# (address, dtype, stride of n, of c, of s)
_View = tuple[int, int, int, int, int]
_Extents = tuple[int, int, int]
_Channels = tuple[float, float, float]

has_cuda: bool
cpu_operators: list[str]
cuda_operators: list[str]
dtypes: dict[str, int]
poolings: dict[str, int]
utilities: dict[str, int]
most_nodes: int

def status_text(status: int) -> str: ...
def cpu_variant() -> str: ...
def weighted_reduce_workspace_cpu(n: int, c: int, s: int, pooling: int) -> int: ...
def weighted_reduce_workspace_cuda(n: int, c: int, s: int, pooling: int) -> int: ...
def channel_weighted_sum_workspace_cpu(n: int, c: int, s: int, m: int) -> int: ...
def channel_weighted_sum_workspace_cuda(n: int, c: int, s: int, m: int) -> int: ...
def weighted_reduce_cpu(
    activations: _View,
    gradient: _View,
    hvp: _View | None,
    n: int,
    c: int,
    s: int,
    pooling: int,
    out: int,
    out_dtype: int,
    workspace: int,
    workspace_size: int,
    threads: int,
) -> int: ...
def weighted_reduce_cuda(
    activations: _View,
    gradient: _View,
    hvp: _View | None,
    n: int,
    c: int,
    s: int,
    pooling: int,
    out: int,
    out_dtype: int,
    workspace: int,
    workspace_size: int,
    stream: int,
) -> int: ...
def channel_weighted_sum_cpu(
    activations: _View,
    alpha: int,
    n: int,
    c: int,
    s: int,
    m: int,
    out: int,
    out_dtype: int,
    workspace: int,
    workspace_size: int,
    threads: int,
) -> int: ...
def channel_weighted_sum_cuda(
    activations: _View,
    alpha: int,
    n: int,
    c: int,
    s: int,
    m: int,
    out: int,
    out_dtype: int,
    workspace: int,
    workspace_size: int,
    stream: int,
) -> int: ...
def utility_rows_cpu(
    logits: int,
    dtype: int,
    stride: int,
    bias: int,
    bias_dtype: int,
    targets: int,
    n: int,
    m: int,
    k: int,
    utility: int,
    order: int,
    scale: float,
    rows: int,
    out_dtype: int,
    threads: int,
) -> int: ...
def utility_rows_cuda(
    logits: int,
    dtype: int,
    stride: int,
    bias: int,
    bias_dtype: int,
    targets: int,
    n: int,
    m: int,
    k: int,
    utility: int,
    order: int,
    scale: float,
    rows: int,
    out_dtype: int,
    stream: int,
) -> int: ...
def quadrature_rows_cpu(
    logits: int,
    dtype: int,
    stride: int,
    start: int,
    start_dtype: int,
    start_stride: int,
    targets: int,
    n: int,
    m: int,
    k: int,
    utility: int,
    nodes: list[float],
    weights: list[float],
    scale: float,
    rows: int,
    out_dtype: int,
    threads: int,
) -> int: ...
def quadrature_rows_cuda(
    logits: int,
    dtype: int,
    stride: int,
    start: int,
    start_dtype: int,
    start_stride: int,
    targets: int,
    n: int,
    m: int,
    k: int,
    utility: int,
    nodes: list[float],
    weights: list[float],
    scale: float,
    rows: int,
    out_dtype: int,
    stream: int,
) -> int: ...
def class_maps_cpu(
    activations: _View,
    alpha: int,
    n: int,
    c: int,
    m: int,
    grid: _Extents,
    size: _Extents,
    renormalize: bool,
    raw: int,
    raw_dtype: int,
    maps: int,
    maps_dtype: int,
    workspace: int,
    workspace_size: int,
    threads: int,
) -> int: ...
def class_maps_cuda(
    activations: _View,
    alpha: int,
    n: int,
    c: int,
    m: int,
    grid: _Extents,
    size: _Extents,
    renormalize: bool,
    raw: int,
    raw_dtype: int,
    maps: int,
    maps_dtype: int,
    workspace: int,
    workspace_size: int,
    stream: int,
) -> int: ...
def display_map_cpu(
    raw: int, dtype: int, n: int, grid: _Extents, size: _Extents, renormalize: bool, out: int, out_dtype: int, threads: int
) -> int: ...
def display_map_cuda(
    raw: int, dtype: int, n: int, grid: _Extents, size: _Extents, renormalize: bool, out: int, out_dtype: int, stream: int
) -> int: ...
def overlay_cpu(
    images: int,
    dtype: int,
    n: int,
    height: int,
    width: int,
    strides: tuple[int, int, int, int],
    heatmaps: int,
    table: int,
    alpha: float,
    mean: _Channels | None,
    std: _Channels | None,
    out: int,
    threads: int,
) -> int: ...
def overlay_cuda(
    images: int,
    dtype: int,
    n: int,
    height: int,
    width: int,
    strides: tuple[int, int, int, int],
    heatmaps: int,
    table: int,
    alpha: float,
    mean: _Channels | None,
    std: _Channels | None,
    out: int,
    stream: int,
) -> int: ...
