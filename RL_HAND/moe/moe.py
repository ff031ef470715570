# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "pandas==3.1.1", "pyarrow==26.0.1",
#                 "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///
"""Routing replay for mixtures of experts (R2, R3: arXiv:2510.11370), in one file.

In a mixture of experts a layer has many small networks and a router: it sends each token to the K
experts that it scores highest and adds their outputs up, weighted by these scores. The choice is a
step: where two experts score nearly alike, bfloat16's rounding or one update of the weights sends
a token to another one, and its log-prob jumps. Then the ratio pi / pi_old jumps, too, although the
policy has hardly moved. Routing replay writes down which experts a token went to, and sends it to
the same ones again. ROUTING_REPLAY says from where to where:

    "none"  each pass routes by itself
    "R2"    as the trainer routed for pi_old: all updates of a rollout (GSPO, arXiv:2507.18071)
    "R3"    as the sampler routed while it drew the answers: pi_old's pass and all updates

Replayed is only *which* experts: their weights are the router's of today, on that set, so that it
still learns. The sampler is a copy of the policy in SAMPLER_DTYPE, as an inference engine has one:
its probabilities are mu, not pi_old. The loss is GSPO's or GRPO's (../gspo, ../grpo), by RATIO:

    s_i  = (pi(y_i|x) / pi_old(y_i|x))^(1/|y_i|)              RATIO="sequence"
    r_it = pi(y_it | x, y_i<t) / pi_old(y_it | x, y_i<t)      RATIO="token"

    L = -mean_i mean_t min(r A_i, clip(r, 1-low, 1+high) A_i) - ENTROPY_COEF H(pi)
        + BALANCE_COEF (balancing loss of each layer)

Simplified on purpose: both engines are this file's, in the same processes, and only the sampler's
precision differs; real ones differ in kernels and batching as well, and record as they serve.

    python RL_HAND/moe/moe.py                                 # small models where there is no GPU
    python RL_HAND/moe/moe.py ROUTING_REPLAY=none RATIO=token # any constant below can be set so
    python RL_HAND/moe/moe.py RESUME_FROM=runs/moe/epoch_1    # go on exactly from that checkpoint
    torchrun --nproc_per_node=2 RL_HAND/moe/moe.py            # the same, shared by two GPUs
    python RL_HAND/moe/moe.py --help

One CPU core, small models: twice gspo.py's seconds a step, 0.9 GB of memory. A GPU: not run yet;
OLMoE-1B-7B by LoRA: estimated 22 GB, 14 of them its weights, 3 the adapter with Adam.
"""

import ast
import glob
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pandas as pd
import pyarrow.parquet
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from huggingface_hub import hf_hub_download
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          DynamicCache)
from transformers.modeling_layers import GradientCheckpointingLayer


class Either(NamedTuple):
    """A constant's values in the two profiles: full size on a GPU, or the small models in data/."""
    full: object
    embedded: object


# ========================================== Constants ===========================================
# Edit them here or on the command line (NAME=VALUE). `configure` makes one value of each Either: of
# the first on a GPU, of the second without one. A plain value in its place holds everywhere.

# --- Model
PROFILE = "auto"  # which value of Either(full, embedded); "auto": full where there is a CUDA GPU
POLICY_MODEL = Either(  # folder or model id of a mixture of experts
    "allenai/OLMoE-1B-7B-0125-Instruct", "data/policy_experts")
REWARD_MODEL = Either(  # scores (question, answer) pairs; a folder or model id
    "OpenAssistant/reward-model-deberta-v3-large-v2", "data/reward_model")
ENABLE_THINKING = False  # the chat template's switch; a thought rarely fits into MAX_NEW_TOKENS
DEVICE = Either("cuda", "cpu")  # of the policy; several GPUs: CUDA_VISIBLE_DEVICES chooses
FROZEN_DEVICE = Either("cuda", "cpu")  # of reference and reward model; "cuda:1": a second GPU
DTYPE = Either("bfloat16", "float32")  # of passes and frozen weights; what is trained is float32
THREADS = Either(0, 1)  # on the CPU; 0: PyTorch's choice, faster on an idle machine only
LOGITS_AT_ONCE = 2**24  # logits alive at a time in training: (B, T, V) never exists; memory only
GRADIENT_CHECKPOINTING = Either(True, False)  # keep layers' inputs only: less memory, more time
LORA_RANK = Either(16, 0)  # train an adapter of this rank (pip install peft); 0: all weights
LORA_ALPHA = 32  # an adapter's product is scaled by LORA_ALPHA / LORA_RANK

# --- Data
train_datasets = Either(  # questions to train on: file, pattern or hf://; parquet, json or jsonl
    [{"path": "hf://datasets/openai/gsm8k/main/train-00000-of-00001.parquet",
      "type": "parquet", "input": "question", "output": "answer"}],
    [{"path": "data/train.parquet", "type": "parquet", "input": "question", "output": "answer"}])
eval_datasets = Either(  # held-out questions, never trained on
    [{"path": "hf://datasets/openai/gsm8k/main/test-00000-of-00001.parquet",
      "type": "parquet", "input": "question", "output": "answer"}],
    [{"path": "data/heldout.parquet", "type": "parquet", "input": "question", "output": "answer"}])
MAX_PROMPT_TOKENS = Either(256, 64)  # tokens; longer prompts are dropped and counted

# --- Sampling
BATCH_SIZE = Either(2, 16)  # prompts per rollout
GROUP_SIZE = Either(4, 8)  # completions per prompt (G)
MAX_NEW_TOKENS = Either(512, 60)  # tokens per completion, the end token included
TEMPERATURE = 1.0  # of sampling, and of the log-probs that are trained: else ratios are wrong

# --- Reward
REWARD_WEIGHTS = {"model": 0.5, "verifier": 1.0}  # and "function"; their weighted sum
REWARD_SIGMOID = True  # squash the reward model's score into 0..1: it can't outweigh a right answer
REWARD_FUNCTION = ""  # "file.py:name": name(questions, responses, references) -> scores (README)
USE_SEQUENCE_LEVEL_REWARD = True  # False: each sentence is rewarded with what it added
MAX_REWARD_TOKENS = 512  # tokens of a pair, DeBERTa's training length; the longer part is cut
REWARD_BATCH = 64  # pairs per forward pass of the reward model; changes memory only

# --- Optimisation
NUM_EPOCHS = Either(1, 2)  # passes over the training questions
MAX_STEPS = 0  # stop after this many rollouts; 0: after NUM_EPOCHS
LEARNING_RATE = Either(1e-6, 1e-4)  # AdamW's
WARMUP_STEPS = 0  # optimiser steps of linear warm-up
ADAM_BETAS = (0.9, 0.95)  # AdamW's
ADAM_EPSILON = 1e-8  # AdamW's
WEIGHT_DECAY = 0.0  # AdamW's
MAX_GRAD_NORM = 1.0  # gradient clipping; 0: none
MINIBATCH = Either(8, 64)  # completions per optimiser step: part of the algorithm
MICRO_BATCH = Either(4, 24)  # completions per forward pass at most: memory and speed only
SEED = 0  # of sampling, data order and shuffling

# --- Algorithm
ROUTING_REPLAY = "R3"  # or "R2", "none": whose experts the trainer's passes take; see above
RATIO = "sequence"  # one ratio per answer, GSPO; "token": GRPO
SAMPLER_DTYPE = Either("float32", "bfloat16")  # of a copy that samples; float32: no copy
ROUTER_NOISE = 0.0  # noise by which the sampler's routers choose, in stds of logits: a stress test
TRAIN_ROUTER = True  # False: routers stay as they are
BALANCE_COEF = 0.0  # weight of each layer's balancing loss, which moves tokens, reward or not
MOE_EPOCHS = Either(4, 2)  # passes over a rollout (sampling is slow); in update 1 all ratios are 1
CLIP_RANGE = 0.0  # (low, high), or one number; 0: RATIO's own: see clip_range
ADVANTAGE_TYPE = "relative"  # R - mean; "normalized": (R - mean) / std: see compute_advantages
USE_GROUP_NORMALIZATION = True  # mean and std over a group; False: over a rollout (one process)
STD_CORRECTION = 1  # the std divides by n - 1 (as TRL and verl do); 0: by n
ADVANTAGE_EPSILON = 1e-6  # added to the std
ENTROPY_COEF = 0.01  # weight of the entropy bonus

# --- Evaluation
EVAL_EVERY = Either(200, 10)  # rollouts between evaluations; also at step 0 and an epoch's end
EVAL_QUESTIONS = Either(256, 512)  # held-out questions used; 0: all
EVAL_BATCH = Either(16, 512)  # questions answered at once; changes memory only
EVAL_TEMPERATURE = 1.0  # of the sampled evaluation; the other one is greedy
SHOW_SAMPLES = 3  # held-out questions whose answers are printed at each evaluation

# --- Output
OUTPUT_DIR = "runs/{script}"  # in the project's folder; with _2, _3, ... if it is in use
SAVE_EVERY = 0  # rollouts between extra checkpoints step_N/; 0: only epoch_N/
RESUME_FROM = ""  # an epoch_N/ or step_N/ folder to go on from, exactly

DEFAULTS = {name: value for name, value in globals().items()
            if re.fullmatch("[A-Z][A-Z_]+|[a-z]+_datasets", name)}  # all of the above

# ========================================== Training ============================================

