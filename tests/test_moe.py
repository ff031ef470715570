"""moe.py: the tape holds what it should and is played exactly: under padding, packing, answers that
end early, micro-batches of any size, gradient checkpointing, for each kind of router that it knows.
The reference is transformers' own model, one text at a time, with a router written out by hand. And
the known faults of routing replay, put in one at a time, are each found.
"""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, import_file, must_fail, mutated_copy
from torch.nn import functional as F
from transformers import (AutoModelForCausalLM, AutoTokenizer, MixtralConfig, OlmoeConfig,
                          Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig)
from transformers.modeling_layers import GradientCheckpointingLayer

SCRIPT = ROOT / "RL_HAND" / "moe" / "moe.py"
VOCABULARY, GROUP, K = 414, 4, 2
SHAPE = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=128, num_experts_per_tok=K,
             bos_token_id=None, pad_token_id=0)
KINDS = {  # whose scores add up to 1, or not; with a dense layer among them; with a shared expert
    "Qwen3-MoE": Qwen3MoeConfig(num_experts=8, moe_intermediate_size=24, intermediate_size=48,
                                head_dim=16, norm_topk_prob=True, mlp_only_layers=[1], **SHAPE),
    "OLMoE": OlmoeConfig(num_experts=8, intermediate_size=24, **SHAPE),
    "Mixtral": MixtralConfig(num_local_experts=8, intermediate_size=24, **SHAPE),
    "Qwen2-MoE": Qwen2MoeConfig(num_experts=8, moe_intermediate_size=24, intermediate_size=48,
                                shared_expert_intermediate_size=16, **SHAPE)}


@pytest.fixture
def moe():
    """moe.py with small constants in force."""
    return configured(import_file(SCRIPT, "moe_under_test"))


def configured(module):
    torch.set_num_threads(1)
    module.configure(["PROFILE=embedded", "DEVICE=cpu", f"GROUP_SIZE={GROUP}", "BATCH_SIZE=3",
                      "MINIBATCH=12", "MICRO_BATCH=4", "MAX_NEW_TOKENS=12", "MOE_EPOCHS=1"])
    return module


