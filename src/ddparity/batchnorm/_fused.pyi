"""The compiled passes; addresses and sizes as described in _fused.c."""

def moments(wide: int, x: int, n: int, c: int, m: int, payload: int, threads: int, /) -> None: ...
def join(gathered: int, w: int, c: int, stats: int, eps: float, /) -> None: ...
def move(mean_wide: int, mean: int, var_wide: int, var: int, c: int, stats: int, momentum: float, /) -> None: ...
def normalise(
    wide: int,
    x: int,
    y: int,
    n: int,
    c: int,
    m: int,
    stats: int,
    weight_wide: int,
    weight: int,
    bias_wide: int,
    bias: int,
    threads: int,
    /,
) -> None: ...
def backward_sums(
    wide: int, dy: int, x: int, n: int, c: int, m: int, stats: int, sums: int, threads: int, /
) -> None: ...
def parameter_gradients(
    c: int, stats: int, sums: int, weight_wide: int, d_weight: int, bias_wide: int, d_bias: int, /
) -> None: ...
def backward_input(
    wide: int,
    dy: int,
    x: int,
    dx: int,
    n: int,
    c: int,
    m: int,
    stats: int,
    weight_wide: int,
    weight: int,
    parts: int,
    count: int,
    threads: int,
    /,
) -> None: ...
