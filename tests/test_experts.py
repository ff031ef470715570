"""data/policy_experts: what its training adds to that of data/policy, and that every script of the
collection trains it. What is shipped, and its figures: test_data.py."""

from collections import Counter

import pandas as pd
import pytest
import torch
from conftest import ROOT, import_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

EXPERTS = ROOT / "data" / "policy_experts"
SCRIPTS = {path.stem: path for path in sorted((ROOT / "RL_HAND").glob("*/*.py"))
           if path.stem == path.parent.name}
SMALL = ["PROFILE=embedded", "DEVICE=cpu", f"POLICY_MODEL={EXPERTS}", "MAX_STEPS=1",
         "BATCH_SIZE=2", "MINIBATCH=16", "MICRO_BATCH=8", "EVAL_QUESTIONS=2", "EVAL_EVERY=0",
         "MAX_NEW_TOKENS=20", "SHOW_SAMPLES=0"]
OWN = {"ppo": ["CRITIC_WARMUP=0"], "self_play": ["WATCH_QUESTIONS=2"],
       "gad": ["SEQKD_STEPS=0", "CRITIC_WARMUP=0", "ENTROPY_COEF=0.01"]}  # its first scores are 0

SYNC = import_file(ROOT / "tools" / "sync.py", "sync_for_experts")
build = import_file(ROOT / "data" / "build.py", "build_with_experts")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EXPERTS)


@pytest.fixture
def policy(tokenizer):
    """An untrained one, whose routers prefer some experts, in each layer others."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build.new_policy("experts", tokenizer).eval()
    for layer in model.model.layers:
        layer.mlp.gate.weight.data *= 20
    return model


@torch.no_grad()
def routed(policy, tokenizer, text):
    """For each layer, what its router says of each token of a text: (probabilities, choices)."""
    found = []
    hooks = [layer.mlp.gate.register_forward_hook(lambda gate, given, out: found.append(
        (out[0].softmax(-1).tolist(), out[2].tolist()))) for layer in policy.model.layers]
    policy(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))
    for hook in hooks:
        hook.remove()
    return found


def alone(model, batch, temperature):
    """transformers' own log-probs of the completion tokens, (n,): each text by itself."""
    found = []
    for prompt, seen, ids, mask in zip(batch.prompt_ids, batch.prompt_mask.bool(),
                                       batch.completion_ids, batch.completion_mask.bool()):
        text = torch.cat([prompt[seen], ids[mask]])
        logits = model(input_ids=text[None]).logits[0, int(seen.sum()) - 1:-1] / temperature
        found.append(logits.log_softmax(-1).gather(1, ids[mask][:, None])[:, 0])
    return torch.cat(found)


# ---- The training ------------------------------------------------------------------------------

def test_each_layer_is_balanced_by_itself(policy, tokenizer):
    """What answer_loss adds is the loss of the Switch Transformer, counted here token by token, of
    each layer, and without the padding; over all layers together it would be another figure."""
    examples = [("Add 1 and 2.", "3."), ("What is 37 plus 48?", "7+8=15 carry 1. 3+4+1=8. 85")]
    texts = [build.chat_prompt(tokenizer, q) + a + build.END for q, a in examples]
    layers = [[], [], [], [], [], [], [], []]  # in each (probabilities, choices) of all tokens
    for text in texts:
        for layer, (probabilities, choices) in zip(layers, routed(policy, tokenizer, text)):
            layer += zip(probabilities, choices)

    def imbalance(tokens):
        """1 if balanced: the number of experts times the sum of share times mean probability."""
        used = Counter(expert for _, choices in tokens for expert in choices)
        return 32 * sum(used[expert] / used.total() * sum(p[expert] for p, _ in tokens)
                        for expert in range(32)) / len(tokens)

    expected = sum(imbalance(tokens) for tokens in layers)
    together = 8 * imbalance(sum(layers, []))
    assert expected > 1.2 * together > 8

    with torch.no_grad():
        added = build.answer_loss(policy, tokenizer, examples)
        words = [(policy(input_ids=ids).logits[0, :-1], ids[0, 1:]) for ids in (
            tokenizer(text, return_tensors="pt")["input_ids"] for text in texts)]
    lengths = [len(tokenizer(a + build.END)["input_ids"]) for _, a in examples]
    logits, targets = (torch.cat([pair[i][-n:] for pair, n in zip(words, lengths)]) for i in (0, 1))
    added = added - F.cross_entropy(logits, targets)
    assert build.BALANCE == 0.01 and added.item() == pytest.approx(0.01 * expected, abs=1e-4)


def test_effective_experts_are_counted_as_defined(policy, tokenizer):
    """Over the tokens from which responses are predicted, by a count of each text by itself."""
    texts = {("Add 1 and 2.", "3."): 230,  # the other one in a second batch, too
             ("What is 37 plus 48?", "7+8=15 carry 1. 3+4+1=8. Answer: 85"): 40}
    table = pd.DataFrame([text for text, times in texts.items() for _ in range(times)],
                         columns=["question", "response"])
    used = [Counter() for _ in policy.model.layers]
    for (question, response), times in texts.items():
        said = len(tokenizer(response + build.END)["input_ids"])
        text = build.chat_prompt(tokenizer, question) + response + build.END
        for count, (_, choices) in zip(used, routed(policy, tokenizer, text)):
            count.update(times * [expert for token in choices[-said - 1:-1] for expert in token])
    shares = [torch.tensor([n / count.total() for n in count.values()]) for count in used]
    expected = [(-share * share.log()).sum().exp().item() for share in shares]
    assert build.effective_experts(policy, tokenizer, table) == pytest.approx(expected, rel=1e-4)
    assert len({round(each, 2) for each in expected}) > 4  # so that an order of layers shows
    for layer in policy.model.layers:
        layer.mlp.gate.weight.data.zero_()  # a tie of all: the same two for every token
    assert build.effective_experts(policy, tokenizer, table[:2]) == pytest.approx([2] * 8)


# ---- The scripts -------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_trains_it(name, tmp_path):
    """Log-probs of sampler and trainer are those of transformers alone; one step, by `main`, moves
    routers and experts."""
    torch.set_num_threads(1)
    script, fresh = import_file(SCRIPTS[name]), AutoModelForCausalLM.from_pretrained(
        EXPERTS, dtype=torch.float32).eval()
    train, changed = script.train, {}

    def checked(run):
        assert all(weight.dtype == torch.float32 for weight in run.policy.parameters())
        with torch.no_grad():
            batch = script.sample_groups(run.policy, run.tokenizer, run.train_rows[:2], 8)
            temperature = getattr(script, SYNC.renamed("TEMPERATURE", name))
            own, real = alone(fresh, batch, temperature), batch.completion_mask.bool()
            assert len(own) > 100
            for ours in (script.score_tokens(run.policy, batch)[0], batch.sampled_logps):
                apart = (ours[real] - own).abs()  # now and then a near tie of two experts turns
                assert apart.quantile(0.9) < 1e-4 and apart.clamp(max=1).mean() < 1e-3
        train(run)
        before = fresh.state_dict()
        changed.update((each, bool((after != before[each]).any()))
                       for each, after in run.policy.state_dict().items())

    script.train, script.plot_metrics = checked, lambda run: None
    script.main([*(SYNC.renamed(argument, name) for argument in SMALL), *OWN.get(name, ()),
                 f"OUTPUT_DIR={tmp_path / 'run'}"])
    for layer in range(8):
        for part in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
            assert changed[f"model.layers.{layer}.mlp.{part}"], part
