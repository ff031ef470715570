"""Sampling and scoring in batches: nothing may depend on what a completion is batched with.

The yardstick is a plain forward pass of one sequence, without padding, cache or sharing. The
models are those shipped in data/; no test depends on how well they answer.
"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM,
                          Qwen3MoeConfig, Qwen3MoeForCausalLM)

from conftest import ROOT


@pytest.fixture(scope="module")
def policy():
    """The shipped policy. A test that changes its weights takes a copy."""
    return AutoModelForCausalLM.from_pretrained(ROOT / "data" / "policy", dtype=torch.float32,
                                                attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def tokenizer():
    """The shipped policy's tokenizer."""
    return AutoTokenizer.from_pretrained(ROOT / "data" / "policy")


def questions(gspo, tokenizer, count):
    """`count` held-out questions with prompts of different lengths."""
    rows = gspo.load_rows("eval_datasets", tokenizer)[:count]
    assert len(rows) == count and len({len(row["prompt_ids"]) for row in rows}) > 1
    return rows


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(gspo, model, tokenizer, rows, group_size, seed=0, **options):
    """A rollout whose chance is that of the seed."""
    torch.manual_seed(seed)
    return gspo.sample_groups(model, tokenizer, rows, group_size, **options)


def tokens_of(batch):
    """Each completion's tokens, as lists."""
    return [ids[mask.bool()].tolist()
            for ids, mask in zip(batch.completion_ids, batch.completion_mask)]


def invented_batch(gspo, rows, lengths, vocabulary, seed=0):
    """A Batch of random tokens: `lengths[i]` of them in completion i, and garbage behind them."""
    count, width = len(lengths), max(lengths)
    longest = max(len(row["prompt_ids"]) for row in rows)
    prompts = [[0] * (longest - len(row["prompt_ids"])) + row["prompt_ids"] for row in rows]
    masks = [[0] * (longest - len(row["prompt_ids"])) + [1] * len(row["prompt_ids"])
             for row in rows]
    index = torch.arange(len(rows)).repeat_interleave(count // len(rows))
    return gspo.Batch(
        prompt_index=index, prompt_ids=torch.tensor(prompts)[index],
        prompt_mask=torch.tensor(masks)[index], ended=torch.ones(count, dtype=torch.bool),
        completion_ids=torch.randint(vocabulary, (count, width), generator=generator(seed)),
        completion_mask=torch.tensor([[float(t < n) for t in range(width)] for n in lengths]),
        sampled_logps=torch.zeros(count, width))


def plain_scores(model, batch, temperature=1.0):
    """Log-probs and entropies (B, T) by one unpadded forward pass for each completion."""
    logps, entropies = [torch.zeros_like(batch.completion_mask) for _ in range(2)]
    for i in range(len(batch.ended)):
        prompt = batch.prompt_ids[i][batch.prompt_mask[i].bool()]
        answer = batch.completion_ids[i][batch.completion_mask[i].bool()]
        logits = model(input_ids=torch.cat([prompt, answer])[None]).logits[0].float()
        log_p = torch.log_softmax(logits[len(prompt) - 1:-1] / temperature, -1)
        logps[i, :len(answer)] = log_p.gather(1, answer[:, None])[:, 0]
        entropies[i, :len(answer)] = -(log_p.exp() * log_p).sum(-1)
    return logps, entropies


def gradients(model, loss):
    """The gradient of a loss by all weights, as one vector."""
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad],
                                allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def apart(found, expected):
    """The distance of two vectors, relative to the length of the second."""
    return float((found - expected).norm() / expected.norm())


LENGTHS = [7, 1, 13, 2, 9, 9, 1, 4, 12, 3, 5, 13]  # of four completions of each of three prompts

# ======================================= Log-probabilities =======================================


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_scores_are_those_of_plain_forward_passes(embedded, policy, tokenizer, temperature):
    """A prompt and its completions in one row, prompts of different lengths, completions of one
    token and of all: the same log-probs and entropies, of each token and to each weight."""
    gspo, gspo.TEMPERATURE = embedded, temperature
    batch = invented_batch(gspo, questions(gspo, tokenizer, 3), LENGTHS, policy.config.vocab_size)
    found = gspo.score_tokens(policy, batch)
    expected = plain_scores(policy, batch, temperature)
    for mine, plain in zip(found, expected):
        assert mine.dtype == torch.float32
        # Invented tokens have log-probs down to -20, where float32 rounds by some 1e-5.
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=4e-5)
        assert not mine[batch.completion_mask == 0].any()  # padding: exactly 0
    weights = torch.randn(2, *batch.completion_mask.shape, generator=generator(1))
    slopes = [gradients(policy, (torch.stack(list(scores)) * weights).sum())
              for scores in (found, expected)]
    assert apart(*slopes) < 1e-5


