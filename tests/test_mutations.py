"""Known bugs of such scripts, put into gspo.py one at a time: each must make its test fail.

A mutation is a text of the script and what takes its place. The text must occur exactly once, so
that rewriting the script cannot silently switch a mutation off; and it is an assertion of the named
test that must fail, for some of its parameters: a script that crashes would prove nothing.
"""

import inspect
import itertools

import pytest
import test_gspo_batching as batching
import test_gspo_loss as loss
import test_processes as shared
import test_resume as resume
import test_run as runs
from conftest import SCRIPT, import_file, mutated_copy

MUTATIONS = {  # name: (text, what takes its place, the test that must fail)
    # ---- Advantages
    "equal scores are divided by noise": (
        "advantages.masked_fill(without_spread(groups), 0.0)", "advantages",
        loss.test_equal_scores_get_advantages_of_exactly_zero),
    "advantages over the rollout where the group is asked for": (
        "if USE_GROUP_NORMALIZATION else", "if not USE_GROUP_NORMALIZATION else",
        loss.test_advantages_are_those_of_the_equation),
    "the std always divides by n - 1": (
        "correction=STD_CORRECTION", "correction=1",
        loss.test_advantages_are_those_of_the_equation),
    "sentences are compared with all others": (
        "groups.mean(1, keepdim=True)", "groups.mean(tuple(range(1, groups.ndim)), keepdim=True)",
        loss.test_advantages_are_those_of_the_equation),
    "a sentence is rewarded for all before it": (
        "torch.stack(beginnings, 1).diff(dim=1)", "torch.stack(beginnings, 1)[:, 1:]",
        batching.test_sentences_rewards_add_up),
    # ---- Loss
    "the ratio is the sum of the log-ratios": (
        "log_ratio = ((logps - old_logps) * mask).sum(1, keepdim=True) / length",
        "log_ratio = ((logps - old_logps) * mask).sum(1, keepdim=True)",
        loss.test_ratio_does_not_grow_with_length),
    "padding counts in the ratio": (
        "((logps - old_logps) * mask).sum(1", "(logps - old_logps).sum(1",
        loss.test_ratio_by_hand),
    "GRPO's ratio for each token": (
        "torch.exp(log_ratio.detach() + (logps - logps.detach()))", "torch.exp(logps - old_logps)",
        loss.test_gspo_token_has_the_very_ratio_of_gspo),
    "the token form rounds its ratio": (
        "+ (logps - logps.detach())", "+ logps - logps.detach()",
        loss.test_gspo_token_has_the_very_ratio_of_gspo),
    "the loss has the wrong sign": (
        "loss = -torch.min(", "loss = torch.min(", loss.test_only_the_harmful_side_is_cut),
    "max in place of min": (
        "-torch.min(ratio", "-torch.max(ratio", loss.test_only_the_harmful_side_is_cut),
    "no clipping": (
        "-torch.min(ratio * advantages, clipped * advantages)", "-ratio * advantages",
        loss.test_only_the_harmful_side_is_cut),
    "clipping alone, without the min": (
        "-torch.min(ratio * advantages, clipped * advantages)", "-clipped * advantages",
        loss.test_only_the_harmful_side_is_cut),
    "the clip range is symmetric": (
        "clipped = ratio.clamp(1 - low, 1 + high)", "clipped = ratio.clamp(1 - low, 1 + low)",
        loss.test_the_clip_range_may_be_asymmetric),
    "a huge ratio overflows": (
        "log_ratio = log_ratio.clamp(max=20.0)", "pass", loss.test_huge_log_ratios),
    "clip fractions ignore the advantage's sign": (
        "((ratio < 1 - low) & (advantages < 0)).float()", "(ratio < 1 - low).float()",
        loss.test_clip_fractions_count_what_is_cut),
    "tokens weigh the same, so that long answers weigh more": (
        "return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)",
        "return mask / mask.sum()", loss.test_token_weights),
    # ---- KL and entropy
    "KL is k1": (
        "return 1.0 - ratio * (1.0 + ref_logps - logps)", "return logps - ref_logps",
        loss.test_kl_is_unbiased_in_value_and_in_gradient),
    "KL is k3 without the ratio": (
        "return 1.0 - ratio * (1.0 + ref_logps - logps)",
        "return torch.exp(ref_logps - logps) - 1.0 - (ref_logps - logps)",
        loss.test_kl_is_unbiased_in_value_and_in_gradient),
    "KL's ratio carries no gradient": (
        "1.0 - ratio * (1.0", "1.0 - ratio.detach() * (1.0",
        loss.test_kl_is_unbiased_in_value_and_in_gradient),
    "KL is subtracted": (
        "token_loss + kl_coef * kl", "token_loss - kl_coef * kl",
        loss.test_signs_of_the_three_terms),
    "the KL coefficient moves the wrong way": (
        "1.5 if kl > 2 * TARGET_KL else 0.5 if", "0.5 if kl > 2 * TARGET_KL else 1.5 if",
        loss.test_adaptive_kl_coefficient),
    "entropy is punished": (
        "- ENTROPY_COEF * entropy", "+ ENTROPY_COEF * entropy",
        loss.test_signs_of_the_three_terms),
    "entropy carries no gradient": (
        "-(logps.exp() * logps).sum(1)]", "-(logps.exp() * logps).sum(1).detach()]",
        loss.test_entropy_is_that_of_the_distribution),
    "entropy is -log p of the drawn token": (
        "-(logps.exp() * logps).sum(1)]", "-logps.gather(1, tokens[:, None])[:, 0]]",
        loss.test_entropy_is_that_of_the_distribution),
    "the reference of LoRA keeps the adapter on": (
        "run.policy.disable_adapters()", "run.policy.enable_adapters()",
        batching.test_the_reference_of_lora_is_the_model_without_its_adapter),
    # ---- How `train` puts it together
    "the loss is normalised in each micro-batch": (
        "(token_loss * micro.weights).sum().backward()",
        "(token_loss * token_weights(micro.completion_mask)).sum().backward()",
        loss.test_train_minimises_the_stated_loss),
    "the ratio is against the policy of the last update": (
        "policy_loss(logps, micro.old_logps,", "policy_loss(logps, logps.detach(),",
        loss.test_train_minimises_the_stated_loss),
    "padding counts in the metrics": (
        "torch.ones_like(value) if weights is None else weights", "torch.ones_like(value)",
        loss.test_metrics_are_means_over_what_they_say),
    "metrics are means of micro-batches' means": (
        "self.pairs[name].append(torch.stack([(value * weight).sum(), weight.sum()]))",
        "self.pairs[name].append(torch.stack([(value * weight).sum() / weight.sum(), "
        "torch.ones_like(weight).mean()]))",
        loss.test_metrics_are_means_over_what_they_say),
    "every pass has the same minibatches": (
        "torch.randperm(len(groups))", "torch.arange(len(groups))",
        batching.test_minibatches_hold_every_completion_once_a_pass),
    "a micro-batch has more answers to one question than to another": (
        "if n % group == 0 or group % n == 0)", ")",
        batching.test_minibatches_hold_every_completion_once_a_pass),
    # ---- Sampling
    "sampling forgets the temperature": (
        "/ (temperature or 1.0)", "/ 1.0",
        batching.test_the_sampled_distribution_is_the_scored_one),
    "the generation_config's top_k is used": (
        "total = all_logps.exp().cumsum(",
        "total = all_logps.where(all_logps >= all_logps.topk(20).values[:, -1:], -math.inf).exp()."
        "cumsum(",
        batching.test_sampling_follows_the_softmax_and_nothing_else),
    "the end token is not scored": (
        "mask[row, t] = token, 1.0", "mask[row, t] = token, (~torch.isin(token, ends)).float()",
        batching.test_the_mask_ends_with_the_first_end_token),
    "only the tokenizer's end id ends a completion": (
        "{*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}",
        "{tokenizer.eos_token_id}",
        batching.test_either_source_of_end_ids_is_enough),
    "the second end id is ignored": (
        "(ends if isinstance(ends, list) else [ends])",
        "(ends[:1] if isinstance(ends, list) else [ends])",
        batching.test_either_source_of_end_ids_is_enough),
    "groups are mixed": (
        ".repeat_interleave(group_size)", ".repeat(group_size)",
        batching.test_the_mask_ends_with_the_first_end_token),
    "decoding attends to the prompts' padding": (
        "seen = prompt_mask[:, None, None].bool()",
        "seen = torch.ones_like(prompt_mask)[:, None, None].bool()",
        batching.test_dropping_finished_rows_changes_nothing),
    "decoding's positions stand still": (
        "value=True), place + 1", "value=True), place",
        batching.test_the_sampled_distribution_is_the_scored_one),
    "rows that stay lose their own cache": (
        "cache.batch_select_indices(going)",
        "cache.batch_select_indices(torch.arange(len(going)))",
        batching.test_dropping_finished_rows_changes_nothing),
    "chance is drawn for the rows that are left": (
        "point = chance[row, t, None]", "point = chance[:len(row), t, None]",
        batching.test_a_completion_does_not_depend_on_those_beside_it),
    "all processes draw the same chance": (
        "chance[rank::processes].flatten(0, 1)", "chance[:len(rows)].flatten(0, 1)",
        batching.test_a_completion_does_not_depend_on_those_beside_it),
    # ---- Log-probabilities
    "scoring forgets the temperature": (
        "torch.log_softmax(logits_of(states, weight) / TEMPERATURE, -1)",
        "torch.log_softmax(logits_of(states, weight), -1)",
        batching.test_the_sampled_distribution_is_the_scored_one),
    "log-probs are those of the token before": (
        "tokens = batch.completion_ids[", "tokens = batch.completion_ids.roll(1, 1)[",
        batching.test_packed_scores_are_those_of_plain_forward_passes),
    "a token sees another completion of its row": (
        "visible = (part[:, None] == 0) | (part[:, None] == part[:, :, None])",
        "visible = part[:, None] <= part[:, :, None]",
        batching.test_packed_scores_are_those_of_plain_forward_passes),
    "the first token is read off the wrong column": (
        "torch.cat([(length - 1).repeat_interleave", "torch.cat([length.repeat_interleave",
        batching.test_packed_scores_are_those_of_plain_forward_passes),
    "the other tokens are read off their own column": (
        "column[:, :-1]], 1)", "column[:, 1:]], 1)",
        batching.test_packed_scores_are_those_of_plain_forward_passes),
    "padded prompts are attended to": (
        "real = torch.cat([prompt_mask.bool(), fed], 1)",
        "real = torch.cat([torch.ones_like(prompt_mask).bool(), fed], 1)",
        batching.test_what_is_in_the_padding_never_matters),
    "a completion's positions start at 0": (
        "length + number % longest", "number % longest + 0 * length",
        batching.test_packed_scores_are_those_of_plain_forward_passes),
    "a completion's positions go on from the one before it": (
        "length + number % longest", "length + number",
        batching.test_packed_scores_are_those_of_plain_forward_passes),
    "the head gets no gradient": (
        "logps_and_entropy, some, weight, ids)", "logps_and_entropy, some, weight.detach(), ids)",
        batching.test_packed_scores_are_those_of_plain_forward_passes),
    "all logits are kept for the backward pass": (
        "made_again(logps_and_entropy, some", "logps_and_entropy(some",
        batching.test_logits_at_once_changes_the_memory_and_nothing_else),
    "log-probs in bfloat16": (
        "return states.float() @ weight.float().T",
        "return (states.bfloat16() @ weight.bfloat16().T).float()",
        batching.test_packed_scores_are_those_of_plain_forward_passes),
    "bfloat16 keeps the sampler's log-probs": (
        'if DTYPE == "float32" else score_without_grad(policy, batch)', "",
        batching.test_bfloat16_rescores_the_old_log_probs),
    "bfloat16 rounds the head's weights": (
        "@ weight.float().T", "@ weight.to(getattr(torch, DTYPE)).float().T",
        batching.test_in_bfloat16_the_head_sums_in_float32),
    "the head is under the autocast of what is around it": (
        "with torch.autocast(states.device.type, enabled=False):", "if True:",
        batching.test_in_bfloat16_the_head_sums_in_float32),
    # ---- Constants, resuming, and several processes
    "what was set once stays set": (
        "values = DEFAULTS | dict(map(parse, arguments))",
        "values = DEFAULTS\n    values.update(map(parse, arguments))",
        runs.test_an_edited_constant_holds_in_every_profile),
    "a step's chance is what the steps before have left": (
        "torch.manual_seed(hash((SEED, run.step)))", "pass",
        resume.test_resumed_run_equals_the_uninterrupted_one),
    "the KL coefficient is not resumed": (
        'run.state |= counters["state"]', "pass",
        resume.test_resumed_run_equals_the_uninterrupted_one),
    "the questions begin again": (
        '**counters | {"state": {}}', '**counters | {"state": {}, "questions": 0}',
        resume.test_resumed_run_equals_the_uninterrupted_one),
    "the optimiser is not resumed": (
        'optimizer.load_state_dict(optimizer.state_dict() | {"state": state})', "pass",
        resume.test_resumed_run_equals_the_uninterrupted_one),
    "the gradient is not averaged over the processes": (
        "dist.all_reduce(parameter.grad.div_(processes))", "parameter.grad.div_(processes)",
        shared.test_the_gradient_is_the_mean_of_all_processes),
    "the gradient is the sum of the processes'": (
        "dist.all_reduce(parameter.grad.div_(processes))", "dist.all_reduce(parameter.grad)",
        shared.test_the_gradient_is_the_mean_of_all_processes),
}