def new_model(kind="Qwen3-MoE", checkpointing=None):
    """A model of a kind with random weights, the same at each call, that leave nothing undecided;
    whose layers are made again in the backward pass if `checkpointing` is a script."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(KINDS[kind], dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.5 if "gate.weight" in name else 0.15)
    model.generation_config.eos_token_id = list(range(1, 60))  # answers end early
    for layer in model.modules() if checkpointing else ():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(checkpointing.made_again, layer.forward)
    return model


def rollout(moe, kind="Qwen3-MoE", noise=0.0, model=None):
    """Answers of a model, whose routers choose by noise if there is any: a Batch."""
    if model is None:
        model = new_model(kind)
        moe.obey_tapes(model, noise)
    torch.manual_seed(1)
    rows = [{"prompt_ids": torch.randint(60, VOCABULARY, (n,)).tolist()} for n in (3, 9, 6)]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "policy")
    return moe.sample_groups(model, tokenizer, rows, GROUP)


def trained(moe, kind="Qwen3-MoE", checkpointing=False):
    """The policy, which obeys."""
    model = new_model(kind, moe if checkpointing else None)
    moe.obey_tapes(model)
    return model


def alone(model, batch, i, forced=None):
    """Log-probs (n,) of answer i by transformers' own model, on its text alone, and what its
    routers chose: {layer: (tokens, K)}. `forced` (tokens, layers, K) are the experts to take
    instead. The last token goes through no model in a rollout: the text ends before it."""
    prompt = batch.prompt_ids[i][batch.prompt_mask[i] > 0]
    answer = batch.completion_ids[i][batch.completion_mask[i] > 0]
    text, chose = torch.cat([prompt, answer])[:-1], {}
    gates = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]

    def route(number, gate, states):
        probabilities = (states.reshape(-1, states.shape[-1]) @ gate.weight.T).softmax(-1)
        experts = chose[number] = probabilities.topk(K).indices
        if forced is not None:
            experts = forced[:len(text), number].long()
        scores = torch.stack([probabilities[t, experts[t]] for t in range(len(text))])
        if getattr(model.config, "norm_topk_prob", True):
            scores = scores / scores.sum(1, keepdim=True)
        return probabilities.log(), scores, experts

    for number, gate in enumerate(gates):
        gate.forward = partial(route, number, gate)
    logits = model(input_ids=text[None]).logits[0, len(prompt) - 1:]
    return logits.log_softmax(-1).gather(1, answer[:, None])[:, 0], chose


def as_sets(experts):
    return experts.sort(-1).values.tolist()


# =========================================== The tape ===========================================


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_is_what_each_text_alone_goes_through(moe, kind):
    """By the sampler, in the prompts' pass and after it, and by the policy in pi_old's pass: each
    token of each prompt and answer but the last, in every layer with experts. Lengths differ, and
    rows leave the rollout early."""
    batch, policy, own = rollout(moe, kind), trained(moe, kind), new_model(kind)
    moe.ROUTING_REPLAY = "none"
    lengths = batch.completion_mask.sum(1)
    assert len(set(lengths.tolist())) > 3 and len(set(batch.prompt_mask.sum(1).tolist())) == 3
    layers = 2 if kind == "Qwen3-MoE" else 3  # one is dense
    assert batch.routes.shape == (12, 9 + 12, layers, K) and batch.routes.dtype == torch.int16
    for moe.MICRO_BATCH in (1, 3, 4, 12):
        logps, routes = moe.old_logps_and_routes(policy, batch)
        for i in range(12):
            _, chose = alone(own, batch, i)
            assert len(chose) == layers
            for layer, experts in chose.items():
                assert as_sets(batch.routes[i, :len(experts), layer]) == as_sets(experts)
                assert as_sets(routes[i, :len(experts), layer]) == as_sets(experts)
        assert logps.sub(batch.sampled_logps).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_forced_is_recorded(moe, kind):
    """A sampler whose routers choose by noise: forced onto its experts, the policy gives its
    log-probs, free it is far off. Prompts' experts alone do not do, nor answers'."""
    batch, policy = rollout(moe, kind, noise=30.0), trained(moe, kind)
    mask = batch.completion_mask

    def apart(replay):
        moe.ROUTING_REPLAY = replay
        batch.old_logps, batch.old_routes = moe.old_logps_and_routes(policy, batch)
        return batch.old_logps.sub(batch.sampled_logps).abs().max()

    for moe.MICRO_BATCH in (1, 3, 4, 12):
        assert apart("R3") < 2e-5
    changed = moe.changed_routers(batch, batch.routes, batch.old_routes)[mask > 0]
    assert changed.mean() > 0.9  # of 28 pairs of experts one is the right one
    assert apart("none") > 0.3
    routes, free = batch.routes, batch.old_routes
    prompt = torch.arange(routes.shape[1]) < batch.prompt_mask.sum(1, keepdim=True)
    for batch.routes in (torch.where(prompt[..., None, None], free, routes),
                         torch.where(prompt[..., None, None], routes, free)):
        assert apart("R3") > 0.1


@pytest.mark.parametrize("replay", ["R2", "R3"])
def test_an_update_starts_from_ratio_one(moe, replay):
    """In the first update, whatever the micro-batch, each token has the probability that it had in
    pi_old's pass; and after an update the experts are still those of the tape."""
    batch, policy = rollout(moe, noise=30.0), trained(moe)
    moe.ROUTING_REPLAY = replay
    batch.old_logps, batch.old_routes = moe.old_logps_and_routes(policy, batch)
    batch.played = batch.routes if replay == "R3" else batch.old_routes
    taken = []
    for _, router in moe.routers(policy):
        router.register_forward_hook(lambda router, _, output: taken.append(
            (router.tape.where, output[2])))
    for moved in (False, True):
        for parameter in policy.parameters() if moved else ():
            parameter.data += 0.1 * torch.randn_like(parameter)
        for moe.MICRO_BATCH in (1, 3, 4, 12):
            for index in moe.micro_batches(batch):
                micro = batch.rows(index)
                taken.clear()
                logps, _, tape = moe.score_on_tape(policy, micro, micro.played)
                ratio = (logps - micro.old_logps).abs().max()
                assert ratio > 0.1 if moved else ratio < 1e-5
                for layer, (where, experts) in enumerate(taken):
                    real = where >= 0
                    wanted = micro.played.flatten(0, 1)[where[real], layer]
                    assert real.any() and torch.equal(experts[real], wanted)
    changed = moe.changed_routers(micro, micro.old_routes, moe.spread(micro, tape.own))
    assert changed[micro.completion_mask > 0].mean() > 0.3  # the routers would go elsewhere by now


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_a_router_by_hand(moe, kind, checkpointing):
    """Of every weight, the routers' among them, which is not zero; also where each layer runs again
    in the backward pass, after other passes, each with its own tape."""
    batch, policy, own = rollout(moe, kind, noise=30.0), trained(moe, kind, checkpointing), \
        new_model(kind)
    weights = torch.rand_like(batch.completion_mask) * batch.completion_mask
    moe.MICRO_BATCH, batch.weights = 3, weights
    parts = [batch.rows(index) for index in moe.micro_batches(batch)]
    assert len(parts) > 4  # more than one for a prompt
    scored = [moe.score_on_tape(policy, micro, micro.routes)[0] for micro in parts]
    sum((logps * micro.weights).sum() for logps, micro in zip(scored, parts)).backward()
    for i in range(len(weights)):
        logps, _ = alone(own, batch, i, batch.routes[i])
        (logps * weights[i][batch.completion_mask[i] > 0]).sum().backward()
    for (name, one), other in zip(policy.named_parameters(), own.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-4 * float(other.grad.abs().max())), name
    for _, router in moe.routers(policy):
        assert router.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_keeps_its_tape(moe, checkpointing):
    """Two passes over the same answers with different tapes, and then both ways back: each layer
    that runs again there finds the tape of its own pass."""
    batch, policy = rollout(moe, noise=30.0), trained(moe, checkpointing=checkpointing)
    other = batch.routes.flip(0)

    def gradient(*tapes):
        policy.zero_grad()
        sum(moe.score_on_tape(policy, batch, tape)[0].sum() for tape in tapes).backward()
        return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])

    one, two, both = gradient(batch.routes), gradient(other), gradient(batch.routes, other)
    assert (one - two).abs().max() > 0.1 * both.abs().max()
    assert (one + two - both).abs().max() < 1e-5 * both.abs().max()


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern")
@pytest.mark.parametrize("trains", [True, False])
def test_an_adapter_obeys_as_well(moe, tmp_path, trains):
    """LORA_RANK, beside routers and experts, too: the tape is exact, the adapter learns, that of
    the routers if they are to; and the sampler is a copy of all."""
    pytest.importorskip("peft")
    new_model().save_pretrained(tmp_path)
    moe.POLICY_MODEL, moe.LORA_RANK, moe.ROUTING_REPLAY = str(tmp_path), 4, "R3"
    moe.SAMPLER_DTYPE, moe.ROUTER_NOISE, moe.TRAIN_ROUTER = "float32", 30.0, trains
    policy = moe.load_policy(moe.POLICY_MODEL)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3)  # one of a pair begins as 0
    run = SimpleNamespace(policy=policy, trained={})
    moe.prepare(run)
    learns = {name: each for name, each in policy.named_parameters() if each.requires_grad}
    assert all("lora" in name for name in learns) and len(learns) > 30
    assert any(".experts." in name for name in learns)
    assert any(".gate." in name for name in learns) == trains
    batch = rollout(moe, model=moe.sampler(run))
    logps, routes = moe.old_logps_and_routes(policy, batch)
    assert logps.sub(batch.sampled_logps).abs().max() < 2e-5
    assert moe.changed_routers(batch, batch.routes, routes)[batch.completion_mask > 0].mean() > 0.9
    moe.score_on_tape(policy, batch, batch.routes)[0].sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in learns.values())
    optimised = run.trained["policy"][1].param_groups[0]["params"] if not trains else learns
    assert len(optimised) == len(learns)