def test_scoring_some_rows_gives_what_scoring_all_gives(embedded, policy, tokenizer):
    """Any choice of equally many rows of a prompt, in any order, also a single one of one token;
    and score_without_grad, whatever MICRO_BATCH."""
    gspo = embedded
    batch = invented_batch(gspo, questions(gspo, tokenizer, 3), LENGTHS, policy.config.vocab_size)
    with torch.no_grad():
        expected = plain_scores(policy, batch)[0]
        for rows in ([0], [1], [6, 5], [2, 9, 7], [11, 8, 3, 1], [7, 6, 5, 4, 3, 2, 1, 0]):
            found = gspo.score_tokens(policy, batch.rows(torch.tensor(rows)))[0]
            torch.testing.assert_close(found, expected[rows], rtol=1e-5, atol=4e-5)
    for gspo.MICRO_BATCH in (1, 5, 12, 100):
        found = gspo.score_without_grad(policy, batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=4e-5)
        assert not found.requires_grad


def test_what_is_in_the_padding_never_matters(embedded, policy, tokenizer):
    """Neither the ids left of a prompt nor those behind the end token: not for log-probs, not for
    loss, gradient or statistics."""
    gspo = embedded
    rows = questions(gspo, tokenizer, 3)
    vocabulary = policy.config.vocab_size
    batch = invented_batch(gspo, rows, LENGTHS, vocabulary)
    noise = torch.randint(vocabulary, batch.prompt_ids.shape, generator=generator(3))
    other = copy.copy(batch)
    other.prompt_ids = torch.where(batch.prompt_mask.bool(), batch.prompt_ids, noise)
    noise = torch.randint(vocabulary, batch.completion_ids.shape, generator=generator(4))
    other.completion_ids = torch.where(batch.completion_mask.bool(), batch.completion_ids, noise)
    assert not torch.equal(other.prompt_ids, batch.prompt_ids)
    assert not torch.equal(other.completion_ids, batch.completion_ids)
    old = plain_scores(policy, batch)[0].detach() + 1e-4
    advantages = torch.randn(12, 1, generator=generator(5)).expand_as(old)
    results = []
    for padded, garbage in ((batch, 0.0), (other, 5.0)):
        logps, entropy = gspo.score_tokens(policy, padded)
        mask = padded.completion_mask
        loss, statistics = gspo.policy_loss(logps, old + garbage * (1 - mask), advantages, mask)
        loss = ((loss - entropy) * gspo.token_weights(mask)).sum()
        results.append((logps, entropy, loss, statistics["ratio/mean"], gradients(policy, loss)))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_logits_at_once_changes_the_memory_and_nothing_else(embedded):
    """The logits of all tokens, B x T x V numbers, never exist at a time, in the backward pass
    neither, for which none are kept; log-probs, entropies and gradients are the single piece's."""
    gspo, vocabulary = embedded, 3000
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(  # its logits are by far the largest thing in it
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, initializer_range=0.3,
        tie_word_embeddings=True)).eval()
    rows = [{"prompt_ids": [5, 6, 7]}, {"prompt_ids": [8, 9]}]
    batch = invented_batch(gspo, rows, [30] * 8, vocabulary)
    weights = torch.randn(2, 8, 30, generator=generator(1))
    results, largest, kept = [], [], []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor
    for gspo.LOGITS_AT_ONCE in (2**26, 20 * vocabulary, 700):
        with Largest() as recorder:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                scores = torch.stack(gspo.score_tokens(model, batch))
            results.append((scores.detach(), gradients(model, (scores * weights).sum())))
        largest.append(recorder.elements)
    assert largest[0] == 8 * 30 * vocabulary  # the recorder sees what it is to see
    assert largest[1] == 20 * vocabulary
    assert largest[2] < largest[1]  # a token at a time: other tensors are larger
    assert max(kept) == 16 * vocabulary  # the head's weight
    for scores, gradient in results[1:]:
        torch.testing.assert_close(scores, results[0][0], rtol=1e-5, atol=1e-5)
        assert apart(gradient, results[0][1]) < 1e-5


# ============================================ Sampling ===========================================


def script_draws(monkeypatch, scripts):
    """Replace the draw: completion i gets the tokens of scripts[i], whatever the model says. Each
    row is told by its chance, here the row's number, which the draw multiplies with the sum of the
    probabilities. Those that have ended must have left."""
    state = SimpleNamespace(step=0)
    monkeypatch.setattr(torch, "rand", lambda rows, group, columns, **_: torch.arange(
        rows * group).double().view(rows, group, 1).expand(rows, group, columns))

    def searchsorted(total, point, right):
        live = (point / total[:, -1:])[:, 0].round().long().tolist()
        assert live == [i for i, script in enumerate(scripts) if state.step < len(script)]
        assert len(total) == len(live)
        tokens = [scripts[i][state.step] for i in live]
        state.step += 1
        return torch.tensor(tokens)[:, None]
    monkeypatch.setattr(torch, "searchsorted", searchsorted)


