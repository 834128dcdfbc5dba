"""The compiled kernels. _fused.c describes the addresses and sizes."""

def moments(is_double: int, x: int, n: int, c: int, m: int, payload: int, threads: int, /) -> None: ...
def join(gathered: int, w: int, c: int, stats: int, eps: float, /) -> None: ...
def update(
    mean_is_double: int, mean: int, var_is_double: int, var: int, c: int, stats: int, momentum: float, /
) -> None: ...
def normalise(
    is_double: int,
    x: int,
    y: int,
    n: int,
    c: int,
    m: int,
    stats: int,
    weight_is_double: int,
    weight: int,
    bias_is_double: int,
    bias: int,
    threads: int,
    /,
) -> None: ...
def backward_sums(
    is_double: int, dy: int, x: int, n: int, c: int, m: int, stats: int, sums: int, threads: int, /
) -> None: ...
def parameter_gradients(
    c: int, stats: int, sums: int, weight_is_double: int, d_weight: int, bias_is_double: int, d_bias: int, /
) -> None: ...
def backward_input(
    is_double: int,
    dy: int,
    x: int,
    dx: int,
    n: int,
    c: int,
    m: int,
    stats: int,
    weight_is_double: int,
    weight: int,
    parts: int,
    count: int,
    threads: int,
    /,
) -> None: ...