def combinations(test):
    """All of a test's parameters, as pytest would combine them: a list of dicts."""
    axes = []
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names, values = mark.args
            names = [name.strip() for name in names.split(",")]
            axes.append([dict(zip(names, value if len(names) > 1 else [value]))
                         for value in values])
    return [{name: value for part in parts for name, value in part.items()}
            for parts in itertools.product(*axes)]


@pytest.fixture(scope="module")
def models():
    """The policy and its tokenizer, for all mutations; the tests leave them as they are."""
    return {"policy": batching.policy.__wrapped__(), "tokenizer": batching.tokenizer.__wrapped__()}


def call(test, script, models, folder, parameters):
    """Run a test on a script, its fixtures made for it alone."""
    wanted = inspect.signature(test).parameters
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "SCRIPT", script)
        available = {**models, **parameters, "tmp_path": folder, "monkeypatch": patch}
        available["gspo"] = available["embedded"] = import_file(script)
        if "embedded" in wanted:
            available["embedded"].configure(["PROFILE=embedded", "DEVICE=cpu"])
        if "whole" in wanted:
            available["whole"] = resume.whole_run(folder)
        test(**{name: available[name] for name in wanted})


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(name, models, tmp_path):
    text, instead, test = MUTATIONS[name]
    mutated = mutated_copy(SCRIPT, text, instead, tmp_path)
    for i, parameters in enumerate(combinations(test)):
        (tmp_path / str(i)).mkdir()
        try:
            call(test, mutated, models, tmp_path / str(i), parameters)
        except AssertionError:
            return
    raise AssertionError(f"{test.__name__} does not see that {name}")


def test_the_script_as_it_is_passes_these_tests(models, tmp_path):
    """So that it is the mutations that fail, and not the tests as they are called here."""
    copied = mutated_copy(SCRIPT, "SEED = 0", "SEED = 0", tmp_path)
    for i, test in enumerate({test for _, _, test in MUTATIONS.values()}):
        (tmp_path / str(i)).mkdir()
        call(test, copied, models, tmp_path / str(i), combinations(test)[0])
