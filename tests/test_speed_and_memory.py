"""The head in pieces, checkpointing, adapters, the draw: the same numbers in less memory. The
pieces are held against plain log-probs over a large vocabulary, in float64."""

import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, import_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@pytest.fixture
def policy(embedded):
    """The embedded policy."""
    return embedded.load_policy(embedded.POLICY_MODEL)


@pytest.fixture
def tokenizer(embedded):
    """The embedded policy's tokenizer."""
    return embedded.load(embedded.AutoTokenizer, embedded.POLICY_MODEL, "POLICY_MODEL")


def sample(gspo, policy, tokenizer):
    """A rollout of 4 completions for each of 6 questions, always the same."""
    torch.manual_seed(3)
    return gspo.sample_groups(policy, tokenizer, gspo.load_rows("train_datasets", tokenizer)[:6], 4)


# ------------------------------------------------------------------------- the head in pieces


def plain_scores(states, weight, ids, temperature):
    """Log-probs and entropy by way of all logits."""
    logps = torch.log_softmax(states @ weight.T / temperature, -1)
    return logps.gather(1, ids[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


def scores_of(gspo, states, weight, ids):
    """What `score_tokens` makes of these states: it sees a completion, and a model with this head.
    """
    gspo.states_before = lambda model, batch: states
    model = SimpleNamespace(get_output_embeddings=lambda: SimpleNamespace(weight=weight))
    batch = gspo.Batch(completion_ids=ids[None], completion_mask=torch.ones(1, len(ids)))
    return [scores[0] for scores in gspo.score_tokens(model, batch)]


@pytest.mark.parametrize("vocabulary, at_once", [(50, 2**25), (1000, 64), (1000, 2500),
                                                 (40_000, 2**14), (151_936, 2**18)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_pieces_give_the_plain_values_and_gradients(gspo, vocabulary, at_once, temperature):
    gspo.LOGITS_AT_ONCE, gspo.TEMPERATURE, gspo.DTYPE = at_once, temperature, "float32"
    torch.manual_seed(0)
    states, weight = torch.randn(7, 16), 0.5 * torch.randn(vocabulary, 16)
    ids = torch.randint(vocabulary, (7,))
    ids[0], ids[1] = 0, vocabulary - 1
    found, exact = [], []
    for function, dtype, results in (
            (lambda *a: scores_of(gspo, *a), torch.float32, found),
            (lambda *a: plain_scores(*a, temperature), torch.float64, exact)):
        a, b = (x.to(dtype, copy=True).requires_grad_() for x in (states, weight))
        logps, entropy = function(a, b, ids)
        (logps * torch.arange(1.0, 8) - 0.3 * entropy.square()).sum().backward()
        results += [logps, entropy, a.grad, b.grad]
    for one, other, tolerance in zip(found, exact, (1e-6, 1e-5, 1e-4, 1e-5)):
        # of the states' gradient the largest: log_softmax sums 150,000 numbers in float32
        assert (one - other).abs().max() < tolerance * other.abs().max().clamp(min=1)


def test_pieces_survive_logits_of_any_size(gspo):
    gspo.LOGITS_AT_ONCE, gspo.DTYPE = 128, "float32"
    states = torch.tensor([[1e4], [-1e4]]).requires_grad_()
    weight = torch.linspace(-1, 1, 500)[:, None]
    logps, entropy = scores_of(gspo, states, weight, torch.tensor([499, 499]))
    (logps + entropy).sum().backward()
    assert logps[0].item() == pytest.approx(0, abs=1e-3) and logps[1].item() == pytest.approx(-2e4)
    assert entropy.detach().abs().max() < 1e-2 and states.grad.isfinite().all()


def test_a_frozen_head_gets_no_gradient(gspo):
    gspo.DTYPE = "float32"
    states, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4)
    scores_of(gspo, states, weight, torch.tensor([0, 1, 2]))[0].sum().backward()
    assert states.grad.abs().sum() > 0 and weight.grad is None


# ------------------------------------------------------------------------------ less memory


def test_checkpointing_changes_memory_and_nothing_else(embedded, tokenizer):
    memory, results = import_file(ROOT / "benchmarks" / "memory.py", "memory"), []
    for on in (False, True):
        embedded.GRADIENT_CHECKPOINTING = on
        model = embedded.load_policy(embedded.POLICY_MODEL)
        batch = sample(embedded, model, tokenizer)
        peak = memory.peak_bytes(lambda: memory.training_pass(embedded, model, batch))
        results.append((peak, [p.grad for p in model.parameters()]))
    (kept, plain), (less, checkpointed) = results
    assert less < 0.7 * kept
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed))


def test_adapters_are_float32_beside_a_frozen_bfloat16_model(embedded, tokenizer):
    pytest.importorskip("peft")
    embedded.configure(["PROFILE=embedded", "DEVICE=cpu", "LORA_RANK=4", "DTYPE=bfloat16"])
    policy = embedded.load_policy(embedded.POLICY_MODEL)
    for name, parameter in policy.named_parameters():
        trained = "lora_" in name
        assert parameter.requires_grad == trained
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16), name
    logps, _ = embedded.score_tokens(policy, sample(embedded, policy, tokenizer))
    logps.sum().backward()
    gradients = [p.grad for p in policy.parameters() if p.requires_grad]
    assert all(g.dtype == torch.float32 for g in gradients)
    assert any(g.abs().sum() > 0 for g in gradients)


