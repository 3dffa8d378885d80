"""What a machine cannot go below: the bytes and the products of a call, at the rates measured here.

A floor is the larger of two times: reading the inputs and writing the outputs once, at the rate of
a copy of as many bytes; and the useful multiplications, at the rate of a large float32 product.
Intermediate results are taken as free, and symmetric ones as computed by half.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from . import timer
from .rows import Shape

FLOAT = 4  # bytes


class Work(NamedTuple):
    """What a call must do at least: bytes moved, and floating-point operations."""

    moved: int
    flops: int


def d2sm_loss(shape: Shape, *, points: int, backward: bool) -> Work:
    """Gram matrices of V = [U, s] and products with z; backward V G and a sum. Factors rule."""
    batch, size, rank = shape
    columns, rows = rank + 1, batch * size
    norms = max(1, points - 1)  # the clean point enters only linearly
    read = rows * (points * (rank + 2) + 1)
    flops = rows * (norms * columns * (columns + 1) + 4 * points * columns)
    if not backward:
        return Work(FLOAT * read, flops)
    written = rows * points * (rank + 2)
    return Work(
        FLOAT * (read + written), flops + rows * columns * (2 * norms * columns + 4 * points)
    )


def step(shape: Shape, *, backward: bool = False) -> Work:
    """x, score and diag read and the new state written; backward reads three and writes three."""
    batch, size, _ = shape
    return Work(FLOAT * batch * size * (10 if backward else 4), 0)


def assembly(shape: Shape) -> Work:
    """Half of U U^T, all of it written."""
    batch, size, rank = shape
    return Work(FLOAT * batch * size * (size + rank + 1), batch * size * (size + 1) * rank)


def floor_us(work: Work) -> float:
    """Microseconds at the rates of this machine, with the threads torch has now."""
    threads = torch.get_num_threads()
    computing = work.flops / flops_per_us(threads) if work.flops else 0.0
    return max(computing, copy_us(work.moved, threads))


@cache
def copy_us(moved: int, threads: int) -> float:
    """A copy that reads and writes `moved` bytes in all, between touched buffers."""
    count = max(1, moved // 2 // FLOAT)
    source, target = torch.ones(count), torch.zeros(count)
    return timer.measure({"copy": lambda: target.copy_(source)}, seconds=0.3)["copy"].p20


@cache
def flops_per_us(threads: int) -> float:
    """The rate of a float32 product of 1536 x 1536 matrices."""
    n = 1536
    a, b, out = torch.ones(n, n), torch.ones(n, n), torch.empty(n, n)
    with torch.no_grad():
        timing = timer.measure({"product": lambda: torch.mm(a, b, out=out)}, seconds=1.0)
    return 2 * n**3 / timing["product"].p20