def train(run):
    """The whole algorithm, of B answers, b of them in a part, T tokens each. `run`: see `start`."""
    policy = run.policy
    while run.step < run.total_steps:
        meter = begin_step(run)                                           # what is measured goes in
        rows = next_questions(run, BATCH_SIZE)
        batch = sample_groups(sampler(run), run.tokenizer, rows, GROUP_SIZE)    # with batch.routes
        meter.lap("rollout")
        rewards, parts = score_completions(run, rows, batch)              # (B,), and by source
        batch.advantages = token_advantages(run, rows, batch, rewards)    # (B, T)
        meter.lap("reward")
        batch.old_logps, batch.old_routes = old_logps_and_routes(policy, batch)
        measure_routing(run, meter, batch)
        meter.lap("logps")

        largest = []
        for minibatch in minibatches(batch, MOE_EPOCHS):                  # an optimiser step each
            minibatch.weights = token_weights(minibatch.completion_mask)  # (b, T), sums to 1
            if BALANCE_COEF:
                load = expert_load(minibatch, minibatch.weights, run.experts)  # (layers, experts)
            for index in micro_batches(minibatch):                        # parts, for memory
                micro = minibatch.rows(index)
                played = {"none": None, "R2": micro.old_routes, "R3": micro.routes}[ROUTING_REPLAY]
                logps, entropy, tape = score_on_tape(policy, micro, played)    # (b, T) each
                policy_term, statistics = policy_loss(logps, micro.old_logps, micro.advantages,
                                                      micro.completion_mask)
                token_loss = policy_term - ENTROPY_COEF * entropy
                if BALANCE_COEF:
                    balance = balancing_loss(micro, tape, load)           # (b, T, layers)
                    token_loss = token_loss + BALANCE_COEF * balance.sum(2)
                    meter.add({"balance_loss": balance.mean(2)}, micro.weights)
                (token_loss * micro.weights).sum().backward()
                meter.add({"loss": token_loss, "policy_loss": policy_term,
                           "entropy_loss": -entropy, "advantage/mean": micro.advantages,
                           "advantage/size": micro.advantages.abs()}, micro.weights)
                moved = changed_routers(micro, micro.old_routes, spread(micro, tape.own))
                meter.add({"entropy": entropy, "routing/changed_by_updates": moved.mean(2),
                           **statistics}, micro.completion_mask)
                largest.append(largest_ratios(logps, micro))
            optimiser_step(run, "policy", meter)
        meter.lap("update")

        measure_rollout(run, meter, batch, rewards, parts)
        finish_step(run, meter.means() | largest_of(largest))


