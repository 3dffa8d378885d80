"""Chains over several processes: each rank runs its share, and every rank gets all of them.

The noise of a step is a function of (seed, step, global chain), so that shares draw what one
process draws: bitwise if the score of a row does not depend on the rows beside it (analytic
densities), to rounding for networks, for any number of ranks. Works in any initialised
`torch.distributed`, such as under torchrun, and without one in a single process.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ..checks import check, check_count
from ..conditions import check_conditions, condition_rows
from ..random import seed_from
from ..scores import ScoreFn
from .arguments import ChainState, begin_chains
from .chains import ChainOptions, Chains, sample
from .methods.coins import BoundWarning, warn_bound
from .watch import RunawayWarning, figure_of_all, warn

if TYPE_CHECKING:
    from typing_extensions import Unpack

_Result = TypeVar("_Result")
_Told = TypeVar("_Told")


def shard(n: int, rank: int, world: int) -> slice:
    """The rows of n that belong to a rank: contiguous, in order, sizes apart by at most one.

    Args:
        n: rows in all, >= 0.
        rank: 0 ... world - 1.
        world: ranks.

    Returns:
        slice(start, stop), 0 <= start <= stop <= n; empty where there are more ranks than rows.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong kind.

    Example:
        >>> [shard(5, rank, 2) for rank in range(2)]
        [slice(0, 2, None), slice(2, 5, None)]
    """
    n = check_count("shard", "n", n, least=0, limit=2**63)
    world = check_count("shard", "world", world)
    rank = check_count("shard", "rank", rank, least=0)
    check("shard", rank < world, f"rank must be below world {world}", rank)
    return slice(n * rank // world, n * (rank + 1) // world)


def sample_sharded(
    score_fn: ScoreFn,
    init: Tensor | None = None,
    *,
    step_size: float | Tensor,
    n_steps: int,
    seed: int | None = None,
    first_chain: int = 0,
    state: ChainState | None = None,
    progress: bool = False,
    group: dist.ProcessGroup | None = None,
    generator: torch.Generator | None = None,
    **options: Unpack[ChainOptions],
) -> Chains:
    """`sample` with the chains shared out over the ranks of a process group.

    Every rank calls this with the same arguments, `init` or `state` whole, and its own copy of the
    score function; each runs its chains, with `first_chain` set to the first of them. If that
    fails on one rank, all ranks raise. Where torch.distributed is not initialised this is `sample`.

    Args:
        score_fn, init, step_size, n_steps, first_chain: as in `sample`, for all chains.
        seed: as in `sample`. None: that of rank 0 is used by all.
        generator: as in `sample`, in the same state on every rank.
        state: as in `sample`. It may come from a run on any number of ranks.
        progress: on rank 0, for its own share.
        group: of ranks that take part; None is all. With NCCL, `torch.cuda.set_device` must have
            chosen the device of the process.
        options: further arguments of `sample`, see `ChainOptions`, model_kwargs for all chains.

    Returns:
        On every rank the Chains of all, as one process gives them: draws and statistics in the
        order of the chains, on the device of init, and a state to go on from. "seconds" is the
        longest of any rank. Rank 0 warns of chains that ran away on any of them.

    Raises:
        ValueError, TypeError: as `sample`; arguments that differ between ranks; this process is not
            in group.
        RuntimeError: another rank failed; the message has its error.

    Example:
        >>> import torch
        >>> chains = sample_sharded(lambda x: -x, torch.zeros(3, 2), step_size=0.1, n_steps=4)
        >>> chains.draws.shape
        torch.Size([3, 4, 2])
    """
    where = "sample_sharded"
    seed = seed_from(where, seed, generator)
    if not (dist.is_available() and dist.is_initialized()):
        rule = "group must be None where torch.distributed is not initialised"
        check(where, group is None, rule, lambda: str(group))
        return sample(
            score_fn,
            init,
            step_size=step_size,
            n_steps=n_steps,
            seed=seed,
            first_chain=first_chain,
            state=state,
            progress=progress,
            **options,
        )
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    rule = "group must hold this process"
    check(where, rank >= 0, rule, lambda: f"one without rank {dist.get_rank()}")
    fresh = state is None and seed is None

    def tell(start: ChainState) -> tuple[int, dict[str, str]]:
        given: dict[str, object] = {"init": start["x"], "seed": None if fresh else start["seed"]}
        given |= {name: start[name] for name in ("step", "since_draw", "first_chain")}
        given |= {"step_size": step_size, "n_steps": n_steps, **options}
        check_conditions(where, options.get("model_kwargs"), len(start["x"]), "init")
        return start["seed"], {name: _mark(value) for name, value in given.items()}

    start, told = _together(group, lambda: begin_chains(init, seed, first_chain, state), tell)
    _refuse_differences([given for _, given in told])
    chains = len(start["x"])
    shares = [shard(chains, each, world) for each in range(world)]
    mine = shares[rank]
    share = start.copy()
    share["x"] = start["x"][mine]
    # A seed that is not given was drawn on every rank, so that their generators stay together.
    share["seed"] = told[0][0]
    share["first_chain"] += mine.start
    per_chain = isinstance(step_size, Tensor) and step_size.shape == (chains,)
    own_step_size = step_size[mine] if isinstance(step_size, Tensor) and per_chain else step_size

    options["model_kwargs"] = condition_rows(options.get("model_kwargs") or {}, mine)

    def run() -> Chains:
        with warnings.catch_warnings():  # of all chains together, below
            warnings.simplefilter("ignore", RunawayWarning)
            warnings.simplefilter("ignore", BoundWarning)
            return sample(
                score_fn,
                step_size=own_step_size,
                n_steps=n_steps,
                state=share,
                progress=progress and rank == 0,
                **options,
            )

    def spent(done: Chains) -> tuple[float, int]:
        return done.stats["seconds"], done.stats["n_score_evaluations"]

    part, costs = _together(group, run, spent)
    sizes = [each.stop - each.start for each in shares]
    calls = sum(size * each for size, (_, each) in zip(sizes, costs, strict=True))
    stats = {
        name: _gather(value, sizes, group)
        if isinstance(value, Tensor) and name != "step_size"
        else value
        for name, value in part.stats.items()
    }
    stats |= {"step_size": step_size, "seconds": max(costs)[0], **figure_of_all(stats)}
    if chains:
        stats["n_score_evaluations"] = -(-calls // chains)
    end = part.state.copy()
    if rank == 0:
        warn("sample_sharded", stats, stacklevel=2)
        warn_bound("sample_sharded", stats, end["step"] - start["step"], stacklevel=2)
    end["x"] = _gather(part.state["x"], sizes, group)
    end["first_chain"] = start["first_chain"]
    return Chains(_gather(part.draws, sizes, group), stats, end)


def _together(
    group: dist.ProcessGroup | None,
    work: Callable[[], _Result],
    tell: Callable[[_Result], _Told],
) -> tuple[_Result, list[_Told]]:
    """Own result of the work, and what each rank tells of its own; raises on all if on one."""
    failure, told = None, None
    try:
        result = work()
        told = tell(result)
    except Exception as error:  # the others wait for an answer, whatever went wrong
        failure = error
    message = None if failure is None else f"{type(failure).__name__}: {failure}"
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, (message, told), group=group)
    if failure is not None:
        raise failure
    for rank, (message, _) in enumerate(everyone):
        if message is not None:
            raise RuntimeError(
                f"sample_sharded: every rank must finish its part, got {message} on rank {rank}"
            )
    return result, [each for _, each in everyone]


def _mark(value: object) -> str:
    """What an argument is, in words that are equal on all ranks if it is."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest = hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:16]
        return f"shape {tuple(value.shape)} {value.dtype} of hash {digest}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_mark(each)}' for key, each in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_mark, value))}]"
    return "a function" if callable(value) else repr(value)