def test_the_mask_ends_with_the_first_end_token(embedded, policy, tokenizer, monkeypatch):
    """For both of Qwen3's end ids, the second of which is the padding id as well: it is scored
    itself, nothing behind it is; a completion that is cut off has `ended` False."""
    gspo, gspo.MAX_NEW_TOKENS = embedded, 6
    assert sorted(policy.generation_config.eos_token_id) == [0, 2]
    assert tokenizer.eos_token_id == 2 and tokenizer.pad_token_id == 0
    scripts = [[9, 10, 2], [9, 10, 0], [2], [0], [9, 10, 11, 12, 13, 2], [9, 10, 11, 12, 13, 0],
               [9, 10, 11, 12, 13, 14], [9, 10, 11, 12, 13, 14]]
    script_draws(monkeypatch, scripts)
    rows = questions(gspo, tokenizer, 2)
    batch = gspo.sample_groups(policy, tokenizer, rows, 4)
    assert batch.completion_mask.sum(1).tolist() == [len(script) for script in scripts]
    assert tokens_of(batch) == scripts
    assert batch.ended.tolist() == [True] * 6 + [False] * 2
    assert batch.prompt_index.tolist() == [0] * 4 + [1] * 4
    for ids, mask, p in zip(batch.prompt_ids, batch.prompt_mask, batch.prompt_index):
        assert ids[mask.bool()].tolist() == rows[p]["prompt_ids"] and mask[-1] == 1
    padding = batch.completion_mask == 0
    assert (batch.completion_ids[padding] == tokenizer.pad_token_id).all()
    assert not batch.sampled_logps[padding].any() and batch.sampled_logps[~padding].all()
    expected = plain_scores(policy, batch)[0].detach()  # the end tokens' log-probs among them
    torch.testing.assert_close(batch.sampled_logps, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("configured, expected", [(0, [0, 2]), ([5, 0], [0, 2, 5]), (None, [2]),
                                                  (2, [2])])
def test_either_source_of_end_ids_is_enough(embedded, policy, tokenizer, monkeypatch, configured,
                                            expected):
    """The generation config's one id or list, and the tokenizer's."""
    gspo, gspo.MAX_NEW_TOKENS = embedded, 2
    monkeypatch.setattr(policy.generation_config, "eos_token_id", configured)
    tokens = [0, 2, 5, 9]
    script_draws(monkeypatch, [[x] if x in expected else [x, 11] for x in tokens])
    batch = gspo.sample_groups(policy, tokenizer, questions(gspo, tokenizer, 2), 2)
    assert batch.ended.tolist() == [x in expected for x in tokens]


def test_dropping_finished_rows_changes_nothing(embedded, policy, tokenizer, monkeypatch):
    """Completions of 1 to 40 tokens: rows leave many times, and each of the others goes on with
    its own cache, mask and position. Each is compared with being alone."""
    gspo, gspo.MAX_NEW_TOKENS = embedded, 40
    lengths = [1, 40, 2, 3, 40, 5, 8, 13, 1, 21, 34, 39]
    tokens = torch.randint(3, policy.config.vocab_size, (12, 40), generator=generator(1)).tolist()
    scripts = [row[:n - 1] + [2] if n < 40 else row for row, n in zip(tokens, lengths)]
    script_draws(monkeypatch, scripts)
    batch = gspo.sample_groups(policy, tokenizer, questions(gspo, tokenizer, 3), 4)
    assert tokens_of(batch) == scripts
    assert batch.ended.tolist() == [n < 40 for n in lengths]
    expected = plain_scores(policy, batch)[0].detach()
    torch.testing.assert_close(batch.sampled_logps, expected, rtol=1e-5, atol=1e-5)


def test_a_completion_does_not_depend_on_those_beside_it(embedded, policy, tokenizer):
    """All chance is drawn first: fewer questions, a longer limit or another process beside this one
    leave a completion what it was; and the same seed gives the same again, another one another."""
    gspo, rows = embedded, questions(embedded, tokenizer, 4)
    whole = sample(gspo, policy, tokenizer, rows, 4)
    expected = tokens_of(whole)
    assert len({len(ids) for ids in expected}) > 4
    assert tokens_of(sample(gspo, policy, tokenizer, rows, 4)) == expected
    assert tokens_of(sample(gspo, policy, tokenizer, rows, 4, seed=1)) != expected
    some = sample(gspo, policy, tokenizer, rows[:2], 4)
    assert tokens_of(some) == expected[:8]
    torch.testing.assert_close(some.sampled_logps, whole.sampled_logps[
        :8, :some.sampled_logps.shape[1]], rtol=1e-5, atol=1e-5)
    gspo.processes = 2
    for gspo.rank in (0, 1):
        share = sample(gspo, policy, tokenizer, rows[gspo.rank::2], 4)
        assert tokens_of(share) == [expected[4 * p + i] for p in (gspo.rank, gspo.rank + 2)
                                    for i in range(4)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampled_distribution_is_the_scored_one(embedded, policy, tokenizer, temperature):
    """The log-probs noted while sampling are those that are trained: the first ratio is 1."""
    gspo, gspo.TEMPERATURE = embedded, temperature
    batch = sample(gspo, policy, tokenizer, questions(gspo, tokenizer, 4), 8)
    assert batch.sampled_logps.dtype == torch.float32
    assert gspo.behaviour_logps(policy, batch) is batch.sampled_logps
    with torch.no_grad():
        logps = gspo.score_tokens(policy, batch)[0]
    torch.testing.assert_close(logps, batch.sampled_logps, rtol=1e-5, atol=1e-5)
    ones = torch.ones_like(logps)
    ratio = gspo.policy_loss(logps, batch.sampled_logps, ones,
                             batch.completion_mask)[1]["ratio/mean"]
    assert (ratio - 1).abs().max() < 1e-5  # far inside of the clip range of 3e-4


def flat_prompt(model):
    """A prompt, and a temperature at which the next token is spread far beyond 20 candidates."""
    prompts = torch.randint(3, model.config.vocab_size, (16, 6), generator=generator(2))
    with torch.no_grad():
        logits = model(input_ids=prompts).logits[:, -1].float()
    for temperature in (1.0, 1.5, 2.0, 3.0, 5.0, 8.0):
        probs = torch.softmax(logits / temperature, -1)
        tail = 1 - probs.topk(20).values.sum(-1)
        if tail.max() > 0.3:
            best = int(tail.argmax())
            return prompts[best].tolist(), temperature, probs[best]
    raise AssertionError("no flat distribution found")


def test_sampling_follows_the_softmax_and_nothing_else(embedded, policy, tokenizer):
    """The model's generation_config says top_k 20, temperature 0.6 and top_p 0.95; `generate`
    would follow it. Here 4000 first tokens are held against softmax(logits / TEMPERATURE)."""
    gspo, draws = embedded, 4000
    config = policy.generation_config
    assert (config.top_k, config.temperature, config.top_p) == (20, 0.6, 0.95)
    prompt, gspo.TEMPERATURE, probs = flat_prompt(policy)
    gspo.MAX_NEW_TOKENS = 1
    batch = sample(gspo, policy, tokenizer, [{"prompt_ids": prompt}], draws, seed=7)
    counts = torch.bincount(batch.completion_ids[:, 0], minlength=len(probs)).double()
    expected = draws * probs.double()
    common = expected >= 5  # the rest is one cell: few draws are not chi-square distributed
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    chi_square = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    freedom = len(counts) - 1
    assert freedom > 30
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)  # five standard deviations
    # The bound has teeth: the distributions of the generation_config are far outside of it.
    for wrong in (torch.softmax(probs.log() * gspo.TEMPERATURE / 0.6, -1),
                  probs * (probs >= probs.topk(20).values[-1])):
        wrong = draws * (wrong / wrong.sum()).double()
        wrong = torch.cat([wrong[common], wrong[~common].sum()[None]])
        distance = ((wrong - expected) ** 2 / expected.clamp(min=1e-9)).sum()
        assert distance > 10 * math.sqrt(2 * freedom)
    rare = probs < probs.topk(20).values[-1]
    share = rare[batch.completion_ids[:, 0]].float().mean()
    assert share == pytest.approx(float(probs[rare].sum()), abs=0.05)


def test_greedy_is_what_generate_gives(embedded, policy, tokenizer):
    """Token for token, for eight prompts of different lengths."""
    gspo = embedded
    batch = sample(gspo, policy, tokenizer, questions(gspo, tokenizer, 8), 1, temperature=0)
    found = policy.generate(input_ids=batch.prompt_ids, attention_mask=batch.prompt_mask,
                            do_sample=False, max_new_tokens=gspo.MAX_NEW_TOKENS,
                            temperature=None, top_k=None, top_p=None)
    found = found[:, batch.prompt_ids.shape[1]:]
    assert found.shape[1] == batch.completion_ids.shape[1]
    mask = batch.completion_mask.bool()
    assert torch.equal(batch.completion_ids[mask], found[mask])
    assert (found[~mask] == tokenizer.pad_token_id).all()  # `generate` ended there, too
    assert mask.sum(1).min() > 1


def test_a_mixture_of_experts_goes_through_it_all(embedded, tokenizer):
    """Qwen3MoE: sampled, scored, and with gradients in its router and experts."""
    gspo, gspo.MAX_NEW_TOKENS = embedded, 12
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1, initializer_range=0.2,
        eos_token_id=2, pad_token_id=0)).eval()
    batch = sample(gspo, model, tokenizer, questions(gspo, tokenizer, 2), 4)
    logps, entropy = gspo.score_tokens(model, batch)
    expected, expected_entropy = plain_scores(model, batch)
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logps.detach(), batch.sampled_logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-5, atol=1e-5)
    logps.sum().backward()
    norms = {name: float(p.grad.norm()) for name, p in model.named_parameters()}
    assert any("experts" in name for name in norms) and any("gate" in name for name in norms)
    assert min(norms.values()) > 0


