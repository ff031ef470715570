"""What a GPU would refuse, known without one: gspo.py runs on a "cuda" that is only pretended.

Each operation on a pretended tensor is done twice: as a fake tensor of PyTorch, which knows that it
is on cuda:0 and refuses what a GPU would (another device, another dtype), and on the CPU, for the
values. It needs a CUDA build of PyTorch, but no GPU: a CPU build knows no cuda tensors that require
a gradient. What it cannot know: speed, memory, numerics, and which attention kernel is taken.
"""

from collections import defaultdict

import pandas as pd
import pytest
import torch
from conftest import ROOT, import_file
from torch._subclasses.fake_tensor import (DataDependentOutputException,
                                           DynamicOutputShapeException, FakeTensor, FakeTensorMode)
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None or torch.cuda.is_available(),
    reason="needs a CUDA build of PyTorch (pip install torch==2.11.0) on a machine without a GPU")


class Pretend(TorchDispatchMode):
    """Tensors on "cuda" that are fake tensors with their value, a CPU tensor, beside them."""

    def __init__(self):
        super().__init__()
        self.fake, self.calls = FakeTensorMode(allow_non_fake_inputs=True), defaultdict(int)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = (args, kwargs or {})
        leaves = tree_leaves(given)
        if not any(isinstance(x, FakeTensor) or isinstance(x, torch.device) and x.type == "cuda"
                   for x in leaves):
            return function(*given[0], **given[1])
        self.calls[str(function)] += 1
        if function is torch.ops.aten.index.Tensor and not isinstance(args[0], FakeTensor):
            raise RuntimeError("indices should be on the same device as the indexed tensor (cpu)")
        values = tree_map(value_of, given)
        try:
            args, kwargs = tree_map(self.as_fake, given)
            with self.fake:
                faked = function(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            device = next(x.device for x in leaves if isinstance(x, FakeTensor))
            return tree_map(lambda x: with_value(self.as_fake(x, device), x),
                            function(*values[0], **values[1]))
        return tree_map(with_value, faked, function(*values[0], **values[1]))

    def as_fake(self, x, device="cpu"):
        """A fake tensor in place of a real one; anything else as it is."""
        if not isinstance(x, torch.Tensor) or isinstance(x, FakeTensor):
            return x
        with self.fake:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)


def value_of(x):
    """What the CPU gets in place of an argument."""
    if isinstance(x, FakeTensor):
        x.value = x.value.to(x.dtype)  # `x.data = x.data.float()` changes the tensor unseen
        return x.value
    return torch.device("cpu") if isinstance(x, torch.device) else x


def with_value(faked, value):
    """The pretended tensor with its value; what is no longer on the GPU is the value itself."""
    if not isinstance(faked, FakeTensor):
        return faked
    assert faked.shape == value.shape or not faked.numel()  # logsigmoid's buffer, on the CPU alone
    if faked.device.type == "cpu":
        return value
    faked.value = value.to(faked.dtype)  # a layer norm's statistics are float32 on CUDA alone
    return faked


def run_backward(outputs, gradients, keep, create, inputs=(), allow_unreachable=True,
                 accumulate_grad=False):
    """autograd's engine in Python: the real one asks the driver for streams. The backward functions
    themselves are the real ones."""
    gathered, order, seen, found = defaultdict(dict), [], set(), {}

    def pass_on(node, number, gradient):
        if node is None or gradient is None:
            return
        wanted = node._input_metadata[number]
        gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
        assert gradient.device == wanted.device
        before = gathered[node].get(number)
        gathered[node][number] = gradient if before is None else before + gradient

    def visit(node):
        stack = [(node, False)]
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
            elif node is not None and node not in seen:
                seen.add(node)
                stack += [(node, True), *((after, False) for after, _ in node.next_functions)]

    with torch.no_grad():
        for output, gradient in zip(outputs, gradients):
            edge = get_gradient_edge(output)
            visit(edge.node)
            pass_on(edge.node, edge.output_nr, gradient)
        for node in reversed(order):
            if node not in gathered:
                continue
            here = gathered.pop(node)
            found |= {(node, number): gradient for number, gradient in here.items()}
            if node.name().endswith("AccumulateGrad") and not accumulate_grad:
                continue
            results = getattr(node, "apply", node)(*map(here.get, range(len(node._input_metadata))))
            for edge, gradient in zip(node.next_functions, results if type(results) is tuple
                                      else (results,)):
                pass_on(*edge, gradient)
    return tuple(found.get(tuple(get_gradient_edge(x))[:2]) for x in inputs)


def move(module, function, recurse=True):
    """Module.to for pretended tensors: new parameters, tied ones together."""
    moved = {}
    for each in module.modules():
        for tensors in (each._parameters, each._buffers):
            for name, old in tensors.items():
                if old is not None and id(old) not in moved:
                    new = function(old.detach())
                    moved[id(old)] = (
                        old if (new.device, new.dtype) == (old.device, old.dtype) else
                        torch.nn.Parameter(new, old.requires_grad) if tensors is each._parameters
                        else new)
                tensors[name] = moved.get(id(old))
    return module


@pytest.fixture
def pretend(monkeypatch):
    """Two pretended GPUs, while the test runs."""
    for name, value in {"_lazy_init": None, "device_count": 2,
                        "set_device": None, "synchronize": None, "get_device_name": "none",
                        "max_memory_allocated": 0, "is_bf16_supported": True,
                        "is_current_stream_capturing": False}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.autograd, "_engine_run_backward", run_backward)
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 1)  # for checkpointing
    monkeypatch.setattr(FakeTensor, "__format__", lambda x, spec: format(x.item(), spec))
    monkeypatch.setattr(torch.nn.Module, "_apply", move)
    torch._C._jit_set_texpr_fuser_enabled(False)  # DeBERTa's scripted functions would be compiled
    torch._C._ensureCUDADeviceGuardSet()  # one that asks no driver for the current device
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda"): by way of the CPU
    with Pretend() as mode:
        yield mode
    torch._C._set_only_lift_cpu_tensors(False)


