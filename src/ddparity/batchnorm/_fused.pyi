"""The compiled passes; addresses and sizes as described in _fused.c."""

def moments(wide: int, x: int, n: int, c: int, m: int, mean: int, m2: int, threads: int, /) -> None: ...
def join(gathered: int, w: int, c: int, stats: int, eps: float, /) -> None: ...
def move(wide: int, running: int, target: int, c: int, part: float, /) -> None: ...
def normalise(
    wide: int,
    x: int,
    y: int,
    n: int,
    c: int,
    m: int,
    mean: int,
    invstd: int,
    weight: int,
    bias: int,
    threads: int,
    /,
) -> None: ...
def backward_sums(
    wide: int, dy: int, x: int, n: int, c: int, m: int, mean: int, sum_dy: int, sum_dy_xmu: int, threads: int, /
) -> None: ...
def backward_input(
    wide: int,
    dy: int,
    x: int,
    dx: int,
    n: int,
    c: int,
    m: int,
    mean: int,
    invstd: int,
    weight: int,
    sum_dy: int,
    sum_dy_xmu: int,
    total: int,
    threads: int,
    /,
) -> None: ...