def minibatches(batch, passes):
    """`passes` times over the batch in new random order, MINIBATCH completions (of all processes)
    each. Answers to a question stay side by side: `states_before` runs their prompt once."""
    index = torch.arange(len(batch.ended), device=batch.ended.device)
    groups = index.unflatten(0, (-1, GROUP_SIZE))                         # (P, G)
    for _ in range(passes):
        order = groups[torch.randperm(len(groups))].flatten()
        yield from map(batch.rows, order.split(MINIBATCH // processes))


def prepare(run):
    """What this algorithm needs besides the policy: routers that obey a tape, and the sampler."""
    with one_line(f"POLICY_MODEL={POLICY_MODEL}", "a mixture of experts, such as Qwen3-MoE, "
                  "OLMoE or Mixtral: its routers take the top k of a softmax"):
        run.experts = obey_tapes(run.policy)
    if not TRAIN_ROUTER:
        for name, parameter in run.policy.named_parameters():
            if ".gate." in name:  # a router's weights, and with LORA_RANK its adapter's
                parameter.requires_grad_(False)
        run.trained["policy"] = (run.policy, new_optimizer(run.policy, LEARNING_RATE))
    run.sampler = run.policy
    if SAMPLER_DTYPE != "float32" or ROUTER_NOISE:
        run.sampler = load_policy(POLICY_MODEL).requires_grad_(False)
        run.sampler.to(getattr(torch, SAMPLER_DTYPE))
        obey_tapes(run.sampler, ROUTER_NOISE)


def sampler(run):
    """The model that draws the answers: the policy, or its copy with the weights of today."""
    if run.sampler is not run.policy:
        for ours, theirs in zip(run.sampler.parameters(), run.policy.parameters()):
            ours.data.copy_(theirs.data)
    return run.sampler


# ======================================= Routing replay =========================================

class Tape:
    """What the routers of one forward pass choose by themselves, and what they have to take.

    own   (b, S, layers, K) int16: the K experts that a router chose, for the token at each place of
          each answer; places count from the prompt's first token, S is room for both. Written
    play  the same, to be taken; None: their own
    """

    def __init__(self, own, play=None):
        self.own, self.play, self.logits = own, play, {}

    def at(self, answer, place, real):
        """This tape for a pass over the tokens (n, l) at `place` of `answer`. Padding is written to
        the last place of all, which is free: an answer's last token never goes through a model."""
        self.where = (answer * self.own.shape[1] + place).masked_fill(~real, -1).flatten()
        return self

    def route(self, layer, router, logits, scores, experts):
        """What a router returns in this pass: logits (n, experts), scores and experts (n, K).
        The scores of what is played are today's: a softmax over all experts, K of them taken."""
        taken = experts
        if router.noise:
            noise = router.noise * logits.std() * torch.randn_like(logits)
            taken = (logits + noise).topk(experts.shape[1]).indices
        self.own.flatten(0, 1)[self.where, layer] = taken.to(self.own.dtype)
        if self.play is not None:
            taken = self.play.flatten(0, 1)[self.where, layer].long()
        if BALANCE_COEF:
            self.logits[layer] = logits
        if taken is not experts:
            scores = scores_of(router, logits, taken).to(scores.dtype)
        return logits, scores, taken


def scores_of(router, logits, experts):
    """The weights of given experts (n, K) by a router's logits (n, experts)."""
    scores = F.softmax(logits, -1, dtype=torch.float).gather(1, experts)
    whole = getattr(router, "norm_topk_prob", True)  # Mixtral always lets them add up to 1
    return scores / scores.sum(-1, keepdim=True) if whole else scores


def routers(model):
    """A model's pairs (attention, router), one for each layer with experts."""
    return [(layer.self_attn, module) for layer in model.base_model.layers
            for module in layer.modules() if type(module).__name__.endswith("TopKRouter")]


@torch.no_grad()
def obey_tapes(model, noise=0.0):
    """Let a model's routers obey the tape of each pass, and return how many experts a layer has.

    The tape travels with the pass, as an argument that each layer hands to its attention, which
    runs before the router and leaves it there: so a layer that gradient checkpointing runs again,
    long after other passes, finds its own tape."""
    def leave(router, attention, inputs, options):
        router.tape = options.pop("tape", None)
        return inputs, options

    def obey(number, router, inputs, output):
        return output if router.tape is None else router.tape.route(number, router, *output)

    if not routers(model):
        raise ValueError("no routers")
    for number, (attention, router) in enumerate(routers(model)):
        logits, scores, experts = router(router.weight.detach())
        torch.testing.assert_close(scores_of(router, logits, experts).to(scores.dtype), scores)
        router.noise = noise
        attention.register_forward_pre_hook(partial(leave, router), with_kwargs=True)
        router.register_forward_hook(partial(obey, number))
    return router.num_experts


def blank(model, answers, places):
    """An unwritten `own` of a Tape, for a model."""
    found = [router.top_k for _, router in routers(model)]
    return torch.zeros(answers, places, len(found), max(found, default=0), dtype=torch.int16,
                       device=model.device)


def tape_of(batch, place, part):
    """The tape of a pass over packed rows (p, l), if the batch has one. A prompt, part 0, is that
    of its first answer; see `states_before`."""
    if "tape" in vars(batch):
        first = torch.arange(len(part), device=part.device)[:, None] * batch.group_size()
        return batch.tape.at(first + (part - 1).clamp(min=0), place, part >= 0)


def score_on_tape(policy, batch, played):
    """`score_tokens`, routed as `played` says (None: freely), and the tape of this pass."""
    batch.tape = Tape(torch.zeros_like(batch.routes), played)
    return *score_tokens(policy, batch), batch.tape


@torch.no_grad()
def old_logps_and_routes(policy, batch):
    """pi_old's log-probs (B, T), and how the policy itself would route (B, S, layers, K). With R3
    it has to route as the sampler did, and what it would do is asked on the way."""
    logps, routes = torch.zeros_like(batch.completion_mask), torch.zeros_like(batch.routes)
    for index in micro_batches(batch):
        micro = batch.rows(index)
        logps[index], _, tape = score_on_tape(policy, micro,
                                              micro.routes if ROUTING_REPLAY == "R3" else None)
        routes[index] = spread(micro, tape.own)
    return logps, routes


def spread(batch, values):
    """Values of a pass (b, S, ...), the prompt's, which was run for its first answer, at each."""
    group, places = batch.group_size(), torch.arange(values.shape[1], device=values.device)
    prompt = places < batch.prompt_mask.sum(1, keepdim=True)                   # (b, S)
    prompt = prompt.view(*prompt.shape, *[1] * (values.ndim - 2))
    return torch.where(prompt, values[::group].repeat_interleave(group, 0), values)


# ====================================== What routing does =======================================

def at_answers(batch, values):
    """Of values (b, S, ...) those before each completion token, (b, T, ...): it is predicted by the
    token at the place before it, through the experts of that."""
    row = torch.arange(len(values), device=values.device)[:, None]
    ahead = torch.arange(batch.completion_mask.shape[1], device=values.device)
    return values[row, batch.prompt_mask.sum(1, keepdim=True) - 1 + ahead]


def changed_routers(batch, some, other):
    """Where two tapes differ, as sets of experts: 0 or 1, (b, T, layers)."""
    some, other = (at_answers(batch, tape).sort(-1).values for tape in (some, other))
    return (some != other).any(-1).float()


def expert_load(batch, weights, experts):
    """The share of each expert in what the policy's routers chose for pi_old, (layers, experts);
    each layer's add up to 1. weights: (b, T), how much a token counts."""
    chosen = at_answers(batch, batch.old_routes).long().permute(2, 0, 1, 3)    # (layers, b, T, K)
    weights = weights[..., None].expand_as(chosen)
    load = weights.new_zeros(len(chosen), experts)
    load.scatter_add_(1, chosen.flatten(1), weights.flatten(1))
    if processes > 1:
        dist.all_reduce(load)
    return load / load.sum(1, keepdim=True)


def balancing_loss(batch, tape, load):
    """Each token's part in Switch's balancing loss (arXiv:2101.03961, Eq. 4), (b, T, layers): the
    number of experts x sum_e load_e p_e, of which 1 is the least where p = load. Of each layer:
    taken over all at once, one layer could do with few experts if another has other ones."""
    logits = torch.stack([tape.logits[layer] for layer in sorted(tape.logits)], 1)
    each = load.shape[1] * (logits.float().softmax(-1) * load).sum(-1)         # (n, layers)
    values = each.new_zeros(batch.routes.shape[:3]).flatten(0, 1)
    values = values.index_put((tape.where,), each).view(batch.routes.shape[:3])
    return at_answers(batch, spread(batch, values))


def measure_routing(run, meter, batch):
    """Measure a rollout: where the sampler and the policy route differently, how far mu, by which
    the answers were drawn, and pi_old are apart, and how evenly the experts are used.

    engine_kl is KL(mu || pi_old), in nats per token: the mean of r - 1 - log r (k3), where r is
    pi_old / mu, over tokens that mu drew."""
    changed = changed_routers(batch, batch.routes, batch.old_routes)           # (B, T, layers)
    log_ratio = (batch.old_logps - batch.sampled_logps).to(WIDE)
    meter.add({"engine_kl": log_ratio.expm1() - log_ratio,
               "engine_extreme": log_ratio.abs() > math.log(2),
               "routing/routers_changed": changed.mean(2), "routing/layers_changed": changed.sum(2),
               "routing/tokens_changed": changed.amax(2)}, batch.completion_mask)
    load = expert_load(batch, batch.completion_mask, run.experts)              # (layers, experts)
    used = torch.special.entr(load).sum(1).exp()                               # exp(entropy)
    meter.add({"experts/effective": used, "experts/busiest": load.amax(1)})
    meter.add({"experts/effective_min": used.min(), "experts/busiest_max": load.max()})


def largest_ratios(logps, batch):
    """The largest log(pi / pi_old) of a token, and of an answer, divided by its length: (2,)."""
    log_ratio = (logps.detach() - batch.old_logps) * batch.completion_mask
    return torch.stack([log_ratio.max(), (log_ratio.sum(1) / batch.completion_mask.sum(1)).max()])


def largest_of(largest):
    """The largest ratios of a step and of all processes, by name."""
    found = everyone(torch.stack(largest).amax(0).clamp(max=80.0).exp().tolist())
    return dict(zip(("ratio/token_max", "ratio/sequence_max"), map(max, zip(*found))))


# ========================================= Advantages ===========================================

def compute_advantages(rewards):
    """Group-relative advantages (Eq. 6, arXiv:2507.18071): how much better than its group.

    rewards: (B,) float, GROUP_SIZE consecutive completions per prompt; or (B, K), a reward for each
    of K sentences, compared with the same sentence of the others. Returns the same shape.

    The default does not divide by the std as Eq. 6 does: a reward model's scores always differ by
    a hair, and the division makes that as loud as right against wrong. A group without any spread
    gets exactly 0: divided by float noise, equal scores would get advantages of any size.

    >>> compute_advantages(torch.tensor([95.0, 70.0, 85.0, 80.0])).tolist()
    [12.5, -12.5, 2.5, -2.5]
    """
    size = GROUP_SIZE if USE_GROUP_NORMALIZATION else len(rewards)
    groups = rewards.unflatten(0, (-1, size))                             # (P, G) or (P, G, K)
    advantages = groups - groups.mean(1, keepdim=True)
    if ADVANTAGE_TYPE == "normalized":
        std = groups.std(1, correction=STD_CORRECTION, keepdim=True)
        advantages = advantages / (std + ADVANTAGE_EPSILON)
    return advantages.masked_fill(without_spread(groups), 0.0).flatten(0, 1)


def without_spread(groups):
    """Where the values of a group, (P, G, ...), are equal up to float noise: (P, 1, ...) bool."""
    scale = groups.abs().amax(1, keepdim=True).clamp(min=1.0)
    return groups.std(1, correction=0, keepdim=True) < 1e-6 * scale


def token_advantages(run, rows, batch, rewards):
    """The advantage of each token (B, T): its answer's, or its sentence's if those are rewarded."""
    if USE_SEQUENCE_LEVEL_REWARD:
        return compute_advantages(rewards)[:, None].expand_as(batch.completion_mask)
    sentence, added = sentence_rewards(run, rows, batch)                  # (B, T), (B, K)
    return compute_advantages(added).gather(1, sentence)


def sentence_rewards(run, rows, batch):
    """The sentence, from 0, of each token, (B, T), and what each adds to the reward of the answer's
    beginning, (B, K), 0 if an answer has no such sentence: K + 1 scorings, the first of nothing. A
    sentence ends after a full stop (or decimal point) or newline; the end token is in the last."""
    tokens, place = batch.completion_ids.unique(return_inverse=True)
    texts = run.tokenizer.batch_decode(tokens[:, None])
    ends = torch.tensor([text.rstrip(" ").endswith((".", "\n")) for text in texts],
                        device=place.device)[place]                       # (B, T)
    more = batch.completion_mask.flip(1).cumsum(1).flip(1) > 1 + batch.ended[:, None]  # than "end"
    ends &= more & ~F.pad(ends[:, 1:], (0, 1))  # of ".\n" only the second
    sentence = ends.cumsum(1) - ends.long()
    beginnings = [score_completions(run, rows, batch, sentence < k)[0]
                  for k in range(int(sentence.max()) + 2)]                # K + 1 times (B,)
    return sentence, torch.stack(beginnings, 1).diff(dim=1)


# ============================================ Loss ==============================================

def policy_loss(logps, old_logps, advantages, mask):
    """The clipped loss at every token, to be minimised: GSPO's (arXiv:2507.18071, Eq. 5 and 7) or
    GRPO's (arXiv:2402.03300, Eq. 3), by RATIO.

    logps, old_logps: (b, T) log-probs under the trained policy and pi_old; advantages (b, T); mask
    (b, T), 1 up to and including the end token. Returns the token losses and statistics, (b, T)
    each. One token that went to other experts may have any ratio; in an answer's it is one of |y|
    terms of a mean. But GSPO's range is 600 times narrower than GRPO's.

    >>> old, new = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-0.9, -1.9]])
    >>> loss, statistics = policy_loss(new, old, torch.ones(1, 2), torch.ones(1, 2))
    >>> f"{statistics['ratio/mean'][0, 0]:.4f} {loss[0, 0]:.4f}"     # exp(0.1), clipped to 1 + 4e-4
    '1.1052 -1.0004'
    """
    low, high = clip_range()
    log_ratio = (logps - old_logps) * mask                                     # (b, T)
    if RATIO == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    # clamp: far outside any range; keeps inf x 0 from the gradient
    ratio = torch.exp(log_ratio.clamp(max=20.0)).expand_as(mask)               # (b, T)
    clipped = ratio.clamp(1 - low, 1 + high)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    return loss, ratio_statistics(ratio.detach(), advantages, low, high)


def ratio_statistics(ratio, advantages, low, high):
    """The ratio, and the tokens that are clipped: below, A < 0; above, A > 0. (b, T) each."""
    below = ((ratio < 1 - low) & (advantages < 0)).float()
    above = ((ratio > 1 + high) & (advantages > 0)).float()
    return {"ratio/mean": ratio, "clip_ratio/low_mean": below, "clip_ratio/high_mean": above,
            "clip_ratio/region_mean": below + above}


def clip_range():
    """CLIP_RANGE as (low, high); without one GSPO's (sec. 5.1), or GRPO's usual one."""
    if not CLIP_RANGE:
        return (3e-4, 4e-4) if RATIO == "sequence" else (0.2, 0.2)
    return CLIP_RANGE if isinstance(CLIP_RANGE, tuple) else (CLIP_RANGE, CLIP_RANGE)


def token_weights(mask):
    """Each token's weight in its minibatch's loss: the mean over sequences of the mean over tokens.

    mask: (b, T). Made for the whole minibatch before it is split, so that MICRO_BATCH changes the
    memory and nothing else.

    >>> token_weights(torch.tensor([[1.0, 1.0], [1.0, 0.0]])).tolist()
    [[0.25, 0.25], [0.5, 0.0]]
    """
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)


# ==================== The algorithm ends here: you may stop reading. ============================

ALGORITHM_RULES = """
    ROUTING_REPLAY in ("none", "R2", "R3") and RATIO in ("sequence", "token")
    SAMPLER_DTYPE in ("float32", "bfloat16") and ROUTER_NOISE >= 0 and BALANCE_COEF >= 0
    GROUP_SIZE >= 2 and MOE_EPOCHS >= 1  # a group's answers are compared
    len(clip_range()) == 2 and 0 < clip_range()[0] <= 1  # CLIP_RANGE: a number, or (low, high)
    0 < clip_range()[1] < math.inf  # CLIP_RANGE
    ADVANTAGE_TYPE in ("relative", "normalized")
    STD_CORRECTION in (0, 1) and min(ADVANTAGE_EPSILON, ENTROPY_COEF) >= 0
    USE_SEQUENCE_LEVEL_REWARD or RATIO == "token"  # an answer's ratio has one advantage
    USE_GROUP_NORMALIZATION or processes == 1  # a process knows its own groups only
"""
ALGORITHM_PANELS = {"Sampler against trainer: shares changed":
                    "routing/routers_changed routing/tokens_changed routing/changed_by_updates",
                    "Layers changed, of a token": "routing/layers_changed",
                    "KL of sampler to trainer, nats per token": "engine_kl",
                    "Tokens with ratio pi / mu beyond 2": "engine_extreme",
                    "Largest ratio pi / pi_old": "ratio/token_max ratio/sequence_max",
                    "Effective experts": "experts/effective experts/effective_min",
                    "Share of the busiest expert": "experts/busiest experts/busiest_max",
                    "Balancing loss": "balance_loss"}
ALGORITHM_SHOWN = ("ROUTING_REPLAY RATIO SAMPLER_DTYPE TRAIN_ROUTER BALANCE_COEF MOE_EPOCHS "
                   "CLIP_RANGE ADVANTAGE_TYPE ENTROPY_COEF")

# ==================== From here on the scripts are the same, byte for byte. =====================
# =========================================== Rollout ============================================

class Batch(SimpleNamespace):
    """Completions, one a row, those of a prompt side by side; `train` adds tensors of B rows.

    prompt_index                     (B,), the number of its prompt
    prompt_ids, prompt_mask          (B, L), padded on the left
    completion_ids, completion_mask  (B, T), padded on the right; 1.0 up to and including the end
    sampled_logps                    (B, T), float32, as they were when the tokens were drawn
    ended                            (B,) bool, False where MAX_NEW_TOKENS truncated it
    routes                           (B, S, layers, K), the experts of its tokens: see `Tape`
    """

    def rows(self, index):
        """The batch of the given rows."""
        return Batch(**{name: tensor[index] for name, tensor in vars(self).items()})

    def group_size(self):
        """How many completions there are of each prompt."""
        return int((self.prompt_index == self.prompt_index[0]).sum())


@torch.no_grad()
def sample_groups(model, tokenizer, rows, group_size, temperature=None, length=None):
    """Sample `group_size` completions of each row's prompt: a Batch of len(rows) x group_size.

    Each prompt is run once, its keys and values are copied for its group, and all completions are
    decoded together. Of the model's generation_config only the end ids are used (Qwen3's has a
    top_k, too): sampled is softmax(logits / temperature), as trained; 0 is greedy. Random numbers
    are drawn first: a completion depends neither on those beside it nor on device or processes.
    """
    temperature = TEMPERATURE if temperature is None else temperature
    length, prompts = length or MAX_NEW_TOKENS, [{"input_ids": row["prompt_ids"]} for row in rows]
    prompts = tokenizer.pad(prompts, padding_side="left", return_tensors="pt").to(model.device)
    prompt_ids, prompt_mask = prompts["input_ids"], prompts["attention_mask"]          # (P, L)
    index = torch.arange(len(rows), device=model.device).repeat_interleave(group_size)  # (B,)
    if temperature:
        chance = torch.rand(len(rows) * processes, group_size, length, dtype=torch.float64)
        chance = chance[rank::processes].flatten(0, 1).to(model.device, WIDE)          # (B, T)
    mask, logps = torch.zeros(2, len(index), length, device=model.device)              # (B, T)
    ids = torch.full_like(mask, tokenizer.pad_token_id, dtype=torch.long)
    ends = model.generation_config.eos_token_id  # Qwen3 has two; the second is its padding id, too
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    ends = torch.tensor(sorted(ends), device=model.device)
    weight = model.get_output_embeddings().weight.float()
    cache, row = DynamicCache(config=model.config), torch.arange(len(index), device=model.device)
    tape = Tape(blank(model, len(rows), prompt_ids.shape[1] + length))
    with autocast():  # one block, in which the other weights are cast once
        place = (prompt_mask.cumsum(1) - 1).clamp(min=0)                               # (P, L)
        states = run_model(model, prompt_ids, prompt_mask, place, cache,
                           tape.at(index[::group_size, None], place, prompt_mask > 0))[:, -1]
        cache.batch_repeat_interleave(group_size)
        tape.own = tape.own[index]
        prompt_ids, prompt_mask, states, place = (
            x[index] for x in (prompt_ids, prompt_mask, states, place[:, -1:]))
        seen = prompt_mask[:, None, None].bool()                                 # (n, 1, 1, L)
        for t in tqdm(range(length), "rollout", leave=False, delay=5, disable=rank > 0):
            if t:
                seen, place = F.pad(seen, (0, 1), value=True), place + 1
                states = run_model(model, token[:, None], seen, place, cache,
                                   tape.at(row[:, None], place, place >= 0))[:, -1]    # (n, H)
            all_logps = torch.log_softmax(logits_of(states, weight) / (temperature or 1.0), -1)
            token = all_logps.argmax(-1)
            if temperature:  # where the cumulated probability passes a number in [0, 1)
                total = all_logps.exp().cumsum(-1, dtype=WIDE)                         # (n, V)
                point = chance[row, t, None] * total[:, -1:]
                token = torch.searchsorted(total, point, right=True)[:, 0].clamp(max=len(weight)-1)
            ids[row, t], mask[row, t] = token, 1.0
            logps[row, t] = all_logps.gather(1, token[:, None])[:, 0]
            going = (~torch.isin(token, ends)).nonzero()[:, 0]
            if len(going) < len(row):  # those that have ended leave
                row, token, seen, place = (x[going] for x in (row, token, seen, place))
                cache.batch_select_indices(going)
            if len(row) == 0:
                break
    ended = torch.ones(len(ids), dtype=torch.bool, device=ids.device).index_fill(0, row, False)
    return Batch(prompt_index=index, prompt_ids=prompt_ids, prompt_mask=prompt_mask, ended=ended,
                 completion_ids=ids[:, :t + 1], completion_mask=mask[:, :t + 1],
                 sampled_logps=logps[:, :t + 1], routes=tape.own)


# ====================================== Log-probabilities =======================================

def autocast():
    """bfloat16 arithmetic over float32 weights, if DTYPE says so."""
    return torch.autocast(torch.device(DEVICE).type, torch.bfloat16, DTYPE == "bfloat16")


def run_model(model, ids, mask, place, cache=None, tape=None):
    """Last hidden states (n, l, H) of tokens (n, l) at their `place` among the real ones of their
    row; `mask` is 1 for what they may see, (n, L) or (n, 1, l, L); `cache` is read and extended."""
    return model.base_model(input_ids=ids, attention_mask=mask, position_ids=place, tape=tape,
                            past_key_values=cache, use_cache=cache is not None).last_hidden_state


def logits_of(states, weight):
    """The head's logits (n, V), in float32: GSPO's clip range (3e-4) is far below bfloat16's steps
    (8e-3). What some models do behind the head is not done: see `check_policy`."""
    with torch.autocast(states.device.type, enabled=False):
        return states.float() @ weight.float().T


def logps_and_entropy(states, weight, tokens):
    """Log-probs at TEMPERATURE of the tokens (n,), and the exact entropy: (2, n)."""
    logps = torch.log_softmax(logits_of(states, weight) / TEMPERATURE, -1)
    return torch.stack([logps.gather(1, tokens[:, None])[:, 0], -(logps.exp() * logps).sum(1)])


def states_before(model, batch):
    """The last hidden state before each completion token, (n, H), in the order of the mask. A row
    of the forward pass is a prompt and its g completions: of "pq", "abc", "de" it is p q a b d, at
    positions 0 1 2 3 2. q predicts a and d; d sees p q d; what c and e predict is not needed."""
    group, mask = batch.group_size(), batch.completion_mask.bool()
    prompt_ids, prompt_mask = batch.prompt_ids[::group], batch.prompt_mask[::group]    # (p, L)
    (count, width), longest = prompt_mask.shape, mask.shape[1]
    length = prompt_mask.sum(1, keepdim=True)                                          # (p, 1)
    number = torch.arange(group * longest, device=mask.device)                         # (g T,)
    fed = F.pad(mask[:, 1:], (0, 1)).reshape(count, -1)  # of a completion all tokens but its last
    real = torch.cat([prompt_mask.bool(), fed], 1)                                # (p, L + g T)
    ids = torch.cat([prompt_ids, batch.completion_ids.reshape(count, -1)], 1)
    place = torch.cat([(prompt_mask.cumsum(1) - 1).clamp(min=0), length + number % longest], 1)
    part = torch.cat([prompt_mask * 0, (1 + number // longest).expand_as(fed)], 1)  # 0: the prompt
    order = (~real).byte().argsort(dim=1, stable=True)[:, :int(real.sum(1).max())]     # (p, S)
    ids, place, part = (x.gather(1, order) for x in (ids, place, part.masked_fill(~real, -1)))
    visible = (part[:, None] == 0) | (part[:, None] == part[:, :, None])               # (p, S, S)
    with autocast():
        states = run_model(model, ids, visible.tril()[:, None], place,
                           tape=tape_of(batch, place, part))                           # (p, S, H)
    column = (real.cumsum(1) - 1)[:, width:].reshape(-1, longest)                      # (b, T)
    column = torch.cat([(length - 1).repeat_interleave(group, 0), column[:, :-1]], 1)
    row = torch.arange(count, device=mask.device).repeat_interleave(group)[:, None]
    # index_select: the gradient of states[row, column] is summed in any order on several threads
    return states.flatten(0, 1).index_select(0, (row * states.shape[1] + column)[mask])


def at_tokens(batch, values):
    """A number for each completion token, (n,), at its place in (b, T); 0 in padding."""
    mask = batch.completion_mask
    return torch.zeros_like(mask).masked_scatter(mask.bool(), values)


def score_tokens(model, batch):
    """Log-probs at TEMPERATURE, and exact entropy; (b, T) each, 0 in padding. Logits (n, V)
    exist LOGITS_AT_ONCE at a time, and are made again in the backward pass."""
    states, weight = states_before(model, batch), model.get_output_embeddings().weight
    tokens = batch.completion_ids[batch.completion_mask.bool()]
    size = max(1, LOGITS_AT_ONCE // len(weight))
    pieces = [made_again(logps_and_entropy, some, weight, ids)
              for some, ids in zip(states.split(size), tokens.split(size))]            # (2, n)
    return [at_tokens(batch, some) for some in torch.cat(pieces, 1)]


@torch.no_grad()
def score_without_grad(model, batch):
    """Log-probs (B, T) of a whole batch, a micro-batch at a time, wherever the model is."""
    logps = torch.zeros_like(batch.completion_mask)
    for rows in micro_batches(batch):
        here = {name: tensor.to(model.device) for name, tensor in vars(batch.rows(rows)).items()}
        logps[rows] = score_tokens(model, Batch(**here))[0].to(logps.device)
    return logps


def reference_logps(run, batch):
    """The reference's log-probs (B, T). With LoRA it is the policy without its adapter."""
    if run.reference is not None:
        return score_without_grad(run.reference, batch)
    run.policy.disable_adapters()
    logps = score_without_grad(run.policy, batch)
    run.policy.enable_adapters()
    return logps


def behaviour_logps(policy, batch):
    """The sampling policy's log-probs (B, T): in float32 the sampler's, equal to `score_tokens` but
    for float noise; bfloat16 rounds the two apart by more than GSPO's clip range: computed anew."""
    return batch.sampled_logps if DTYPE == "float32" else score_without_grad(policy, batch)


# ======================================== Optimisation ==========================================

def begin_step(run):
    """Count the step. Its chance depends on SEED and its number alone: resuming changes nothing."""
    run.step += 1
    torch.manual_seed(hash((SEED, run.step)))
    return Meter()


def micro_batches(batch):
    """A batch's row numbers, at most MICRO_BATCH at a time and equally many of each prompt: groups
    of like length together, so that little is padding. The gradients of the parts add up."""
    group = batch.group_size()
    size = max(n for n in range(1, MICRO_BATCH + 1) if n % group == 0 or group % n == 0)
    groups = torch.arange(len(batch.ended), device=batch.ended.device).unflatten(0, (-1, group))
    order = batch.completion_mask.sum(1)[groups].sum(1).argsort(stable=True)
    return groups[order].flatten().split(size)


def new_optimizer(module, learning_rate):
    """AdamW over a module's trained weights; `initial_lr` is what the warm-up grows to."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.AdamW([{"params": trained, "initial_lr": learning_rate}], learning_rate,
                             ADAM_BETAS, ADAM_EPSILON, WEIGHT_DECAY, fused=True)


def optimiser_step(run, name, meter):
    """One AdamW step of a trained module on its gradient: the mean of all processes', clipped."""
    optimizer = run.trained[name][1]
    settings = optimizer.param_groups[0]
    if processes > 1:
        for parameter in settings["params"]:
            dist.all_reduce(parameter.grad.div_(processes))
    with one_line(f"step {run.step}, {name}", "finite gradients: lower LEARNING_RATE, RESUME_FROM"):
        norm = torch.nn.utils.clip_grad_norm_(settings["params"], MAX_GRAD_NORM or math.inf,
                                              error_if_nonfinite=True)
    done = float(next(iter(optimizer.state.values()), {"step": 0})["step"])
    settings["lr"] = settings["initial_lr"] * min(1.0, (done + 1) / max(1, WARMUP_STEPS))
    optimizer.step()
    optimizer.zero_grad()
    run.finished = None  # until the step is
    meter.add({"grad_norm": norm, "learning_rate": settings["lr"]})


class Meter:
    """What a step measures: weighted means by name, of all processes; and seconds by phase."""

    def __init__(self):
        self.pairs, self.seconds = defaultdict(list), defaultdict(float)
        self.last = time.perf_counter()

    def add(self, values, weights=None):
        """Add tensors or numbers to the means of their names; all count alike without weights."""
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=WIDE).detach()
            weight = torch.ones_like(value) if weights is None else weights
            self.pairs[name].append(torch.stack([(value * weight).sum(), weight.sum()]))

    def lap(self, phase):
        """Add the seconds since the last lap to a phase, queued GPU work included."""
        getattr(torch, torch.device(DEVICE).type).synchronize()
        self.seconds[phase] += time.perf_counter() - self.last
        self.last = time.perf_counter()

    def means(self):
        """The metrics by name."""
        sums = everyone({name: sum(pairs).tolist() for name, pairs in self.pairs.items()})
        metrics = {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}
        for name in self.pairs:
            total, weight = map(sum, zip(*(each[name] for each in sums)))
            metrics[name] = total / weight if weight else math.nan
        return metrics


def measure_rollout(run, meter, batch, rewards, parts):
    """Measure a rollout: rewards, lengths, how far sampler and trainer are apart."""
    groups, lengths = rewards.unflatten(0, (-1, GROUP_SIZE)), batch.completion_mask.sum(1)
    run.num_tokens += sum(everyone(int(lengths.sum())))
    meter.add({"reward": rewards, "reward_std": groups.std(1, correction=min(1, GROUP_SIZE - 1)),
               "frac_reward_zero_std": without_spread(groups), "accuracy": parts["verifier"],
               **{f"rewards/{name}": scores for name, scores in parts.items()},
               "completions/mean_length": lengths, "completions/clipped_ratio": ~batch.ended})
    meter.add({"sampling_logp_difference": (batch.sampled_logps - batch.old_logps).abs()},
              batch.completion_mask)


# ======================================= Reward and data ========================================

NUMBER = re.compile(r"""
    (?:(?<![a-z\d.)}\]])([-\u2013\u2212]))?  # a minus, unless it subtracts
    \\?[$\xa3\xa5\u20ac\u20b9]?  # a currency
    (?<![a-z\d^/])(?<!\d:)(?<!\^[-{])(?<!\^\{-)  # not inside a word, a power, a date or a time
    (?:(\d{1,9})[ \\](?=\d+/))?+  # the 3 of 3 1/2; then its 1, or any number: 5, 0.5, .5, 5e-3
    ((?:\d{1,99}+(?:\.\d{1,99})?+|(?<![\d.])\.\d{1,99}+)(?:e[+-]?\d{1,3})?+)
    (?:[ ]?/[ ]?([1-9]\d{0,98}+(?:\.\d{1,99})?+))?+(?:[ ]?(hundred|thousand|million)s?\b)?+  # 2
    (?!\d|[:/]\d|\^(?!\{?\\circ)  # no digits or power may follow, nor a variable: 5x (5m is fine)
      |\\?(?:pi|[a-fi-kn-rt-z])(?![a-z]))""", re.VERBOSE | re.IGNORECASE)


def last_number(text):
    r"""The last number in a text, as a Fraction; None without one. 99 digits are the most.

    >>> [str(last_number(text)) for text in ("-1,234.50", "12-5", r"3\frac12", "2 million", "5x")]
    ['-2469/2', '5', '7/2', '2000000', 'None']
    """
    text = re.sub(r"(?<=\d)(?:\{?,\}?|,?\\[,!]|[\u2009\u202f])(?=\d{3}(?!\d))", "", text)  # 1,234
    part = r" *(?:{([^{}]*)}|(\d))"
    text = re.sub(rf"\\[dt]?frac{part}{part}", r"\\\1\2/\3\4", text)  # 3\frac{1}{2} -> 3\1/2
    if found := NUMBER.findall(text):
        minus, whole, top, bottom, factor = found[-1]
        value = Fraction(top) / Fraction(bottom) + int(whole or 0) if bottom else Fraction(top)
        value *= {"": 1, "h": 100, "t": 1000, "m": 10**6}[factor[:1].lower()]
        return -value if minus else value


def verify(rows, responses):
    """1.0 where the response's last number equals the reference answer's last number, else 0.0."""
    pairs = [(last_number(row["answer"]), last_number(text)) for row, text in zip(rows, responses)]
    return [float(right is not None and given == right) for right, given in pairs]


def load_reward_function():
    """REWARD_FUNCTION of questions, responses and references; or compute_score, of one answer."""
    path, name = re.fullmatch(r"(.*?)(?::(\w+))?", REWARD_FUNCTION).groups("compute_score")
    with one_line(f"REWARD_FUNCTION={REWARD_FUNCTION}", "file.py:name or file.py (compute_score)"):
        sys.path.append(str(find_path(path).parent))  # for what it imports from beside it
        spec = importlib.util.spec_from_file_location("reward_function", find_path(path))
        module = sys.modules["reward_function"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, name)
    if name == "compute_score":
        return lambda rows, texts: [function(row.get("data_source", ""), text, row["answer"], row)
                                    for row, text in zip(rows, texts)]
    return lambda rows, texts: function([row["question"] for row in rows], texts,
                                        [row["answer"] for row in rows])


def load_scorers(row):
    """The sources of the reward by name: functions of rows and responses, that give scores; tried
    on a row. A reward model with a chat template reads chats, any other [CLS] q [SEP] a [SEP]."""
    scorers, answer = {"verifier": verify}, row["answer"]
    if REWARD_FUNCTION:
        scorers["function"] = load_reward_function()
        beginnings = [answer[:i] for i in range(GROUP_SIZE)]
        checked_scores("function", scorers["function"], [row] * GROUP_SIZE, beginnings)
    if not REWARD_WEIGHTS.get("model"):
        return scorers
    tokenizer = load(AutoTokenizer, REWARD_MODEL, "REWARD_MODEL")
    model, _ = load(AutoModelForSequenceClassification, REWARD_MODEL, "REWARD_MODEL",
                    dtype=getattr(torch, DTYPE), output_loading_info=True)
    model, chat = model.to(FROZEN_DEVICE).eval(), bool(tokenizer.chat_template)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.bos_token or tokenizer.eos_token
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left" if chat else "right"
    model.config.pad_token_id = tokenizer.pad_token_id  # where a decoder's answer ends

    @torch.no_grad()
    def score(rows, responses):
        asked = [(row["question"], text) for row, text in zip(rows, responses)]
        pairs = sorted(set(asked), key=lambda pair: (len("".join(pair)), pair))
        scores = {}  # each pair is scored once, among those of like length
        for some in (pairs[at:at + REWARD_BATCH] for at in range(0, len(pairs), REWARD_BATCH)):
            texts = [tokenizer.apply_chat_template([
                [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
                for question, text in some], tokenize=False)] if chat else zip(*some)
            inputs = tokenizer(*map(list, texts), truncation=chat or "longest_first", padding=True,
                               add_special_tokens=not chat, max_length=MAX_REWARD_TOKENS,
                               return_tensors="pt").to(model.device)
            logits = model(**inputs).logits[:, 0].float()                              # (n,)
            scores |= zip(some, (logits.sigmoid() if REWARD_SIGMOID else logits).tolist())
        return [scores[pair] for pair in asked]

    with one_line(f"REWARD_MODEL={REWARD_MODEL}", "one score a text of up to MAX_REWARD_TOKENS"):
        score([row] * 2, [answer, MAX_REWARD_TOKENS * " 1"])
        if model.num_labels > 1:
            raise ValueError(f"{model.num_labels} outputs")
    return scorers | {"model": score}


def checked_scores(name, scorer, rows, responses):
    """A source's scores, (n,), of a dict its "score"; one line if it raises or returns others."""
    with one_line(f"the reward source {name!r}", f"{len(responses)} finite numbers"):
        scores = [float(score["score"] if isinstance(score, dict) else score)
                  for score in scorer(rows, responses)]
        if len(scores) != len(responses) or not all(map(math.isfinite, scores)):
            raise ValueError(f"it returned {len(scores)}: {scores}")
    return torch.tensor(scores, device=DEVICE)


def texts_of(run, batch, kept=True):
    """The completions as texts; of the `kept` tokens (B, T) only."""
    ids = batch.completion_ids.where(batch.completion_mask * kept > 0, run.tokenizer.pad_token_id)
    return run.tokenizer.batch_decode(ids, skip_special_tokens=True)


def score_completions(run, rows, batch, kept=True):
    """Rewards (B,), and each source's unweighted scores (B,); of the `kept` tokens (B, T) only."""
    rows, texts = [rows[i] for i in batch.prompt_index.tolist()], texts_of(run, batch, kept)
    parts = {name: checked_scores(name, each, rows, texts) for name, each in run.scorers.items()}
    return sum(REWARD_WEIGHTS.get(name, 0.0) * scores for name, scores in parts.items()), parts


def read_table(path, kind):
    """A file as a DataFrame: {"a": {"b": 1}} is a column "a.b"; JSON's numbers stay as written."""
    if (kind or path.suffix[1:]) == "parquet":
        return pd.json_normalize(pyarrow.parquet.read_table(path).to_pylist())
    text = path.read_text(encoding="utf-8-sig").strip()
    read = partial(json.loads, parse_float=str, parse_int=str)
    rows = read(text) if text[:1] == "[" else [read(line) for line in text.split("\n") if line]
    return pd.json_normalize(rows)


def load_rows(name, tokenizer):
    """All rows {question, answer, prompt_ids} of a dataset constant, less those with too long ones.
    Further keys of an entry name columns to be kept. A question may be a list of messages."""
    rows = []
    for entry in globals()[name]:
        path, hub = entry["path"], re.match("hf://datasets/(.+?/.+?)/(.+)", entry["path"])
        columns = {"question": entry["input"], "answer": entry["output"]} | {
            key: entry[key] for key in entry.keys() - {"path", "type", "input", "output"}}
        with one_line(f"{name}: {path}", "parquet or json with text in the columns "
                      f"{', '.join(columns.values())}; see data/convert.py, or `hf download` it"):
            found = hf_hub_download(*hub.groups(), repo_type="dataset") if hub else find_path(path)
            files = [found] if os.path.exists(found) else sorted(glob.glob(str(found))) or [found]
            table = pd.concat(read_table(Path(file), entry.get("type")) for file in files)
            if missing := set(columns.values()) - set(table):
                raise ValueError(f"no column {', '.join(missing)}; it has {[*table]}")
            table = table[[*columns.values()]].set_axis([*columns], axis=1).map(
                lambda x: str(x) if isinstance(x, (int, float)) and x == x else x)  # x != x: none
            chats = table["question"].map(lambda value: value if isinstance(value, list)
                                          else [{"role": "user", "content": value}])
            table["question"] = chats.map(lambda chat: chat[-1]["content"])
            text = table.map(lambda value: isinstance(value, str))
            if table.empty or not text.all(axis=None):
                raise ValueError(f"{len(table)} rows, {(~text).sum().to_dict()} without text")
        rows += table.assign(chat=chats).to_dict("records")
    with one_line(f"POLICY_MODEL={POLICY_MODEL}", "a tokenizer with a chat template"):
        prompts = tokenizer.apply_chat_template([row.pop("chat") for row in rows],
                                                add_generation_prompt=True,
                                                enable_thinking=ENABLE_THINKING)["input_ids"]
        if len(set(map(tuple, prompts))) < len({row["question"].strip() for row in rows}):
            raise ValueError("different questions give the same prompt")
    kept = [row | {"prompt_ids": ids} for row, ids in zip(rows, prompts)
            if len(ids) <= MAX_PROMPT_TOKENS]
    print(f"{name}: {len(kept)} of {len(rows)} questions are within {MAX_PROMPT_TOKENS=}")
    return kept


def next_questions(run, count):
    """This process's share of the next `count` rows; each pass has an order of its own."""
    size, start = len(run.train_rows), run.questions
    run.questions += count
    ahead = [row for number in range(start // size, (run.questions - 1) // size + 1)
             for row in random.Random(f"{SEED} {number}").sample(run.train_rows, size)]
    return ahead[start % size:][:count][rank::processes]


# ========================================= Evaluation ===========================================

def evaluate(run):
    """Held-out accuracy, reward and length, always of the same questions and random numbers."""
    torch.manual_seed(SEED)
    meter, shown = Meter(), []
    blocks = (run.eval_rows[at:at + EVAL_BATCH] for at in range(0, len(run.eval_rows), EVAL_BATCH))
    for some in filter(None, (block[rank::processes] for block in blocks)):
        greedy = texts_of(run, sample_groups(run.policy, run.tokenizer, some, 1, temperature=0))
        batch = sample_groups(run.policy, run.tokenizer, some, 1, EVAL_TEMPERATURE)
        rewards, parts = score_completions(run, some, batch)
        meter.add({"eval/accuracy": parts["verifier"], "eval/reward": rewards,
                   "eval/accuracy_greedy": torch.tensor(verify(some, greedy)),
                   "eval/mean_length": batch.completion_mask.sum(1)})
        for i, (row, text) in enumerate(zip(some, texts_of(run, batch))):
            by = ", ".join(f"{name} {scores[i]:.2f}" for name, scores in parts.items())
            shown.append(f"  {row['question']}\n    {text}\n    reward {rewards[i]:.2f} ({by})\n")
    meter.lap("eval")
    metrics = meter.means()
    heading = ("step {}: held-out accuracy {eval/accuracy:.3f} sampled, {eval/accuracy_greedy:.3f} "
               "greedy; reward {eval/reward:.3f}; {eval/mean_length:.1f} tokens\n")
    run.samples = heading.format(run.step, **metrics) + "".join(shown[:SHOW_SAMPLES])
    tqdm.write(run.samples)
    return metrics


# ==================================== Checkpoints and plots =====================================

SHOWN = {"reward": "reward", "accuracy": "accuracy", "kl": "KL",  # beside the progress bar
         "completions/mean_length": "length", "clip_ratio/region_mean": "clipped"}
PANELS = {  # of the plot: metrics and constants by title; what a script does not have is not drawn
    "Accuracy": "accuracy eval/accuracy eval/accuracy_greedy",
    "Mean reward": "reward eval/reward",
    "Policy loss": "policy_loss",
    "Relative advantage": "advantage/mean advantage/size",
    **ALGORITHM_PANELS,
    "Entropy, nats per token": "entropy",
    "Mean response length, tokens": "completions/mean_length eval/mean_length",
    "Clip fraction, of tokens": "clip_ratio/region_mean clip_ratio/high_mean clip_ratio/low_mean",
    "Shares": "completions/clipped_ratio frac_reward_zero_std",
    "Seconds per step": "time/update time/rollout time/reward time/logps",
}


def finish_step(run, metrics, name=""):
    """Evaluate, write the step's row, save and draw, each when it is due: all of it at the end of
    an epoch, of the run, or of a stage, whose `name` is then the checkpoint's."""
    if any(everyone(run.stopping)):
        run.total_steps = run.step  # Ctrl-C: this step is the last
    epoch, rest = divmod(run.step, run.steps_per_epoch)
    ends = name or rest == 0 or run.step == run.total_steps
    name = name or (f"step_{run.step}" if rest else f"epoch_{epoch}")
    run.finished = {"name": name, "step": run.step, "questions": run.questions,
                    "num_tokens": run.num_tokens, "state": dict(run.state)}
    row = {"step": run.step, "epoch": run.step / run.steps_per_epoch, "num_tokens": run.num_tokens,
           **metrics, "step_time": sum(metrics[key] for key in metrics if key[:5] == "time/")}
    if DEVICE.startswith("cuda"):
        row["peak_memory"] = torch.cuda.max_memory_allocated() / 1e9  # GB
    run.history.append(row)
    if ends or EVAL_EVERY and run.step % EVAL_EVERY == 0:
        row |= evaluate(run)
    if rank == 0:
        put(run.folder / "metrics.csv", partial(pd.DataFrame(run.history).to_csv, index=False))
        if ends or SAVE_EVERY and run.step % SAVE_EVERY == 0:
            save_checkpoint(run)
        if "eval/accuracy" in row:
            plot_metrics(run)
    run.bar.set_postfix_str(", ".join(f"{label} {row[key]:.3g}" for key, label in SHOWN.items()
                                      if key in row), refresh=False)
    run.bar.update(run.step - run.bar.n)


def put(path, write):
    """Write a file whole in the place of the old one, unless, on Windows, a program has it open."""
    write(path.with_name(f".{path.name}"))
    with suppress(PermissionError):
        os.replace(path.with_name(f".{path.name}"), path)


def save_checkpoint(run):
    """Write a checkpoint under a temporary name, then rename it: a kill leaves only whole ones."""
    new = run.folder / f".{run.finished['name']}.partial{rank or ''}"  # each process has its own
    new.mkdir()
    (new / "train_script.py").write_bytes(run.source)
    (new / "samples.txt").write_text(run.samples, encoding="utf-8")
    (new / "constants.json").write_text(json.dumps(run.facts, indent=2))
    if run.step:  # epoch_0 is the start: nothing to go on from
        run.policy.save_pretrained(new)
        run.tokenizer.save_pretrained(new)
        for part, (module, optimizer) in run.trained.items():
            if part != "policy" or LORA_RANK:
                weights = {name: each.data for name, each in module.named_parameters()
                           if each.requires_grad or optimizer is None}  # no adapter's base
                save_file(weights, new / f"{part}.safetensors")
            if optimizer is not None:
                torch.save(optimizer.state_dict()["state"], new / f"{part}_optimizer.pt")
        (new / "trainer_state.json").write_text(json.dumps(run.finished))
        pd.DataFrame(run.history).to_csv(new / "metrics.csv", index=False)
    os.replace(new, run.folder / run.finished["name"])


def rescue(run):
    """Save what is trained, unless a further step has changed it; say what to resume from."""
    if run.finished and run.step and not (run.folder / run.finished["name"]).exists():
        if processes > 1:  # in a group, transformers saves in its first process only
            dist.destroy_process_group()
        with suppress(Exception):  # a full disk, or another process was faster
            save_checkpoint(run)
        shutil.rmtree(run.folder / f".{run.finished['name']}.partial{rank or ''}", True)
    saved = sorted(run.folder.glob("[!.]*/trainer_state.json"), key=os.path.getmtime)
    last = saved[-1].parent if saved else RESUME_FROM
    return f"go on with RESUME_FROM={last}" if last else "nothing was trained yet"


def load_checkpoint(run, folder):
    """Put networks, optimisers and metrics back to where `folder` left them."""
    with one_line(f"RESUME_FROM={folder}", "a whole epoch_N or step_N folder, N > 0"):
        for part, (module, optimizer) in run.trained.items():
            if part != "policy" or LORA_RANK:
                module.load_state_dict(load_file(folder / f"{part}.safetensors"), strict=False)
            if optimizer is not None:
                state = torch.load(folder / f"{part}_optimizer.pt", "cpu", weights_only=True)
                optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        run.history = pd.read_csv(folder / "metrics.csv").to_dict("records")


def plot_metrics(run):
    """Draw PANELS into training_metrics.png."""
    table = pd.DataFrame(run.history).set_index("step").dropna(axis=1, how="all")
    panels = [(title, names.split()) for title, names in PANELS.items()
              if set(names.split()) & set(table)]
    figure = Figure(figsize=(15, 3 * math.ceil(len(panels) / 4)), layout="constrained")
    for place, (title, names) in enumerate(panels, 1):
        axes = figure.add_subplot(math.ceil(len(panels) / 4), 4, place, title=title)
        for name in filter(DEFAULTS.__contains__, names):
            axes.axhline(globals()[name], color="grey", linestyle="--", label=name)
        for name in filter(table.__contains__, names):  # dots: not measured in each step
            points = table[name].dropna()
            axes.plot(points, label=name, marker="" if len(points) == run.step else ".")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{run.facts['script']}: {POLICY_MODEL}, seed {SEED}, by step")
    put(run.folder / "training_metrics.png", partial(figure.savefig, dpi=110))


# ======================================== Command line ==========================================

RULES = """
    PROFILE in ("full", "embedded") and DTYPE in ("float32", "bfloat16") and OUTPUT_DIR != ""
    {DEVICE[:4], FROZEN_DEVICE[:4]} <= {"cpu", "cuda", "mps"}  # cuda:1: the second; mps: Apple's
    all(int(d[5:] or 0) < torch.cuda.device_count() for d in (DEVICE, FROZEN_DEVICE) if "cuda" in d)
    "mps" not in (DEVICE, FROZEN_DEVICE) or DTYPE == "float32" and torch.mps.device_count() > 0
    min(BATCH_SIZE, GROUP_SIZE, MAX_NEW_TOKENS, MAX_PROMPT_TOKENS, MINIBATCH, MICRO_BATCH) >= 1
    min(NUM_EPOCHS, EVAL_BATCH, REWARD_BATCH, LOGITS_AT_ONCE, LORA_ALPHA) >= 1
    min(MAX_STEPS, EVAL_EVERY, EVAL_QUESTIONS, SAVE_EVERY, SHOW_SAMPLES, WARMUP_STEPS) >= 0
    min(LEARNING_RATE, WEIGHT_DECAY, ADAM_EPSILON, MAX_GRAD_NORM, EVAL_TEMPERATURE, THREADS) >= 0
    0 <= SEED < 2**53 and LORA_RANK >= 0 and TEMPERATURE >= 0.01 and MAX_REWARD_TOKENS >= 8
    len(ADAM_BETAS) == 2 and 0 <= min(ADAM_BETAS) <= max(ADAM_BETAS) < 1
    BATCH_SIZE * GROUP_SIZE % MINIBATCH == 0  # a rollout is whole minibatches
    BATCH_SIZE % processes == MINIBATCH % processes == 0  # torchrun's processes share them
    MINIBATCH // processes % GROUP_SIZE == 0 or GROUP_SIZE % (MINIBATCH // processes) == 0
    set(REWARD_WEIGHTS) <= {"model", "verifier", "function"} and any(REWARD_WEIGHTS.values())
    bool(REWARD_FUNCTION) == bool(REWARD_WEIGHTS.get("function"))  # a file and a weight, or neither
    math.isfinite(sum(REWARD_WEIGHTS.values())) and train_datasets and eval_datasets
    all({"path", "input", "output"} <= set(entry) for entry in train_datasets + eval_datasets)
    all(type(text) is str for entry in train_datasets + eval_datasets for text in entry.values())
"""
rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
made_again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # going back
WIDE = torch.float32 if torch.backends.mps.is_available() else torch.float64  # Apple's GPUs lack it
PROJECT = next((folder for folder in (*Path(__file__).resolve().parents, Path.cwd())
                if (folder / "data" / "build.py").exists()), Path.cwd())  # where data/ is
PLACES = [Path.cwd(), PROJECT]  # where relative paths lead from; first, where a resumed run began


def fail(message):
    """Stop with one line on standard error and exit status 1."""
    time.sleep(5 * (rank > 0))  # the first process speaks, and torchrun ends the others
    raise SystemExit(f"error: {message}")


@contextmanager
def one_line(what, expected):
    """Turn any error inside into one line: what it is about, the error's words, what to expect."""
    try:
        yield
    except (Exception, SystemExit) as error:  # files, libraries, users' functions raise anything
        if isinstance(error, SystemExit) and str(error).startswith("error: "):  # it is one line
            raise
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        fail(f"{what}: {kind}{' '.join(str(error).split())[:250]}; expected {expected}")


def everyone(value):
    """The list of all processes' values."""
    values = [value] * processes
    if processes > 1:
        dist.all_gather_object(values, value)
    return values


def find_path(path):
    """A path or pattern in the first of PLACES where it leads somewhere; `~` is the home folder."""
    found = [place / Path(path).expanduser() for place in PLACES]
    return next((one for one in found if one.exists() or glob.glob(str(one))), Path(path))


def resolve(values, profile):
    """The constants' values in a profile."""
    return {name: value[profile == "embedded"] if isinstance(value, Either) else value
            for name, value in values.items()}


def parse(argument):
    """'NAME=VALUE' as (name, value of the constant's type), or one line and exit."""
    name, equals, value = argument.partition("=")
    known = resolve(DEFAULTS, "full")
    if not equals or name not in known:
        fail(f"{argument!r} is not NAME=VALUE; expected one of {', '.join(known)}")
    kind = float if name == "CLIP_RANGE" else type(known[name])
    with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = value if kind is str else ast.literal_eval(value)
    if type(value) in (int, float) and kind in (int, float) and math.isfinite(value):
        value = kind(value) if kind(value) == value else value  # 1 for 1.0, 1000 for 1e3
    value = tuple(value) if type(value) is list and kind in (tuple, float) else value
    if value != math.inf and type(value) in (kind, tuple if name == "CLIP_RANGE" else kind):
        return name, value
    fail(f"{argument}: found {type(value).__name__}, expected {kind.__name__}, as {known[name]!r}")


def configure(arguments):
    """Set the constants: this file's, those of the checkpoint that is resumed, the command line's;
    resolve what is Either by the profile; hold them to the rules. Returns where the run stands."""
    counters = {"step": 0, "questions": 0, "num_tokens": 0, "state": {}}  # `state`: the algorithm's
    if folder := dict(map(parse, arguments)).get("RESUME_FROM", DEFAULTS["RESUME_FROM"]):
        with one_line(f"RESUME_FROM={folder}", "an epoch_N or step_N folder, N > 0, of a run"):
            folder = find_path(folder).absolute()
            facts = json.loads((folder / "constants.json").read_text())
            counters = json.loads((folder / "trainer_state.json").read_text())
            PLACES[:0] = map(Path, facts["places"])
        known = DEFAULTS.keys() - {"DEVICE", "FROZEN_DEVICE"}
        arguments = [f"{name}={value}" for name, value in facts["constants"].items()
                     if name in known] + arguments + [f"RESUME_FROM={folder}"]
    values = DEFAULTS | dict(map(parse, arguments))
    if values["PROFILE"] == "auto":
        values["PROFILE"] = "full" if torch.cuda.is_available() else "embedded"
    values = resolve(values, values["PROFILE"])
    globals().update(values)
    for rule in filter(None, map(str.strip, (ALGORITHM_RULES + RULES).splitlines())):
        with suppress(TypeError, ValueError, AttributeError, RuntimeError):  # no: it does not hold
            if eval(rule, globals()):
                continue
        found = [f"{name}={values[name]!r}" for name in values if re.search(rf"\b{name}\b", rule)]
        fail(f"{', '.join(found)}: expected {rule}")
    return counters


def load(kind, name, constant, **options):
    """`kind.from_pretrained(name)`, a folder or id; one line of help without it or a weight."""
    with one_line(f"{constant}={name}", f"a folder, `hf download {name}`, or PROFILE=embedded"):
        found = kind.from_pretrained(find_path(name).as_posix(), **options)
        if missing := "output_loading_info" in options and found[1]["missing_keys"]:
            raise ValueError(f"missing are {[*missing]}")
        return found


def load_policy(name, frozen=False):
    """A causal model without dropout; what is trained is float32: bfloat16 loses steps of 1e-6."""
    dtype = getattr(torch, DTYPE) if frozen or LORA_RANK else torch.float32
    what = "RESUME_FROM" if name == RESUME_FROM else "POLICY_MODEL"
    with one_line(f"{what}={name}, LORA_RANK={LORA_RANK}", "for LoRA: pip install peft"):
        if (find_path(name) / "adapter_config.json").exists():  # trained with LORA_RANK
            from peft import AutoPeftModelForCausalLM
            model = load(AutoPeftModelForCausalLM, name, what, dtype=dtype).merge_and_unload()
        else:
            model, _ = load(AutoModelForCausalLM, name, what, dtype=dtype, output_loading_info=True)
        model = model.to(FROZEN_DEVICE if frozen else DEVICE).eval().requires_grad_(not frozen)
        if LORA_RANK and not frozen:  # beside every linear layer but the head
            from peft import LoraConfig
            model.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=0.0,
                                         target_modules="all-linear", task_type="CAUSAL_LM"))
            for parameter in filter(lambda each: each.requires_grad, model.parameters()):
                parameter.data = parameter.data.float()  # peft gives it the base's dtype
    for layer in model.modules():  # transformers' own way works in training mode only
        if GRADIENT_CHECKPOINTING and not frozen and isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(made_again, layer.forward)
    return model


def check_policy(run):
    """Stop unless sampling, scoring and the model's own forward pass agree, also on a text as long
    as can be: a window of attention, or a transform behind the head, would train a wrong thing."""
    policy, count, longest = run.policy, min(8, MAX_NEW_TOKENS), MAX_PROMPT_TOKENS + MAX_NEW_TOKENS
    ids = [*(row["prompt_ids"] for row in run.train_rows), [run.tokenizer.pad_token_id or 0]]
    known, wanted = policy.get_input_embeddings().num_embeddings, max(map(max, ids)) + 1
    places = getattr(policy.config, "max_position_embeddings", None) or longest
    with one_line(f"POLICY_MODEL={POLICY_MODEL}", f"full attention over MAX_PROMPT_TOKENS + "
                  f"MAX_NEW_TOKENS = {longest}; README.md says which models were tried"):
        if wanted > known or longest > places:
            raise ValueError(f"{places} positions of {longest}, {known} token ids of {wanted}")
        rows = [{"prompt_ids": ids[0]}, {"prompt_ids": (ids[0] * longest)[:longest - count]}]
        batch = sample_groups(policy, run.tokenizer, rows, 2, length=count)
        logps, _ = score_tokens(policy, batch)                                         # (4, T)
        logps.sum().backward()
        policy.zero_grad()
        texts = torch.cat([batch.prompt_ids, batch.completion_ids], 1)                 # (4, L + T)
        with torch.no_grad():  # each text alone, without padding before it, in the weights' dtype
            own = torch.cat([policy(input_ids=text[None, at:], logits_to_keep=logps.shape[1] + 1
                                    ).logits[:, :-1].float().mT / TEMPERATURE  # (1, V, T)
                             for text, at in zip(texts, (batch.prompt_mask == 0).sum(1))])
        own = -F.cross_entropy(own, batch.completion_ids, reduction="none") * batch.completion_mask
        apart = torch.stack([logps, batch.sampled_logps]).sub(own).abs().clamp(max=1)  # (2, 4, T)
        if not (apart := apart.mean((1, 2)).max()) < (1e-4 if DTYPE == "float32" else 0.1):
            raise ValueError(f"log-probs are {apart:.2g} nats off {policy.config.model_type}'s own")


def new_folder():
    """Make the run's folder: OUTPUT_DIR, or with _2, _3, ... behind it. Who makes it has it."""
    folder = PROJECT / Path(OUTPUT_DIR.replace("{script}", Path(__file__).stem)).expanduser()
    with one_line(f"OUTPUT_DIR={OUTPUT_DIR}", "a folder that can be made"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            with suppress(FileExistsError):
                (one := folder.with_name(folder.name + f"_{number}" * (number > 1))).mkdir()
                return one


def start(arguments):
    """From the command line to a run. What can be checked before models load is checked first."""
    counters = configure(arguments)
    torch.set_num_threads(THREADS or torch.get_num_threads())
    torch.backends.cuda.matmul.fp32_precision = "tf32" if DTYPE == "bfloat16" else "ieee"  # heads'
    torch.manual_seed(SEED)
    if DEVICE.startswith("cuda"):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", torch.device(DEVICE).index or 0)))
    if processes > 1:
        dist.init_process_group("gloo" if DEVICE == "cpu" else "nccl")
    if rank:  # only the first process speaks
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = load(AutoTokenizer, POLICY_MODEL, "POLICY_MODEL")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # it is masked: any will do
    train_rows = load_rows("train_datasets", tokenizer)
    eval_rows = load_rows("eval_datasets", tokenizer)[:EVAL_QUESTIONS or None]
    epoch = len(train_rows) // BATCH_SIZE  # steps in it
    total_steps = min(NUM_EPOCHS * epoch, MAX_STEPS or math.inf)
    if counters["step"] >= total_steps or len(eval_rows) < processes:
        fail(f"step {counters['step']} of {total_steps} with {len(train_rows)}, {len(eval_rows)} "
             "questions; expected more: raise NUM_EPOCHS, MAX_STEPS, lower BATCH_SIZE")
    scorers = load_scorers(train_rows[0])
    policy = load_policy(POLICY_MODEL if LORA_RANK else RESUME_FROM or POLICY_MODEL)
    run = SimpleNamespace(
        policy=policy, tokenizer=tokenizer, scorers=scorers, train_rows=train_rows,
        trained={"policy": (policy, new_optimizer(policy, LEARNING_RATE))},  # saved; and a critic
        reference=None,  # the policy as it started, if the algorithm needs a copy of it
        eval_rows=eval_rows, steps_per_epoch=epoch, total_steps=total_steps, history=[], samples="",
        source=Path(__file__).read_bytes(), stopping=0.0, finished=None, **counters | {"state": {}})
    prepare(run)
    if RESUME_FROM:
        load_checkpoint(run, find_path(RESUME_FROM))
        run.state |= counters["state"]
    check_policy(run)
    run.folder = everyone(None if rank else new_folder())[0]
    if REWARD_FUNCTION:
        shutil.copy(find_path(re.sub(r":\w+$", "", REWARD_FUNCTION)), run.folder)
    describe(run, arguments)
    return run


def describe(run, arguments):
    """Print what trains on what, and where to; keep for constants.json what describes the run."""
    status, commit = subprocess.getstatusoutput(f'git -C "{PROJECT}" rev-parse HEAD')
    device = torch.cuda.get_device_name(DEVICE) if DEVICE.startswith("cuda") else DEVICE
    run.facts = {"script": Path(__file__).stem, "command": sys.argv, "device": device,
                 "commit": "" if status else commit, "places": [*dict.fromkeys(map(str, PLACES))],
                 "torch": torch.__version__, "transformers": transformers.__version__,
                 "processes": processes, "constants": {name: globals()[name] for name in DEFAULTS}}
    trained = sum(p.numel() for p in run.policy.parameters() if p.requires_grad) / 1e6
    silent = sum(last_number(row["answer"]) is None for row in run.train_rows)
    print(f"""{run.facts["script"]}
  profile   {PROFILE}, {"a" if torch.cuda.is_available() else "no"} CUDA GPU; {device}; {DTYPE}
  settings  {" ".join(arguments) or "as in the file"}
  policy    {POLICY_MODEL}, {trained:.2f} M parameters to train
  reward    {" + ".join(f"{weight} {name}" for name, weight in REWARD_WEIGHTS.items() if weight)}
  data      {len(run.train_rows)} questions, {len(run.eval_rows)} held out; {silent} without a \
number{": use REWARD_FUNCTION=RL_HAND/self_play/reward_func.py" * bool(silent)}
  rollout   {BATCH_SIZE} prompts x {GROUP_SIZE} completions of at most {MAX_NEW_TOKENS} tokens
  update    minibatch {MINIBATCH}, micro-batch {MICRO_BATCH}, learning rate {LEARNING_RATE:g}
  algorithm {", ".join(f"{name}={globals()[name]}" for name in ALGORITHM_SHOWN.split())}
  steps     {run.step} of {run.total_steps} done, {run.steps_per_epoch} an epoch; {processes=}
  output    {run.folder}
""", flush=True)


def main(arguments):
    """`python SCRIPT [NAME=VALUE ...]`, or `torchrun --nproc_per_node=N SCRIPT ...`"""
    if {"-h", "--help"} & set(arguments):
        source = Path(__file__).read_text(encoding="utf-8").partition("\nDEFAULTS")[0]
        return print(__doc__, source[source.index("# --- Model"):], sep="\n")
    run = None
    for stream in {sys.stdout, sys.stderr} & {sys.__stdout__, sys.__stderr__}:  # no notebook's
        stream.reconfigure(errors="replace")  # what a terminal cannot show

    def stop_soon(number, frame):
        """The first time this step becomes the last. (torchrun passes signals on a second time.)"""
        if run is None or run.stopping and time.monotonic() > run.stopping + 2:
            raise KeyboardInterrupt
        run.stopping = run.stopping or time.monotonic()

    signal.signal(signal.SIGINT, stop_soon)
    signal.signal(signal.SIGTERM, stop_soon)
    try:
        run = start(arguments)
        with tqdm(total=run.total_steps, initial=run.step, unit="step", ncols=120,
                  disable=rank > 0) as run.bar:
            if run.step == 0:
                finish_step(run, {})  # what there is before training
            train(run)
        everyone(None)  # nobody leaves while another still writes
    except SystemExit as error:  # a source of rewards failed, say
        raise SystemExit(f"{error}; {rescue(run)}" if run else error.code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except RuntimeError as error:
        if processes == 1 or not re.search("gloo|nccl|[Cc]onnection", str(error)):
            raise
        fail(f"another process of this run has ended; RESUME_FROM a checkpoint in {run.folder}")
    print(f"step {run.step}. In {run.folder}: training_metrics.png, metrics.csv, and checkpoints")
    if run.stopping:
        raise SystemExit(130)


globals().update(resolve(DEFAULTS, "full"))  # until `configure` knows the profile

if __name__ == "__main__":
    main(sys.argv[1:])