def _refuse_differences(given: list[dict[str, str]]) -> None:
    for rank, others in enumerate(given):
        for name in given[0] | others:
            first, other = (each.get(name, "nothing") for each in (given[0], others))
            if first != other:
                raise ValueError(
                    f"sample_sharded: {name} must be the same on every rank, got {first} on rank 0 "
                    f"and {other} on rank {rank}"
                )


def _gather(part: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """The rows of all ranks in order, on every rank; sizes are their numbers of rows."""
    if 0 in (max(sizes), *part.shape[1:]):
        return part.new_empty((sum(sizes), *part.shape[1:]))
    # Backends gather equal sizes: shares are filled up. As bytes: every dtype, every bit.
    padded = part.new_zeros((max(sizes), *part.shape[1:]))
    padded[: len(part)] = part
    raw = padded.reshape(-1).view(torch.uint8).to(_device(part, group))
    everyone = [torch.empty_like(raw) for _ in sizes]
    dist.all_gather(everyone, raw, group=group)
    rows = [
        each.view(part.dtype).reshape(padded.shape)[:size]
        for each, size in zip(everyone, sizes, strict=True)
    ]
    return torch.cat(rows).to(part.device)


def _device(x: Tensor, group: dist.ProcessGroup | None) -> torch.device:
    """Where the backend can gather x: its own device if it can, or else the one it works on."""
    kinds = [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]
    if x.device.type in kinds:
        return x.device
    if "cpu" in kinds:
        return torch.device("cpu")
    return torch.device(kinds[0], torch.cuda.current_device())