SMALL = ["PROFILE=embedded", "DEVICE=cuda", "FROZEN_DEVICE=cuda", "DTYPE=bfloat16", "BATCH_SIZE=2",
         "GROUP_SIZE=2", "MINIBATCH=2", "MICRO_BATCH=2", "GSPO_EPOCHS=1", "MAX_NEW_TOKENS=8",
         "EVAL_QUESTIONS=1", "EVAL_EVERY=0", "MAX_STEPS=1"]


def two_evaluations_and_a_step(script, folder, *given):
    """Run a script from the command line to its metrics, which are returned. Files of weights are
    not written: that reads memory which a pretended tensor does not have."""
    script.save_checkpoint = lambda *_: None
    known = [constant for constant in SMALL if constant.split("=")[0] in script.DEFAULTS]
    script.main([*known, f"OUTPUT_DIR={folder}", *given])
    return pd.read_csv(folder / "metrics.csv")


@pytest.mark.parametrize("given", [
    [], ["LORA_RANK=4"], ["GRADIENT_CHECKPOINTING=True", "LOGITS_AT_ONCE=8192"],
    ["FROZEN_DEVICE=cuda:1", "USE_SEQUENCE_LEVEL_REWARD=False", "USE_TOKEN_LEVEL_LOSS=True"]])
def test_a_gpu_would_not_refuse(gspo, pretend, tmp_path, given):
    """Sampling, rewards, loss, backward and AdamW; with the frozen models beside or elsewhere."""
    metrics = two_evaluations_and_a_step(gspo, tmp_path / "run", *given)
    assert metrics["grad_norm"].iloc[-1] > 0
    assert pretend.calls["aten.mm.default"] and pretend.calls["aten._fused_adamw_.default"]


def test_values_are_those_of_the_cpu(gspo, pretend, tmp_path):
    """In float32, with the frozen models on the CPU; so the pretended run is the algorithm."""
    found, expected = (two_evaluations_and_a_step(gspo, tmp_path / device, f"DEVICE={device}",
                                                  "FROZEN_DEVICE=cpu", "DTYPE=float32")
                       for device in ("cuda", "cpu"))
    measured = [name for name in expected if not name.startswith("time/") and name != "step_time"]
    pd.testing.assert_frame_equal(found[measured], expected[measured], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, spoiled", [
    ("run_model", lambda original: lambda model, ids, mask, place, *cache: original(
        model, ids, mask, place.cpu(), *cache)),
    ("checked_scores", lambda original: lambda *given: original(*given).cpu()),
    ("token_weights", lambda original: lambda mask: original(mask.cpu())),
    ("logits_of", lambda original: lambda states, weight: states.bfloat16() @ weight.T),
])
def test_a_fault_is_noticed(gspo, pretend, tmp_path, name, spoiled):
    """Planted: a tensor that stayed on the CPU; a product of two dtypes."""
    setattr(gspo, name, spoiled(getattr(gspo, name)))
    with pytest.raises((RuntimeError, SystemExit), match="device|dtype"):
        two_evaluations_and_a_step(gspo, tmp_path / "run")


@pytest.mark.parametrize("name, given", [
    ("grpo", []), ("dapo", ["OVERLONG_CACHE=2"]), ("ppo", []),
    ("reinforce", ["MINIBATCH=4"]), ("gmpo", []), ("cispo", []),
    ("moe", ["POLICY_MODEL=data/policy_experts", "BALANCE_COEF=0.01", "MAX_NEW_TOKENS=3"]),
    ("gad", ["MAX_STEPS=3", "SEQKD_STEPS=1", "SEQKD_BATCH=2", "CRITIC_WARMUP=1", "WARMUP_BATCH=2",
             "GAD_EPOCHS=1", "MAX_NEW_TOKENS=40"]),
    ("self_play", ["TRAIN_BATCH_SIZE=2", "SAMPLE_AT_ONCE=1", "ROLLOUT_N=2", "TOTAL_EPOCHS=1",
                   "SELF_PLAY_ROUNDS=2", "WATCH_QUESTIONS=1"])])
def test_nor_the_other_scripts(pretend, tmp_path, name, given):
    """A step of each, or one of each stage; of self-play, two rounds. Of eight layers with experts
    the first two, and one expert after the other: what transformers does on a GPU with all at once
    has no values on the CPU."""
    script = import_file(ROOT / "RL_HAND" / name / f"{name}.py", name)
    load = script.load_policy

    def load_two_layers(*given, **options):
        model = load(*given, **options)
        model.set_experts_implementation("eager")
        del model.model.layers[2:]
        model.config.num_hidden_layers = 2
        return model
    script.load_policy = load_two_layers if name == "moe" else load
    metrics = two_evaluations_and_a_step(script, tmp_path / "run", *given)
    assert metrics["step"].iloc[-1] >= 1


@pytest.mark.parametrize("part, options", [("greedy", ["bfloat16"]), ("training", []),
                                           ("whole_step", [True]), ("rollout", [8])])
def test_nor_the_benchmark(pretend, monkeypatch, part, options):
    """What benchmarks/gpu.py does, at a tiny size."""
    for name in ("reset_peak_memory_stats", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    gpu = import_file(ROOT / "benchmarks" / "gpu.py", "gpu")
    assert dict(getattr(gpu, part)(gpu.SHAPES["tiny"], "cuda", *options))
