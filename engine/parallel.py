"""parallel.py - one run, several processes: what a step must know of all of them.

What: `torchrun --nproc-per-node N train.py ...` starts N processes ("ranks"). Each samples, scores and differentiates its own share
of a step's prompts, and the gradients are *summed*, because the loss is already divided by the whole step's denominator. So the
result is that of one process with the same batch, up to the order of additions:

  gather / mine   quantiles, denominators and "the least certain quarter" are properties of the step, not of a share
  sum_gradients   after the last micro-batch, one sum per parameter
  any / total     shall we stop? and the numbers of the log

--shard (FSDP2) also divides the decoder's weights, gradients, optimizer state and EMA. The embedding table and the head stay whole:
the loss applies the head itself, outside of `forward`. While answers are sampled and read, ranks do different numbers of passes, so
the layers are gathered for that long (`whole_layers`). Alone is the same for one process: the identity.

Depends on torch only.   Try it:  python -m pytest tests/test_parallel.py -q
"""

import math
import os
from contextlib import contextmanager, nullcontext, redirect_stdout

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class Alone:
    """One process: the whole step is its share."""

    rank, size = 0, 1

    def share(self, n: int) -> slice:
        """Which of n rows are this rank's."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's rows, in order; a second dimension is padded with 0 to the longest. (b, ...) -> (B, ...)."""
        return x

    def mine(self, x: Tensor, like: Tensor) -> Tensor:
        """This rank's rows of what was gathered from tensors shaped like `like`."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """The sum over ranks."""
        return x

    def any(self, flag: bool) -> bool:
        """Does a rank say so?"""
        return bool(self.total(torch.tensor(float(flag))) > 0)

    def objects(self, x) -> list:
        """One small Python object per rank."""
        return [x]

    def wait(self) -> None:
        """Until everyone is here."""

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Replace each gradient by its sum over ranks."""


ALONE = Alone()


class Ranks(Alone):
    """Processes that torchrun started. Small things travel over the CPUs (gloo), which notice at once when a process is gone."""

    def __init__(self):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def gather(self, x: Tensor) -> Tensor:
        shapes = self.objects(tuple(x.shape))
        room = [max(dims) for dims in zip(*shapes, strict=True)]
        padded = torch.zeros(room, dtype=x.dtype)
        padded[tuple(slice(n) for n in x.shape)] = x.cpu()
        out = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(out, padded)
        return torch.cat([o[: s[0]] for o, s in zip(out, shapes, strict=True)]).to(x.device)

    def mine(self, x: Tensor, like: Tensor) -> Tensor:
        rows = x[self.share(len(x))]
        return rows[:, : like.shape[1]] if x.dim() > 1 else rows

    def total(self, x: Tensor) -> Tensor:
        out = x.to("cpu", copy=True)
        dist.all_reduce(out)
        return out.to(x.device)

    def objects(self, x) -> list:
        out = [None] * self.size
        dist.all_gather_object(out, x)
        return out

    def wait(self) -> None:
        dist.barrier()

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        self.wait()  # a process that is gone is noticed here, and not by a GPU that waits for it
        # A sharded gradient was summed by FSDP already. Every rank has tokens in every step, so the lists are the same.
        whole = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
        for one in [dist.all_reduce(g, async_op=True) for g in whole]:
            one.wait()


def size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process' number; 0 is the one that prints and writes."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def join() -> None:
    """Meet the other processes that torchrun started, if it did."""
    if size() > 1 and not dist.is_initialized():
        # Both: tensors on a GPU (gradients, FSDP's layers) travel by NCCL, the others by gloo.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def ranks() -> Alone:
    """The processes of this run, after `join`."""
    return Ranks() if size() > 1 and dist.is_initialized() else ALONE


@contextmanager
def one_voice():
    """Only rank 0 prints; at the end all say goodbye, not after an error: NCCL's goodbye waits for ranks that may wait for us."""
    with open(os.devnull, "w", errors="replace") as silence, redirect_stdout(silence) if rank() else nullcontext():
        yield
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def lost(error: RuntimeError) -> bool:
    """Does this error mean that another process is gone?"""
    signs = ("closed by peer", "Connection reset", "Broken pipe", "timed out", "Timed out", "Socket", "NCCL", "gloo")
    return size() > 1 and any(s in str(error) for s in signs)


# --- sharding: FSDP2 -------------------------------------------------------------------------------------------------
def shard(model: nn.Module, bf16: bool) -> None:
    """Divide the decoder's layers among the ranks, in place; the embedding table and the head stay whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    decoder = model.get_decoder()
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    how = dict(mesh=mesh, reshard_after_forward=True)
    if bf16:  # the inputs stay as they are: autocast casts what a product needs, as without sharding
        how["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    whole = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    for part in [*decoder.layers, decoder]:
        fully_shard(part, ignored_params=whole, **how)
        # A sum, not a mean: the loss is divided by the whole step's tokens already.
        part.set_force_sum_reduction_for_comms(True)
        part.set_gradient_divide_factor(1.0)


@contextmanager
def whole_layers(model: nn.Module):
    """All layers gathered: inside, a forward pass needs no other rank, so ranks may do different numbers of them."""
    layers = []
    if size() > 1:
        from torch.distributed.fsdp import FSDPModule

        layers = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for layer in layers:
        layer.set_reshard_after_forward(False)
        layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.reshard()
            layer.set_reshard_after_forward(True)


def full(x):
    """A sharded tensor made whole, for rank 0's file: there on the CPU, elsewhere nothing. Every rank must call. Else: x itself."""
    if not isinstance(x, DTensor):
        return x
    whole = x.full_tensor()
    return whole.cpu() if rank() == 0 else whole.new_empty(0)


def like(x: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor where the reference is, divided as the reference is."""
    x = x.to(reference.device)
    return distribute_tensor(x, reference.device_mesh, reference.placements) if isinstance(reference, DTensor) else x


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """torch's clip_grad_norm_, also where some parameters are sharded and others not. -> the norm before scaling, ()."""
    parts = [[p for p in parameters if p.grad is not None and isinstance(p, DTensor) == kind] for kind in (False, True)]
    norms = [nn.utils.get_total_norm([p.grad for p in part]) for part in parts if part] or [torch.zeros(())]  # no gradient at all
    norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    for part in parts:
        nn.utils.clip_grads_with_norm_(part, limit or math.inf, norm)
    return norm