def test_without_a_tape_a_model_is_free(moe):
    """In evaluations, in transformers' own passes, and after a pass that had one."""
    batch, policy, own = rollout(moe, noise=30.0), trained(moe), new_model()
    moe.score_on_tape(policy, batch, batch.routes)
    text = batch.completion_ids[:1]
    assert torch.equal(policy(input_ids=text).logits, own(input_ids=text).logits)
    del batch.tape
    free, _ = moe.score_tokens(policy, batch)
    assert free.sub(batch.sampled_logps).abs().max() > 0.3


# ===================================== Balance, and metrics =====================================


def test_the_balancing_loss_of_each_layer(moe):
    """Switch's: number of experts x sum_e (share of the choices) (mean probability), of each layer;
    over the tokens before each answer's token, with their weights; the same for any micro-batch."""
    moe.BALANCE_COEF, moe.ROUTING_REPLAY = 0.5, "R3"
    batch, policy, own = rollout(moe, noise=30.0), trained(moe), new_model()
    batch.old_logps, batch.old_routes = moe.old_logps_and_routes(policy, batch)
    batch.weights = weights = moe.token_weights(batch.completion_mask)
    share, mean = torch.zeros(2, 2, 8)  # of 2 layers and 8 experts
    for i in range(12):
        counted = weights[i][batch.completion_mask[i] > 0]
        logits = {}
        for layer, (_, router) in enumerate(moe.routers(own)):
            hook = router.register_forward_hook(
                lambda _, given, output, layer=layer: logits.update({layer: output[0]}))
            logits[layer] = hook
        hooks = list(logits.values())
        alone(own, batch, i, batch.routes[i])
        for hook in hooks:
            hook.remove()
        for layer in (0, 1):
            probabilities = logits[layer].softmax(-1)[-len(counted):]
            chosen = F.one_hot(probabilities.topk(K).indices, 8).sum(1) / K
            share[layer] += (chosen * counted[:, None]).sum(0)
            mean[layer] += (probabilities * counted[:, None]).sum(0).detach()
    expected = 8 * (share * mean).sum(1)
    load = moe.expert_load(batch, weights, 8)
    assert torch.allclose(load, share, atol=1e-5) and expected.min() > 1.01
    for moe.MICRO_BATCH in (1, 3, 12):
        found = 0
        for index in moe.micro_batches(batch):
            micro = batch.rows(index)
            *_, tape = moe.score_on_tape(policy, micro, micro.routes)
            each = moe.balancing_loss(micro, tape, load)
            found += (each * micro.weights[..., None]).sum((0, 1))
        assert torch.allclose(found, expected, atol=1e-4)
    for _, router in moe.routers(policy):
        router.weight.data.zero_()  # all alike: 1, whatever is chosen
    *_, tape = moe.score_on_tape(policy, batch, batch.routes)
    each = moe.balancing_loss(batch, tape, load)[batch.completion_mask > 0]
    assert torch.allclose(each, torch.ones(()))