# ====================================== Batches in training ======================================


def started_run(gspo, tmp_path, *arguments):
    """A run with a reward that is a number of the text, so that groups differ on any policy."""
    reward = tmp_path / "reward.py"
    reward.write_text("def score(questions, responses, references):\n"
                      "    return [sum(map(ord, text)) % 17 / 16 for text in responses]\n")
    given = {"PROFILE": "embedded", "DEVICE": "cpu", "OUTPUT_DIR": tmp_path / "run",
             "BATCH_SIZE": 4, "GROUP_SIZE": 4, "MINIBATCH": 16, "GSPO_EPOCHS": 1, "MAX_STEPS": 1,
             "REWARD_WEIGHTS": "{'function': 1.0}", "REWARD_FUNCTION": f"{reward}:score"}
    given |= dict(argument.split("=", 1) for argument in arguments)
    return gspo.start([f"{name}={value}" for name, value in given.items()])


def watch(gspo, monkeypatch, run, rate=None):
    """Let `train` do its steps only: no files, no evaluation. Notes each minibatch's gradient and
    loss, and each step's metrics. `rate`: plain gradient descent in place of AdamW."""
    seen = SimpleNamespace(gradients=[], losses=[], metrics=[])
    step = gspo.optimiser_step
    if rate is not None:
        optimizer = torch.optim.SGD(run.policy.parameters(), lr=rate)
        optimizer.param_groups[0]["initial_lr"] = rate
        run.trained["policy"], gspo.MAX_GRAD_NORM = (run.policy, optimizer), 0.0

    def optimiser_step(run, name, meter):
        found = [p.grad.flatten() for p in run.policy.parameters()]
        seen.gradients.append(torch.cat(found).clone())
        mean, before = meter.means()["loss"], len(seen.losses)  # over the minibatches so far
        seen.losses.append(mean * (before + 1) - sum(seen.losses))
        step(run, name, meter)

    monkeypatch.setattr(gspo, "optimiser_step", optimiser_step)
    monkeypatch.setattr(gspo, "finish_step", lambda run, metrics: seen.metrics.append(metrics))
    return seen


