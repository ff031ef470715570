"""A model without contents: what it allocates is counted, nothing is computed."""

import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Adds up the bytes of all tensors that operations make, as long as they live; `most`."""

    def __init__(self, known):
        super().__init__()
        self.now = self.most = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self.free, storage._cdata)
        return out

    def free(self, key):
        """The storage is gone."""
        self.now -= self.sizes.pop(key)


def allocated(function, model):
    """The most bytes at a time that `function` allocates beside a fake model's parameters and their
    gradients, real tensors included."""
    known = [x for p in model.parameters() for x in (p, p.grad) if x is not None]
    with Allocations(known) as allocations:
        function()
    return allocations.most


def make_fake(model):
    """Fake tensors on the CPU in place of a model's parameters (with gradients) and buffers."""
    made = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, old in tensors.items():
                    if old is not None and id(old) not in made:  # tied ones stay tied
                        new = made[id(old)] = torch.empty_like(old, device="cpu")
                        if old.requires_grad:
                            made[id(old)] = torch.nn.Parameter(new)
                            made[id(old)].grad = torch.empty_like(new)
                    tensors[name] = made.get(id(old))
    return model