def test_metrics_by_hand(moe):
    """Two answers to a prompt of two tokens, three tokens at most, one layer that changes."""
    mask = torch.tensor([[1.0, 1, 1], [1, 0, 0]])
    routes = torch.tensor([[[0, 1], [2, 3]]], dtype=torch.int16).expand(2, 5, 2, 2).clone()
    old = routes.flip(-1).clone()  # the same sets
    old[0, 2, 1, 0] = 5  # through which answer 0's second token is predicted
    old[0, 0] = old[0, 4] = old[1, 2] = 7  # a prompt's first token; a last one; padding
    mu = torch.tensor([[-1.0, -2, -3], [-1, 0, 0]])
    apart = torch.tensor([[0.0, math.log(3), 0.1], [-0.1, 0, 0]])
    batch = moe.Batch(prompt_index=torch.zeros(2), prompt_mask=torch.ones(2, 2, dtype=torch.long),
                      completion_mask=mask, sampled_logps=mu, old_logps=mu + apart, routes=routes,
                      old_routes=old)
    meter = moe.Meter()
    moe.measure_routing(SimpleNamespace(experts=8), meter, batch)
    found = meter.means()
    kl = [0, 2 - math.log(3), math.expm1(0.1) - 0.1, math.expm1(-0.1) + 0.1]
    load = [[.5, .5, 0], [3 / 8, 1 / 2, 1 / 8]]  # of layer 1's experts 2, 3, 5
    effective = [math.exp(-sum(x * math.log(x) for x in one if x)) for one in load]
    assert found == pytest.approx({
        "routing/routers_changed": 1 / 8, "routing/tokens_changed": 1 / 4,
        "routing/layers_changed": 1 / 4, "engine_kl": sum(kl) / 4, "engine_extreme": 1 / 4,
        "experts/effective": sum(effective) / 2, "experts/effective_min": min(effective),
        "experts/busiest": 0.5, "experts/busiest_max": 0.5}, rel=1e-5)
    largest = [moe.largest_ratios(mu + change, batch) for change in (apart + 0.2, apart)]
    batch.old_logps = mu
    largest = [moe.largest_ratios(mu + change * mask, batch) for change in (0.1 - apart, apart)]
    assert moe.largest_of(largest) == pytest.approx({
        "ratio/token_max": 3, "ratio/sequence_max": math.exp((math.log(3) + 0.1) / 3)}, rel=1e-5)