def trained_with(gspo, tmp_path, monkeypatch, micro, *arguments):
    """What a step of four minibatches shows with that MICRO_BATCH: answers of unequal length, some
    of them cut off, some of them outside of the clip range."""
    run = started_run(gspo, tmp_path, f"MICRO_BATCH={micro}", "MINIBATCH=8", "GSPO_EPOCHS=2",
                      "CLIP_RANGE=0.004", "ADVANTAGE_TYPE=normalized", "MAX_NEW_TOKENS=30",
                      *arguments)
    with monkeypatch.context() as patch:
        seen = watch(gspo, patch, run, rate=0.03)
        gspo.train(run)
    return seen


def test_micro_batches_change_nothing(embedded, tmp_path, monkeypatch):
    """MICRO_BATCH of one, of parts of groups, of one that no group is a multiple of, of groups and
    of more than there is: the same losses, gradients and metrics."""
    first = trained_with(embedded, tmp_path, monkeypatch, 16)
    assert len(first.gradients) == 4 and len(first.metrics) == 1
    expected, = first.metrics
    assert 0.01 < expected["clip_ratio/region_mean"] < 0.9 and expected["kl"] > 1e-6
    assert 0 < expected["completions/clipped_ratio"] < 1
    for micro in (1, 2, 3, 5, 8, 32):
        seen = trained_with(embedded, tmp_path, monkeypatch, micro)
        assert seen.losses == pytest.approx(first.losses, rel=1e-5, abs=1e-6)
        for found, gradient in zip(seen.gradients, first.gradients, strict=True):
            assert apart(found, gradient) < 1e-5
        for name, value in expected.items():
            if "time" not in name and name != "sampling_logp_difference":
                found = seen.metrics[0][name]
                assert found == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_minibatches_hold_every_completion_once_a_pass(embedded):
    """In new order each pass, a group's completions side by side, all its columns cut alike; and so
    do their micro-batches, with equally many of each prompt."""
    gspo, gspo.GROUP_SIZE = embedded, 4
    rows = [{"prompt_ids": [5, 6, 7]}] * 6
    batch = invented_batch(gspo, rows, [1 + i % 9 for i in range(24)], 50)
    batch.completion_ids = torch.arange(24)[:, None].expand(24, 9).clone()  # a row's own number
    batch.old_logps = batch.advantages = batch.completion_ids.float()
    torch.manual_seed(1)
    for gspo.MINIBATCH in (2, 4, 8, 12, 24):
        pieces = list(gspo.minibatches(batch, 3))
        assert [len(p.prompt_index) for p in pieces] == [gspo.MINIBATCH] * (72 // gspo.MINIBATCH)
        for piece in pieces:
            numbers = piece.completion_ids[:, 0]
            assert torch.equal(piece.prompt_index, numbers // 4)
            assert torch.equal(piece.old_logps[:, 0], numbers.float())
            assert torch.equal(piece.completion_mask.sum(1), 1.0 + numbers % 9)
        order = torch.cat([piece.completion_ids[:, 0] for piece in pieces]).reshape(3, 24)
        assert torch.equal(order.sort(1).values, torch.arange(24).expand(3, 24))
        assert not torch.equal(order[0], order[1]) and not torch.equal(order[1], order[2])
        groups = order.reshape(3, 6, 4) // 4
        assert (groups == groups[..., :1]).all()
        for gspo.MICRO_BATCH in (1, 3, 7, 100):
            micros = [pieces[0].rows(some) for some in gspo.micro_batches(pieces[0])]
            numbers = torch.cat([micro.completion_ids[:, 0] for micro in micros])
            assert torch.equal(numbers.sort().values, pieces[0].completion_ids[:, 0].sort().values)
            for micro in micros:
                assert len(micro.prompt_index) <= gspo.MICRO_BATCH
                counts = micro.prompt_index.unique(return_counts=True)[1]
                assert counts.unique().numel() == 1


def test_the_first_update_is_on_policy_and_the_reference_stays(embedded, tmp_path, monkeypatch):
    """Before the first optimiser step every ratio is 1 and the KL 0; the reference never gets a
    gradient, nor does it move."""
    gspo = embedded
    run = started_run(gspo, tmp_path, "CLIP_RANGE=1e-5")
    before = {name: p.clone() for name, p in run.reference.named_parameters()}
    seen = watch(gspo, monkeypatch, run)
    gspo.train(run)
    metrics, = seen.metrics
    assert abs(metrics["ratio/mean"] - 1) < 1e-6
    assert abs(metrics["kl"]) < 1e-6 and metrics["clip_ratio/region_mean"] == 0
    assert metrics["sampling_logp_difference"] == 0  # float32: the sampler's are the old ones
    for name, p in run.reference.named_parameters():
        assert p.grad is None and torch.equal(p, before[name])
    moved = [not torch.equal(p, before[name]) for name, p in run.policy.named_parameters()]
    assert all(moved)


def test_the_reference_of_lora_is_the_model_without_its_adapter(embedded, policy, tokenizer):
    """The policy itself, switched off for a while: nothing is loaded a second time. Of it only the
    adapter is trained, in float32 whatever the rest is."""
    pytest.importorskip("peft")
    gspo = embedded
    gspo.configure(["PROFILE=embedded", "DEVICE=cpu", "LORA_RANK=4"])
    adapted = gspo.load_policy(gspo.POLICY_MODEL)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    with torch.no_grad():
        for p in trained.values():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator()))
    batch = invented_batch(gspo, questions(gspo, tokenizer, 3), LENGTHS, policy.config.vocab_size)
    run = SimpleNamespace(policy=adapted, state={})
    gspo.prepare(run)
    assert run.reference is None
    before = gspo.score_without_grad(adapted, batch)
    found = gspo.reference_logps(run, batch)
    with torch.no_grad():
        torch.testing.assert_close(found, plain_scores(policy, batch)[0], rtol=1e-5, atol=4e-5)
    assert (before - found).abs().max() > 0.01
    assert torch.equal(before, gspo.score_without_grad(adapted, batch))  # on again
    gspo.DTYPE = "bfloat16"
    assert {p.dtype for p in gspo.load_policy(gspo.POLICY_MODEL).parameters()
            if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("term", ["policy", "entropy", "kl"])
def test_an_update_goes_the_right_way(embedded, tmp_path, monkeypatch, term):
    """One small gradient step of each term alone, on the real policy: the better answers become
    more likely, the entropy rises, the distance to the reference falls."""
    gspo = embedded
    run = started_run(gspo, tmp_path, f"ENTROPY_COEF={float(term == 'entropy')}",
                      f"KL_COEF={float(term == 'kl')}")
    if term != "policy":
        run.scorers["function"] = lambda rows, responses: [0.5] * len(responses)
    if term == "kl":
        noise = generator(5)
        with torch.no_grad():
            for p in run.policy.parameters():
                p += 0.02 * torch.randn(p.shape, generator=noise)
    kept, sample_groups = {}, gspo.sample_groups

    def keeping(*arguments):
        kept["batch"] = sample_groups(*arguments)
        return kept["batch"]
    monkeypatch.setattr(gspo, "sample_groups", keeping)

    def measure():
        with torch.no_grad():
            logps, entropy = gspo.score_tokens(run.policy, batch)
        weights = gspo.token_weights(batch.completion_mask)
        if term == "policy":
            return (logps * batch.advantages * weights).sum()
        if term == "entropy":
            return (entropy * weights).sum()
        return -(gspo.kl_to_reference(logps, batch.old_logps, batch.ref_logps) * weights).sum()
    seen = watch(gspo, monkeypatch, run, rate=0.0)
    gspo.train(run)  # a rate of 0: the gradient, and nothing moves
    batch = kept["batch"]
    assert hasattr(batch, "ref_logps") == (run.reference is not None) == (term == "kl")
    before, gradient = measure(), seen.gradients[0]
    rate = 3e-4 / gradient.norm()
    with torch.no_grad():
        for p, g in zip(run.policy.parameters(),
                        gradient.split([p.numel() for p in run.policy.parameters()])):
            p -= rate * g.view_as(p)
    gain = float(measure() - before)
    assert gain == pytest.approx(float(rate * gradient.norm() ** 2), rel=0.1)  # to first order


# =========================================== bfloat16 ===========================================


def test_bfloat16_rescores_the_old_log_probs(embedded, policy, tokenizer):
    """Arithmetic in bfloat16, log-probs in float32. Decoding and scoring round apart by more than
    the clip range: the old log-probs are scored like the new ones, and the first ratio is 1."""
    gspo, gspo.DTYPE, gspo.MICRO_BATCH, gspo.GROUP_SIZE = embedded, "bfloat16", 16, 4
    batch = sample(gspo, policy, tokenizer, questions(gspo, tokenizer, 4), 4)
    old = gspo.behaviour_logps(policy, batch)
    batch.old_logps = old
    logps, entropy = gspo.score_tokens(policy, batch)
    assert batch.sampled_logps.dtype == old.dtype == logps.dtype == entropy.dtype == torch.float32
    apart_by = (old - batch.sampled_logps).abs().max()
    assert 3e-4 < apart_by < 0.5  # what rescoring is for; and still the same distribution
    gspo.MINIBATCH = 16
    minibatch, = gspo.minibatches(batch, 1)
    with torch.no_grad():
        shuffled = gspo.score_tokens(policy, minibatch)[0]
    for found, some in ((logps, batch), (shuffled, minibatch)):
        mask = some.completion_mask
        ratio = gspo.policy_loss(found, some.old_logps, torch.ones_like(mask), mask)[1]
        assert (ratio["ratio/mean"] - 1).abs().max() < 3e-4
    assert gradients(policy, (logps + entropy).sum()).isfinite().all()
    gspo.DTYPE = "float32"
    assert (gspo.score_tokens(policy, batch)[0] - logps).abs().max() > 1e-4  # it was bfloat16


def test_in_bfloat16_the_head_sums_in_float32(embedded, policy, tokenizer):
    """Neither the head's weights nor its sums are rounded: not in scoring, and not in sampling,
    which happens inside of the autocast. Weights and their gradients stay float32."""
    gspo, gspo.DTYPE = embedded, "bfloat16"
    a, b = torch.randn(5, 64, generator=generator()), torch.randn(3, 64, generator=generator(1))
    with gspo.autocast():
        assert (a @ b.T).dtype == torch.bfloat16  # so that there is something to switch off
        found = gspo.logits_of(a.bfloat16(), b)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), a.bfloat16().double() @ b.double().T, atol=1e-5)
    batch = sample(gspo, policy, tokenizer, questions(gspo, tokenizer, 3), 4)
    weight = policy.get_output_embeddings().weight
    ids = batch.completion_ids[batch.completion_mask.bool()]
    with torch.no_grad():
        states = gspo.states_before(policy, batch)
        exact = torch.log_softmax(states.double() @ weight.double().T, -1)
    exact = exact.gather(1, ids[:, None])[:, 0]
    logps, _ = gspo.score_tokens(policy, batch)
    found = logps[batch.completion_mask.bool()].double()
    assert (found - exact).abs().max() < 2e-5  # rounded to bfloat16 it would be off by 0.03
    logps.sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in policy.parameters())
    policy.zero_grad()