def test_lora_without_peft_is_one_line(embedded, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    embedded.LORA_RANK = 4
    with pytest.raises(SystemExit, match="LORA_RANK=4: .*; expected .*pip install peft"):
        embedded.load_policy(embedded.POLICY_MODEL)


# ------------------------------------------------------------------------------- the sampler


def drawn(gspo, policy, tokenizer, monkeypatch, logits, chance):
    """The first tokens of a rollout whose logits are these, (n, V), and its chance this, (n,)."""
    n, vocabulary = logits.shape
    monkeypatch.setattr(gspo, "logits_of", lambda states, weight: logits)
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype: chance.to(dtype).view(shape))
    monkeypatch.setattr(policy, "get_output_embeddings",
                        lambda: SimpleNamespace(weight=torch.zeros(vocabulary, 1)))
    batch = gspo.sample_groups(policy, tokenizer, [{"prompt_ids": [5]}], n, length=1)
    expected = torch.log_softmax(logits, -1).gather(1, batch.completion_ids)
    assert torch.equal(batch.sampled_logps, expected)
    return batch.completion_ids[:, 0]


def test_a_draw_is_the_inverse_of_the_cumulated_probabilities(embedded, policy, tokenizer,
                                                              monkeypatch):
    """Also just beside an edge between two tokens, which float32 would not tell apart."""
    torch.manual_seed(0)
    embedded.WIDE = torch.float64  # as it is but for Apple's GPUs
    for vocabulary in (1000, 150_000):
        logits = torch.randn(40, vocabulary)
        cumulated = torch.log_softmax(logits, -1).exp().double().cumsum(1)
        cumulated /= cumulated[:, -1:].clone()
        chance = torch.rand(40, dtype=torch.float64)
        chance[0], chance[1] = 0.0, 1 - 2**-53
        edge = cumulated.gather(1, torch.randint(vocabulary - 1, (40, 1)))[:, 0]
        for chance in (chance, edge - 1e-11, edge + 1e-11):
            expected = (cumulated <= chance[:, None]).sum(1)
            found = drawn(embedded, policy, tokenizer, monkeypatch, logits, chance)
            assert torch.equal(found, expected)


def test_a_draw_never_takes_what_has_no_probability(embedded, policy, tokenizer, monkeypatch):
    logits = torch.full((3, 600), -math.inf)
    logits[0, 599], logits[1, 0], logits[2, 300] = 0.0, 0.0, 0.0
    for chance in (0.0, 0.5, 1 - 2**-53):
        found = drawn(embedded, policy, tokenizer, monkeypatch, logits,
                      torch.full((3,), chance, dtype=torch.float64))
        assert found.tolist() == [599, 0, 300]


def test_in_bfloat16_a_rollout_casts_each_weight_once(embedded, policy, tokenizer):
    embedded.DTYPE = "bfloat16"
    sizes = {p.shape for p in policy.parameters() if p.ndim == 2}
    casts = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if re.match("aten._to_copy|aten.copy_", str(function)):
                casts.extend(x for x in tree_leaves(args[:1]) if isinstance(x, torch.Tensor)
                             and x.shape in sizes and isinstance(x, torch.nn.Parameter))
            return out
    with Watch():
        sample(embedded, policy, tokenizer)
    linear = 7 * policy.config.num_hidden_layers  # the head stays float32
    assert len(casts) == len({id(x) for x in casts}) == linear