@pytest.mark.parametrize("ratio, sibling", [("sequence", "gspo"), ("token", "grpo")])
def test_the_loss_is_the_siblings(moe, ratio, sibling):
    """GSPO's and GRPO's, with their ranges."""
    other = import_file(ROOT / "RL_HAND" / sibling / f"{sibling}.py", "sibling_of_moe")
    moe.RATIO = ratio
    assert moe.clip_range() == other.clip_range()
    torch.manual_seed(0)
    logps, old, advantages = torch.randn(3, 6, 5)
    for scale in (1e-4, 0.1, 30.0):
        given = (scale * logps, torch.zeros_like(old), advantages, (old > -1).float())
        for one, expected in zip(moe.policy_loss(*given)[1].values(),
                                 other.policy_loss(*given)[1].values(), strict=True):
            assert torch.equal(one * given[3], expected * given[3])
        assert torch.equal(moe.policy_loss(*given)[0], other.policy_loss(*given)[0])


# ============================================ A run =============================================


def stepped(moe, monkeypatch, **constants):
    """One step of `train` with random weights and rewards: (metrics, run)."""
    found = {}
    for name, value in constants.items():
        setattr(moe, name, value)
    monkeypatch.setattr(moe, "load_policy", lambda name: new_model())
    monkeypatch.setattr(moe, "finish_step", lambda _, metrics: found.update(metrics))
    monkeypatch.setattr(moe, "score_completions", lambda run, rows, batch: (
        rewards := torch.rand(len(batch.ended)), {"verifier": rewards}))
    policy = new_model()
    rows = [{"prompt_ids": torch.randint(60, VOCABULARY, (n,)).tolist()} for n in (3, 9, 6)]
    run = SimpleNamespace(
        policy=policy, tokenizer=AutoTokenizer.from_pretrained(ROOT / "data" / "policy"),
        trained={"policy": (policy, moe.new_optimizer(policy, moe.LEARNING_RATE))}, step=0,
        total_steps=1, questions=0, num_tokens=0, state={}, train_rows=rows)
    moe.prepare(run)
    moe.train(run)
    return found, run


def test_a_step_of_each_replay(moe, monkeypatch):
    """With a sampler that chooses by noise: R3 has its log-probs, R2 and none do not; in the first
    update the ratio is 1 with each; only with none it moves by the experts, too."""
    one = {"ROUTER_NOISE": 30.0, "SAMPLER_DTYPE": "float32"}
    for replay, low, high in (("none", 0.1, 99), ("R2", 0.1, 99), ("R3", -1e-9, 1e-8)):
        found, _ = stepped(moe, monkeypatch, ROUTING_REPLAY=replay, **one)
        assert low < found["engine_kl"] < high
        assert found["routing/routers_changed"] > 0.9
        assert found["ratio/token_max"] == pytest.approx(1, abs=1e-4)
        assert found["routing/changed_by_updates"] == 0


def test_the_sampler_is_a_copy_in_its_precision(moe, monkeypatch):
    """With the weights of today in each rollout, and routers that obey by themselves; in float32
    without noise it is the policy."""
    _, run = stepped(moe, monkeypatch, SAMPLER_DTYPE="float32", ROUTING_REPLAY="R2")
    assert run.sampler is run.policy
    found, run = stepped(moe, monkeypatch, SAMPLER_DTYPE="bfloat16")
    assert 0 < found["engine_kl"] < 0.1 and found["sampling_logp_difference"] > 1e-3
    weights = dict(run.policy.named_parameters())
    assert not torch.equal(weights["lm_head.weight"], new_model().lm_head.weight)  # it has learnt
    stale = [not torch.equal(value, weights[name].bfloat16())
             for name, value in run.sampler.named_parameters()]
    assert any(stale)  # until the next rollout
    for name, value in moe.sampler(run).named_parameters():
        assert torch.equal(value, weights[name].bfloat16()) and not value.requires_grad
    routers = [router for model in (run.policy, run.sampler) for _, router in moe.routers(model)]
    assert len(set(routers)) == 4 and all(router.tape is not None for router in routers)
    assert routers[0].tape is not routers[2].tape


