"""The sampler's buffers and graphs, chunked log-probs, checkpointing, LoRA: the same numbers, less
time and memory. The chunked log-probs are held against plain ones over a large vocabulary."""

import math
import re
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, import_file, run_script
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface


@pytest.fixture
def policy(embedded):
    """The embedded policy."""
    return embedded.load_policy(embedded.find_model("POLICY_MODEL"))


@pytest.fixture
def tokenizer(embedded):
    """The embedded policy's tokenizer."""
    return embedded.AutoTokenizer.from_pretrained(embedded.find_model("POLICY_MODEL"))


@pytest.fixture
def rows(embedded, tokenizer):
    """Some training questions with their prompts."""
    rows = embedded.load_rows(embedded.train_datasets, "train_datasets")[:6]
    return embedded.with_prompts(rows, tokenizer, "train_datasets")


def sample(module, policy, tokenizer, rows, **options):
    """A rollout of 4 completions a question, from a seed of its own."""
    return module.sample_groups(policy, tokenizer, rows, 4, torch.Generator().manual_seed(3),
                                **options)


def same_batch(one, other):
    """Whether two rollouts are the same, bit for bit."""
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in (
        "completion_ids", "completion_mask", "sampled_logps", "ended", "prompt_index"))


# ---------------------------------------------------------------------------- log-probs in tiles