# ====================================== Sentences' rewards ======================================


def answered(gspo, tokenizer, texts, end=True):
    """A Batch of the given answers, each with an end token, of two questions."""
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] + [2] * end for text in texts]
    batch = invented_batch(gspo, [{"prompt_ids": [5]}] * 2, [len(ids) for ids in tokens], 50)
    batch.ended[:] = end
    for i, ids in enumerate(tokens):
        batch.completion_ids[i, :len(ids)] = torch.tensor(ids)
    return batch, tokens


def toy_score(rows, responses):
    """Any function of the text will do; not 0 for an empty one."""
    return [0.25 + sum(map(ord, text)) % 11 + 0.125 * len(text) for text in responses]


ROWS = [{"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}]
ANSWERS = ["4+0=4. 3+9=12. Answer: 12", "Answer: 12", "1-1=0\n2-1=1\nAnswer: 1.", "I think 7.",
           ".", "2+2=4. Answer: 4.", "3. 4. 5. 6", "12"]


def scored_sentences(gspo, tokenizer, texts, end=True):
    """Answers with the sentence of each token, what each sentence added, and their texts."""
    gspo.GROUP_SIZE, gspo.REWARD_WEIGHTS = len(texts) // 2, {"function": 1.0}
    run = SimpleNamespace(tokenizer=tokenizer, scorers={"function": toy_score})
    batch, tokens = answered(gspo, tokenizer, texts, end)
    sentence, added = gspo.sentence_rewards(run, ROWS, batch)
    pieces = []
    for ids, of in zip(tokens, sentence.tolist()):
        of = of[:len(ids)]
        assert of == sorted(of) and set(of) == set(range(of[-1] + 1))
        pieces.append([tokenizer.decode([x for x, k in zip(ids, of) if k == number],
                                        skip_special_tokens=True) for number in range(of[-1] + 1)])
        assert "".join(pieces[-1]) == tokenizer.decode(ids, skip_special_tokens=True)
    return SimpleNamespace(run=run, batch=batch, sentence=sentence, added=added, pieces=pieces,
                           lengths=[len(ids) for ids in tokens])


def test_sentences_end_behind_a_full_stop_or_a_line(embedded, tokenizer):
    """The end token belongs to the last one; a full stop and a line's end are one end, not two."""
    found = scored_sentences(embedded, tokenizer, ANSWERS).pieces
    for pieces in found:
        assert all(piece.strip() for piece in pieces)  # none holds nothing but the end token
        assert all(piece.rstrip(" ")[-1] in ".\n" for piece in pieces[:-1])
    assert found[0] == ["4+0=4.", " 3+9=12.", " Answer: 12"]
    assert found[2] == ["1-1=0\n", "2-1=1\n", "Answer: 1."]
    found = scored_sentences(embedded, tokenizer, ["1-1=0.\n2-1=1.\n\nAnswer: 1.\n"] * 2).pieces
    assert [piece.strip() for piece in found[0]] == ["1-1=0.", "2-1=1.", "Answer: 1."]


@pytest.mark.parametrize("last", ["56", "5", "Answer"])  # the last two are a token each
def test_a_truncated_answer_keeps_its_last_sentence(embedded, tokenizer, last):
    """Where there is no end token, a last sentence of a single token is one, too."""
    found = scored_sentences(embedded, tokenizer, [f"3\n4\n{last}"] * 2, end=False).pieces
    assert found[0] == ["3\n", "4\n", last]


def test_sentences_rewards_add_up(embedded, tokenizer):
    """A sentence's reward is what it added: together, the answer's less an empty answer's. One that
    is not there added 0."""
    gspo, seen = embedded, scored_sentences(embedded, tokenizer, ANSWERS)
    whole = torch.tensor(toy_score(None, ANSWERS))
    empty, = toy_score(None, [""])
    torch.testing.assert_close(seen.added.sum(1), whole - empty)
    assert seen.added.shape == (8, 4)  # "3. 4. 5. 6"
    for i, pieces in enumerate(seen.pieces):
        scores = toy_score(None, ["".join(pieces[:k]) for k in range(len(pieces) + 1)])
        added = [after - before for before, after in zip(scores, scores[1:])]
        assert seen.added[i].tolist() == pytest.approx(added + [0.0] * (4 - len(added)), abs=1e-5)
    advantages = gspo.compute_advantages(seen.added)
    torch.testing.assert_close(advantages.unflatten(0, (2, 4)).sum(1), torch.zeros(2, 4),
                               rtol=0, atol=1e-5)  # each sentence against the others' same one
    gspo.USE_SEQUENCE_LEVEL_REWARD = False
    by_token = gspo.token_advantages(seen.run, ROWS, seen.batch, whole)
    assert by_token.isfinite().all() and by_token.shape == seen.batch.completion_mask.shape
    for i, length in enumerate(seen.lengths):
        expected = [float(advantages[i, k]) for k in seen.sentence[i, :length]]
        assert by_token[i, :length].tolist() == expected
    assert by_token[6, :seen.lengths[6]].unique().numel() == 4


def test_single_sentences_are_sequence_level(embedded, tokenizer):
    """Answers of one sentence each have the relative advantages that whole answers have."""
    gspo = embedded
    texts = ["Answer: 12", "12", "no dots", "7+8 = 3.", "x", "9 9", "I think it is 4.", "?"]
    seen = scored_sentences(gspo, tokenizer, texts)
    assert seen.added.shape == (8, 1)
    rewards, _ = gspo.score_completions(seen.run, ROWS, seen.batch)
    results = []
    for gspo.USE_SEQUENCE_LEVEL_REWARD in (True, False):
        results.append(gspo.token_advantages(seen.run, ROWS, seen.batch, rewards))
        assert results[-1].shape == seen.batch.completion_mask.shape
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert torch.equal(results[0][:, 0], gspo.compute_advantages(rewards))
    assert results[0].abs().max() > 0.1