@pytest.mark.parametrize("trains", [True, False])
def test_routers_are_trained_or_not(moe, monkeypatch, trains):
    before = [router.weight.clone() for _, router in moe.routers(new_model())]
    _, run = stepped(moe, monkeypatch, TRAIN_ROUTER=trains, WEIGHT_DECAY=0.1)
    for old, (_, router) in zip(before, moe.routers(run.policy), strict=True):
        assert torch.equal(old, router.weight) != trains
    assert not torch.equal(run.policy.lm_head.weight, new_model().lm_head.weight)


def test_models_without_such_routers_are_refused(moe, monkeypatch):
    """In one line: one without experts, and one whose routers' scores are another function."""
    for config, words in ((Qwen3Config(**SHAPE, intermediate_size=48, head_dim=16), "no routers"),
                          ("Qwen3-MoE", "not close")):
        model = new_model() if config == "Qwen3-MoE" else \
            AutoModelForCausalLM.from_config(config)
        for _, router in moe.routers(model):
            router.register_forward_hook(lambda _, given, output: (
                output[0], output[0].sigmoid().gather(1, output[2]), output[2]))
        with pytest.raises(SystemExit) as stop:
            moe.prepare(SimpleNamespace(policy=model))
        assert stop.value.code.startswith(f"error: POLICY_MODEL={moe.POLICY_MODEL}: ")
        assert words in stop.value.code and "expected a mixture of experts" in stop.value.code
        assert "\n" not in stop.value.code


# ========================================= Known faults =========================================

MUTATIONS = {  # name: (text of the script, what takes its place, the test that must fail)
    "prompts are not replayed": (
        "tape.own = tape.own[index]", "tape.own = torch.zeros_like(tape.own[index])",
        test_forced_is_recorded),
    "a prompt's experts stay with its first answer": (
        "return torch.where(prompt, values[::group].repeat_interleave(group, 0), values)",
        "return values", test_recorded_is_what_each_text_alone_goes_through),
    "scores are gathered from the zeroed top k": (
        "scores = scores_of(router, logits, taken).to(scores.dtype)",
        "scores = torch.zeros_like(logits).scatter(1, experts, scores).gather(1, taken)",
        test_gradients_are_those_of_a_router_by_hand),
    "scores do not add up to 1": (
        "scores = scores_of(router, logits, taken)",
        "scores = F.softmax(logits, -1).gather(1, taken)",
        test_gradients_are_those_of_a_router_by_hand),
    "scores are constants": (
        "scores_of(router, logits, taken).to", "scores_of(router, logits, taken).detach().to",
        test_gradients_are_those_of_a_router_by_hand),
    "off by one token": (
        "batch.tape.at(first + (part - 1).clamp(min=0), place,",
        "batch.tape.at(first + (part - 1).clamp(min=0), (place - 1).clamp(min=0),",
        test_forced_is_recorded),
    "rows are those of the rollout's beginning": (
        "tape.at(row[:, None], place,", "tape.at(torch.arange(len(row))[:, None], place,",
        test_forced_is_recorded),
    "padding overwrites a token": (
        "place).masked_fill(~real, -1)", "place).masked_fill(~real, 0)",
        test_recorded_is_what_each_text_alone_goes_through),
    "a layer that runs again finds the tape of the last pass": (
        "return [(layer.self_attn, module)", "return [(layer, module)",
        test_a_pass_keeps_its_tape),
    "the updates are free": ('"R3": micro.routes}', '"R3": None}', test_a_step_of_each_replay),
    "R3 in the updates only": (
        'micro.routes if ROUTING_REPLAY == "R3" else None', "None", test_a_step_of_each_replay),
    "metrics are off by one token": (
        "keepdim=True) - 1 + ahead", "keepdim=True) + ahead", test_metrics_by_hand),
    "sets are compared in their order": (
        "at_answers(batch, tape).sort(-1).values for", "at_answers(batch, tape) for",
        test_metrics_by_hand),
    "layers are balanced together": (
        "* load).sum(-1)  ", "* load.mean(0)).sum(-1)  ",
        test_the_balancing_loss_of_each_layer),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_known_fault_is_found(name, tmp_path, monkeypatch):
    text, instead, test = MUTATIONS[name]
    module = configured(import_file(mutated_copy(SCRIPT, text, instead, tmp_path), "moe_mutated"))
    must_fail(test, {"moe": module, "kind": "Qwen3-MoE", "checkpointing": True,
                     "monkeypatch": monkeypatch})