def plain_scores(states, weight, ids, temperature):
    """Log-probs and entropy by way of all logits."""
    logits = states @ weight.T / temperature
    logps = torch.log_softmax(logits, -1)
    return logps.gather(1, ids[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


@pytest.mark.parametrize("vocabulary, at_once", [(50, 2**25), (1000, 64), (1000, 1700),
                                                 (40_000, 2**14), (151_936, 2**16)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tiles_give_the_plain_values_and_gradients(gspo, vocabulary, at_once, temperature):
    gspo.LOGITS_AT_ONCE, gspo.TEMPERATURE, gspo.DTYPE = at_once, temperature, "float32"
    torch.manual_seed(0)
    states, weight = torch.randn(7, 16), 0.5 * torch.randn(vocabulary, 16)
    ids = torch.randint(vocabulary, (7,))
    ids[0], ids[1] = 0, vocabulary - 1
    found, expected = [], []
    for function, dtype, results in (
            (gspo.TokenScores.apply, torch.float32, found),
            (lambda *a: plain_scores(*a, temperature), torch.float64, expected)):
        a, b = (x.to(dtype, copy=True).requires_grad_() for x in (states, weight))
        logps, entropy = function(a, b, ids)
        (logps * torch.arange(1.0, 8) - 0.3 * entropy.square()).sum().backward()
        results += [logps, entropy, a.grad, b.grad]
    for one, other in zip(found, expected):
        assert (one - other).abs().max() < 1e-5 * other.abs().max().clamp(min=1)


def test_tiles_survive_logits_of_any_size(gspo):
    gspo.LOGITS_AT_ONCE, gspo.DTYPE = 128, "float32"
    states = torch.tensor([[1e4], [-1e4]]).requires_grad_()
    weight = torch.linspace(-1, 1, 500)[:, None]
    logps, entropy = gspo.TokenScores.apply(states, weight, torch.tensor([499, 499]))
    (logps + entropy).sum().backward()
    assert logps[0].item() == pytest.approx(0, abs=1e-3) and logps[1].item() == pytest.approx(-2e4)
    assert entropy.detach().abs().max() < 1e-2 and states.grad.isfinite().all()


def test_a_frozen_head_gets_no_gradient(gspo):
    gspo.DTYPE = "float32"
    states, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4)
    gspo.TokenScores.apply(states, weight, torch.tensor([0, 1, 2]))[0].sum().backward()
    assert states.grad.abs().sum() > 0 and weight.grad is None


def test_in_bfloat16_only_the_inputs_are_rounded(gspo):
    gspo.DTYPE = "bfloat16"
    a, b = torch.randn(5, 64), torch.randn(64, 3)
    exact = a.bfloat16().double() @ b.bfloat16().double()
    assert torch.allclose(gspo.product(a, b).double(), exact, atol=1e-5)
    assert not torch.allclose((a.bfloat16() @ b.bfloat16()).double(), exact, atol=1e-3)


def test_memory_is_flat_in_the_vocabulary(gspo):
    memory = import_file(ROOT / "benchmarks" / "memory.py", "memory")
    gspo.configure(["PROFILE=embedded", "DEVICE=cpu", "LOGITS_AT_ONCE=1048576"])
    shape = memory.SMALL | {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32}

    def above_head(vocabulary, plain):
        peak = memory.megabytes(gspo, shape, "cpu", vocabulary, 2, 64, plain, False)
        return peak - vocabulary * 16 * 4 / 1e6  # the head's own gradient
    small, large = above_head(8_192, False), above_head(151_936, False)
    assert large < 1.3 * small
    assert above_head(151_936, True) > 5 * large  # so that the measure sees what it is to see


def test_checkpointing_changes_memory_and_nothing_else(embedded, tokenizer, rows):
    memory, results = import_file(ROOT / "benchmarks" / "memory.py", "memory"), []
    for on in (False, True):
        embedded.GRADIENT_CHECKPOINTING = on
        model = embedded.load_policy(embedded.find_model("POLICY_MODEL"))
        batch = sample(embedded, model, tokenizer, rows)

        def training_pass():
            logps, entropy = embedded.score_tokens(model, batch)
            (logps - entropy).sum().backward()
        peak = memory.peak_bytes(training_pass)
        results.append((peak, [p.grad for p in model.parameters()]))
    (kept, plain), (less, checkpointed) = results
    assert less < 0.7 * kept
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed))


# --------------------------------------------------------------------------------- the sampler


def test_a_row_does_not_depend_on_what_is_decoded_beside_it(embedded, policy, tokenizer, rows):
    batches = []
    for every in (1, 3, 1000):  # ended rows leave at once, later, never
        embedded.ENDS_EVERY = every
        batches.append(sample(embedded, policy, tokenizer, rows))
    for batch in batches[1:]:
        assert torch.equal(batch.completion_ids, batches[0].completion_ids)
        assert torch.allclose(batch.sampled_logps, batches[0].sampled_logps, atol=1e-5)


def test_the_decoder_is_kept_and_gives_the_same_again(embedded, policy, tokenizer, rows):
    first = sample(embedded, policy, tokenizer, rows)
    decoder = policy.decoder
    sample(embedded, policy, tokenizer, rows[::-1], temperature=0.5)  # other contents in between
    again = sample(embedded, policy, tokenizer, rows)
    assert policy.decoder is decoder and same_batch(first, again)
    sample(embedded, policy, tokenizer, rows[:2])
    assert policy.decoder is not decoder  # another number of rows


class Recorder(TorchDispatchMode):
    """Records the operations on tensors, to be replayed on the very same tensors: what a CUDA graph
    does. A value that the host reads cannot be in a graph: it raises."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function), "the host reads a value of the device"
        assert "nonzero" not in str(function), "a shape depends on values"
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        """Run the operations again; what they had made is overwritten in place."""
        for function, args, kwargs, out in self.calls:
            again = function(*args, **kwargs)
            olds, news = ((x if isinstance(x, (tuple, list)) else (x,)) for x in (out, again))
            for old, new in zip(olds, news):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class FakeGraph:
    """Stands in for torch.cuda.CUDAGraph where there is no GPU."""
    made = 0

    def __init__(self):
        FakeGraph.made += 1
        self.recorder = Recorder()

    def pool(self):
        """No memory pool."""

    def replay(self):
        """Run what was recorded."""
        self.recorder.replay()


def with_fake_graphs(monkeypatch, decoder):
    """Let a CPU decoder believe that it is on a GPU whose graphs are FakeGraphs."""
    @contextmanager
    def capture(graph, pool=None):
        buffers = [v for v in vars(decoder).values() if isinstance(v, torch.Tensor)]
        buffers += decoder.cache.buffers()
        before = [b.clone() for b in buffers]
        with graph.recorder:
            yield
        for buffer, value in zip(buffers, before):  # capturing runs nothing
            buffer.copy_(value)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    decoder.device = torch.device("cuda")


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_p": 0.8}])
def test_a_step_can_be_captured_and_replayed(embedded, policy, tokenizer, rows, monkeypatch,
                                             options):
    expected = [sample(embedded, policy, tokenizer, some, **options) for some in (rows, rows[::-1])]
    decoder, FakeGraph.made = policy.decoder, 0
    with_fake_graphs(monkeypatch, decoder)
    for _ in range(2):  # at first seen, then captured, then only replayed
        for some, wanted in zip((rows, rows[::-1]), expected):
            assert same_batch(sample(embedded, policy, tokenizer, some, **options), wanted)
    assert policy.decoder is decoder and 1 <= FakeGraph.made <= 64
    captured = FakeGraph.made
    sample(embedded, policy, tokenizer, rows, **options)
    assert FakeGraph.made == captured  # the graphs are kept


def test_draw_is_the_inverse_of_the_cumulated_probabilities(gspo):
    torch.manual_seed(0)
    logps = torch.log_softmax(3 * torch.randn(40, 1000), -1)
    chance = torch.rand(40, dtype=torch.float64)
    chance[0], chance[1] = 0.0, 1 - 2**-53
    cumulated = logps.double().exp().cumsum(1)
    expected = (cumulated <= chance[:, None] * cumulated[:, -1:]).sum(1)
    found = gspo.draw(logps, 1.0, 1.0, chance)
    near = (cumulated.gather(1, found[:, None])[:, 0] - chance).abs() < 1e-6
    assert ((found == expected) | near).all() and (found < 1000).all()


def test_draw_never_takes_what_has_no_probability(gspo):
    logps = torch.full((3, 600), -math.inf)
    logps[0, 599], logps[1, 0], logps[2, 300] = 0.0, 0.0, 0.0
    for chance in (0.0, 0.5, 1 - 2**-53):
        found = gspo.draw(logps, 1.0, 1.0, torch.full((3,), chance, dtype=torch.float64))
        assert found.tolist() == [599, 0, 300]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_give_the_same_tokens_on_a_gpu(gspo):
    gspo.configure(["PROFILE=embedded", "DEVICE=cuda"])
    policy = gspo.load_policy(gspo.find_model("POLICY_MODEL"))
    tokenizer = gspo.AutoTokenizer.from_pretrained(gspo.find_model("POLICY_MODEL"))
    rows = gspo.with_prompts(gspo.load_rows(gspo.train_datasets, "train_datasets")[:16], tokenizer,
                             "train_datasets")
    batches = []
    for graphs in (False, True, True, True):
        gspo.CUDA_GRAPHS = graphs
        generator = torch.Generator("cuda").manual_seed(3)
        batches.append(gspo.sample_groups(policy, tokenizer, rows, 8, generator))
    assert all(same_batch(batches[0], batch) for batch in batches[1:])


# ------------------------------------------------------------- What decoding reads, and launches


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("added", [False, True])
def test_grouped_attention_is_attention(gspo, length, added):
    """Query head h attends to the keys of head h // 2; with a mask of booleans, or of what is added
    to the scores."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, n, 8) for heads, n in ((6, length), (3, 9), (3, 9)))
    seen = torch.rand(2, 1, length, 9) > 0.4
    seen[..., 0] = True
    mask = torch.zeros(seen.shape).masked_fill(~seen, -math.inf) if added else seen
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    found, _ = gspo.grouped_attention(AttentionInterface()["sdpa"], module, query, key, value, mask,
                                      scaling=0.3, dropout=0.0)
    assert found.shape == (2, length, 6, 8)
    for head in range(6):
        scores = 0.3 * query[:, head] @ key[:, head // 2].transpose(1, 2)
        weights = scores.masked_fill(~seen[:, 0], -math.inf).softmax(-1)
        torch.testing.assert_close(found[:, :, head], weights @ value[:, head // 2])


def test_decoding_copies_no_keys(embedded, tokenizer, rows):
    """No operation of a rollout makes anything of the size of a layer's keys, whatever transformers
    does with query heads that share them."""
    policy = embedded.load_policy(embedded.find_model("POLICY_MODEL"))
    sample(embedded, policy, tokenizer, rows)
    decoder = policy.decoder
    decoder.drop_ended = lambda: decoder.live  # to the last token, at full width
    kept = {buffer.untyped_storage().data_ptr() for buffer in decoder.cache.buffers()}
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            made.extend((one.numel(), str(function)) for one in tree_leaves(result)
                        if isinstance(one, torch.Tensor)
                        and one.untyped_storage().data_ptr() not in kept)
            return result

    with Watch():
        sample(embedded, policy, tokenizer, rows)
    used = decoder.cache.layers[0].keys[:, :, :decoder.steps].numel()
    assert len(made) > 1000 and max(made)[0] < used, max(made)


def test_fused_norms_are_transformers_norms(embedded):
    """In value, gradient and dtype; and all of them are fused."""
    policy, fused = (embedded.load_policy(embedded.find_model("POLICY_MODEL")) for _ in range(2))
    embedded.fuse_norms(fused)
    norms = [name for name, module in fused.named_modules() if name.endswith("norm")]
    assert len(norms) == 4 * policy.config.num_hidden_layers + 1
    assert all("forward" in vars(fused.get_submodule(name)) for name in norms)
    ids = torch.randint(3, 40, (2, 9))
    for model in (policy, fused):
        model(ids).logits.logsumexp(-1).sum().backward()
    torch.testing.assert_close(fused(ids).logits, policy(ids).logits, rtol=1e-4, atol=1e-4)
    for one, other in zip(fused.parameters(), policy.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)
    one, other = (model.get_submodule("model.layers.0.self_attn.q_norm")
                  for model in (policy, fused))
    states = torch.randn(3, len(one.weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert other(states).dtype == torch.float32
        assert other(states.bfloat16()).dtype == torch.bfloat16
        torch.testing.assert_close(other(states.bfloat16()).float(), one(states), rtol=0.02,
                                   atol=0.02)


# -------------------------------------------------------------------------- bfloat16 and LoRA


def with_lora(embedded, dtype="float32"):
    """The embedded policy with an adapter that is not zero."""
    embedded.LORA_RANK, embedded.LORA_ALPHA, embedded.DTYPE = 4, 8, dtype
    policy = embedded.load_policy(embedded.find_model("POLICY_MODEL"))
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    return policy


def test_the_decoding_copy_follows_the_weights(embedded, tokenizer, rows):
    embedded.DTYPE = "bfloat16"
    policy = embedded.load_policy(embedded.find_model("POLICY_MODEL"))
    sample(embedded, policy, tokenizer, rows)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.01
    sample(embedded, policy, tokenizer, rows)
    copies = dict(policy.decoder.model.named_parameters())
    assert policy.decoder.model is not policy
    for name, parameter in policy.named_parameters():
        assert parameter.dtype == torch.float32 and copies[name].dtype == torch.bfloat16
        assert torch.equal(parameter.bfloat16(), copies[name])


def test_the_decoding_copy_has_the_adapter_merged(embedded, tokenizer, rows):
    policy = with_lora(embedded, "bfloat16")
    sample(embedded, policy, tokenizer, rows)
    merged = dict(policy.decoder.model.named_parameters())
    layer = policy.model.layers[1].mlp.up_proj
    wanted = layer.base_layer.weight + layer.get_delta_weight("default").bfloat16()
    assert torch.allclose(merged["model.layers.1.mlp.up_proj.weight"], wanted, atol=2e-2)
    assert not torch.allclose(wanted, layer.base_layer.weight, atol=2e-2)
    assert set(merged) == {name.replace(".base_layer", "") for name, _ in policy.named_parameters()
                           if "lora_" not in name}


def test_the_reference_of_lora_is_the_base_model(embedded, tokenizer, rows):
    policy = with_lora(embedded)
    batch = sample(embedded, policy, tokenizer, rows)
    embedded.LORA_RANK = 0
    base = embedded.load_policy(embedded.find_model("POLICY_MODEL"), frozen=True)
    embedded.LORA_RANK = 4
    run = type("Run", (), {"policy": policy, "reference": embedded.load_reference(
        type("Run", (), {"policy": policy}))})
    assert run.reference is policy
    adapted = embedded.score_without_grad(policy, batch)
    found = embedded.reference_logps(run, batch)
    assert torch.allclose(found, embedded.score_without_grad(base, batch), atol=1e-5)
    assert (adapted - found).abs().max() > 0.01
    assert torch.equal(adapted, embedded.score_without_grad(policy, batch))  # on again
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


LORA = ["PROFILE=embedded", "DEVICE=cpu", "LORA_RANK=4", "BATCH_SIZE=2", "GROUP_SIZE=4",
        "MINIBATCH=8", "MICRO_BATCH=4", "EVAL_QUESTIONS=4", "EVAL_EVERY=0", "SAVE_EVERY=1",
        "LEARNING_RATE=1e-3"]


def test_lora_saves_its_adapter_and_resumes_exactly(tmp_path):
    done = run_script(*LORA, "MAX_STEPS=3", f"OUTPUT_DIR={tmp_path / 'whole'}")
    assert done.returncode == 0, done.stderr
    assert "M in the adapter, and without it the reference" in done.stdout
    files = {file.name for file in (tmp_path / "whole" / "step_2").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    done = run_script(f"RESUME_FROM={tmp_path / 'whole' / 'step_2'}",
                      f"OUTPUT_DIR={tmp_path / 'rest'}")
    assert done.returncode == 0, done.stderr
    one, other = (load_file(tmp_path / name / "step_3" / "adapter_model.safetensors")
                  for name in ("whole", "rest"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    before = load_file(tmp_path / "whole" / "step_2" / "adapter_model.safetensors")
    assert any(not torch.equal(one[name], before[name]) for name in one)


def test_lora_without_peft_is_one_line(tmp_path):
    hidden = tmp_path / "peft"
    hidden.mkdir()
    (hidden / "__init__.py").write_text("raise ImportError('no peft here')")
    script = tmp_path / "run.py"
    script.write_text(f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r})\n"
                      f"sys.argv[0] = {str(ROOT / 'RL_HAND/gspo/gspo.py')!r}\n"
                      "runpy.run_path(sys.argv[0], run_name='__main__')")
    done = run_script(*LORA, f"OUTPUT_DIR={tmp_path / 'out'}", script=script)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "LORA_RANK=4: the package peft is missing" in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------- what is printed


def test_the_memory_estimate_counts_what_it_says(embedded, policy):
    embedded.DTYPE = "float32"
    run = type("Run", (), {"policy": policy, "reference": policy, "scorers": {}, "eval_rows": [],
                           "trained": {"policy": (policy, None)}})
    parts, count = embedded.memory_estimate(run), sum(p.numel() for p in policy.parameters())
    assert parts["weights"] == parts["gradients"] == pytest.approx(4e-9 * count)
    assert parts["Adam"] == pytest.approx(8e-9 * count)
    assert parts["reference and reward model"] == parts["weights for decoding"] == 0
    assert parts["in all"] == pytest.approx(sum(parts.values()) - parts["in all"])
    cache = embedded.ColumnCache(config=policy.config)
    prompts = embedded.PromptCache(config=policy.config)
    ids = torch.ones(1, 3, dtype=torch.long)
    embedded.run_model(policy, ids, ids, embedded.positions(ids), prompts)
    cache.fill(prompts, torch.zeros(128, dtype=torch.long), 124)
    size = sum(b.numel() * b.element_size() for b in cache.buffers())
    assert parts["keys and values"] == pytest.approx(size / 1e9)
    run.eval_rows = [None] * 10**6  # evaluating needs more than training does
    embedded.EVAL_BATCH = 10**6
    more = embedded.memory_estimate(run)
    assert more["in all"] > 100 * parts["in all"] and more["Adam"] == parts["Adam"]


# ------------------------------------------------------------------------------- where things go


@pytest.mark.parametrize("gpus, given, environment, expected", [
    (1, [], {}, ("cuda", "cuda", "bfloat16")),
    (2, [], {}, ("cuda", "cuda:1", "bfloat16")),
    (2, ["DEVICE=cuda:1"], {}, ("cuda:1", "cuda:1", "bfloat16")),
    (2, ["FROZEN_DEVICE=cuda:0", "DTYPE=float32"], {}, ("cuda", "cuda:0", "float32")),
    (2, ["DEVICE=cpu"], {}, ("cpu", "cpu", "float32")),
    (2, [], {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, ("cuda:1", "cuda:1", "bfloat16")),
    (0, [], {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, ("cpu", "cpu", "float32"))])
def test_where_models_go(gspo, monkeypatch, gpus, given, environment, expected):
    """A second GPU takes what is not trained, unless torchrun gives each process its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    gspo.configure(["PROFILE=embedded", *given])
    assert (gspo.DEVICE, gspo.FROZEN_DEVICE, gspo.DTYPE) == expected


@pytest.mark.parametrize("given, environment", [
    (["DEVICE=cuda:1"], {}), (["FROZEN_DEVICE=cuda:1"], {}),
    ([], {"WORLD_SIZE": "2", "LOCAL_RANK": "1"})])
def test_a_gpu_that_is_not_there_is_one_line(gspo, monkeypatch, given, environment):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="cuda:1: PyTorch finds 1 CUDA GPU; expected cpu, or one"):
        gspo.configure(["PROFILE=embedded", *given])


# ------------------------------------------------------------------------------- the benchmarks


@pytest.mark.parametrize("name, rows", [("rollout", ["generate, eager", "ours", "TRL's rollout"]),
                                        ("training_pass", ["activations kept", "checkpointing"])])
def test_the_benchmarks_run(name, rows):
    """On the small models, a round of a few tokens: they print a table with these rows."""
    done = run_script("ROWS=8", "TOKENS=6", "ROUNDS=1", script=ROOT / "benchmarks" / f"{name}.py")
    assert done.returncode == 0, done.stderr
    for row in rows:
        assert re.search(rf"^\| .*{row} +\| [\d,]+ \|", done.stdout, re.MULTILINE), done.stdout


def test_a_benchmark_refuses_in_one_line():
    done = run_script("ROWS=7", script=ROOT / "benchmarks" / "rollout.py")
    assert done.returncode == 1 and "expected embedded or qwen3-0.6b" in done.stderr
