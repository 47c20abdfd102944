"""
One model, many processes: one to a GPU, started by torchrun, on one machine or several.

    DDP     each process has the whole model and does some of a step's micro-batches. After the last of them gradients
            are averaged, and all take the same step: 16 bytes a parameter on each GPU (weight, gradient, two moments).
    FSDP    each of n processes keeps 1/n of every matrix, by rows, with its gradient and its moments: 16/n bytes. When
            a block is to run, forward or backward, its weights are gathered from all, and dropped when it is done; its
            gradient is averaged, and each process keeps its own rows of that (ZeRO-3, PyTorch's fully_shard).

Both take the step that one process would take with all the micro-batches. For FSDP, three habits of this model matter:

    alpha = mean|W| (A1)   is of the whole matrix. Inside a block W is whole, gathered in float32: bfloat16 would halve
                           the traffic and round some W / alpha to another ternary value. The quantization loss (A8)
                           reads W outside; there it is a DTensor, whose means PyTorch sums over the processes.
    layer skipping (A5)    may leave a process without samples for a block that the others run and wait for. Then it
                           runs the block all the same, to no effect (model.py:BitSkip.run_block).
    early exit             needs the head after every layer. Head, embedding, gates and adapters belong to the model's
                           outermost shard, gathered once for a forward and backward pass.

A checkpoint has whole tensors, in the layout of one process, whoever wrote it and whoever reads it.
"""
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError


class Processes:
    """The processes that train together: one, or those that torchrun started (gloo on CPU, nccl on CUDA)."""

    def __init__(self, device):
        self.rank, self.world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
        self.device = device
        if self.world > 1:
            if device.type == 'cuda':
                self.device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
                torch.cuda.set_device(self.device)
            # DDP imports this; if that came after the next line, its functions' defaults would keep the group for good
            from torch.distributed.nn import functional  # noqa: F401
            dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')

    @property
    def is_main(self):
        return self.rank == 0

    def sum(self, tensor):
        """The sum over all processes, in place, the same on each."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag):
        """Whether `flag` is true in one of them: a bool, the same on each."""
        return self.sum(torch.tensor(float(flag), device=self.device)).item() > 0

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def first_then_all(self, work):
        """What work() returns in each process; the main one does it first, and the others find it done. If it fails
        there with a UserError, these end without a word."""
        error = result = None
        try:
            result = work() if self.is_main else None
        except UserError as failure:
            error = failure
        if self.any(error is not None):
            raise error or SystemExit(2)
        return result if self.is_main else work()

    def close(self):
        """Wait for all, then stop the threads that exchange tensors: one that drops a tensor while Python shuts down
        aborts its process."""
        self.barrier()
        if self.world > 1:
            dist.destroy_process_group()


def replicate(model):
    """`model` under DDP. A block that all samples of a process skip has no gradient there: unused, and no hang.
    Gradients are views of the buckets that are exchanged, not copies, which would be 4 more bytes a parameter."""
    return DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=True)


def shard(model, device):
    """Deal the parameters of a BitSkip `model`, which is on the CPU, out to the processes' devices, in place: each
    becomes a DTensor that holds this process's rows. All processes must call it, and the model, alike."""
    # (imported here because it takes as long as half of torch itself)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, 'exit_cross_entropy')  # enters the model like forward, for evaluation
    model.is_sharded = True


def forget_skipped(blocks, processes):
    """A block that all samples of a step skip has gradient zero under FSDP. In one process it has none, so that AdamW
    leaves weights and moments alone: make it so here."""
    parameters = [p for p in blocks.parameters() if p.grad is not None]
    if parameters:
        used = processes.sum(torch.stack([p.grad.to_local().any() for p in parameters]).float())
        for p, n in zip(parameters, used.tolist()):
            if n == 0:
                p.grad = None


def gathered(state, keep=True):
    """A state_dict, or one tensor of it, with whole tensors on the CPU in place of DTensors; everything else as it is.
    All processes must call it; those with keep=False get None for the tensors, and save the memory."""
    if isinstance(state, dict):
        return {key: gathered(value, keep) for key, value in state.items()}
    if not hasattr(state, 'full_tensor'):
        return state
    whole = state.full_tensor()
    return whole.cpu() if keep else None


def scattered(tensor, like):
    """This process's part of a whole `tensor`, as the DTensor `like` is laid out. Where `like` is no DTensor, or of
    another shape, which load_state_dict will complain of, the tensor itself."""
    if not hasattr(like, 'full_tensor') or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # None: each has it all
