"""Training blocks as one autograd node per binary convolution: less time, and an eighth of the memory.

    passes   what is computed between convolutions, in torch's operations: the reference
    native   the same as C (native/*.c)
    int8     products of signs as 8-bit whole numbers
    place    where a kernel goes
    node     the autograd node: what is kept, what is made again
    chain    a network's blocks as such nodes
    speed    which of all that a training uses

A network of your own, made of BinaryBlock, has its blocks in `self.blocks` and None in `self.fusion`, and runs

    run_blocks(self.blocks, x, self.fusion) if self.training and self.fusion is not None else self.blocks(x)

whereupon `choose_speed(model)` sets `fusion`. Any iterable of modules may be given to `run_blocks`.

Equal to the layers in float64 to 1e-10 and better (tests/test_fused.py). Imports torch and bnnfree.nn only.
"""

from bnnfree.nn.fused.chain import Fusion, run_blocks, unfusible
from bnnfree.nn.fused.native import load_passes
from bnnfree.nn.fused.passes import PASSES, Shared
from bnnfree.nn.fused.speed import PRECISIONS, SPEEDS, Speed, choose_speed

__all__ = [
    "PASSES",
    "PRECISIONS",
    "SPEEDS",
    "Fusion",
    "Shared",
    "Speed",
    "choose_speed",
    "load_passes",
    "run_blocks",
    "unfusible",
]
