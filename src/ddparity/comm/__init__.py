"""Move values between ranks. Read `allreduce` first for gradients, or `gather` for nested values.

`allreduce` sums gradients and small tensors; `buffers` keeps the memory for large ones. `gather` is the public function
for nested values: `trees` separates a value into a description in JSON and flat tensors, by the walk in `nesting`, and
`transfer` sends both, without pickle.
"""
