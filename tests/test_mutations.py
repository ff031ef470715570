"""Known bugs of such scripts, put into gspo.py one at a time: each must make its tests fail.

A mutation is a text of the script and what takes its place. The text must occur exactly once, so
that rewriting the script cannot silently switch a mutation off; and it is the named test that must
fail. The tests run in processes that are forked from one that has PyTorch loaded.
"""

import contextlib
import json
import multiprocessing
import os

import pytest

from conftest import ROOT, SCRIPT

LOSS, BATCHING = "test_gspo_loss.py::", "test_gspo_batching.py::"
SPEED = "test_speed_and_memory.py::"

MUTATIONS = {  # name: (text, what takes its place, the test that must fail)
    "the ratio is the sum of the log-ratios": (
        "log_ratio = ((logps - old_logps) * mask).sum(1, keepdim=True) / length",
        "log_ratio = ((logps - old_logps) * mask).sum(1, keepdim=True)",
        LOSS + "test_ratio_does_not_grow_with_length"),
    "padding counts in the ratio": (
        "((logps - old_logps) * mask).sum(1", "(logps - old_logps).sum(1",
        LOSS + "test_ratio_by_hand"),
    "GRPO's ratio for each token": (
        "torch.exp(log_ratio.detach() + (logps - logps.detach()))", "torch.exp(logps - old_logps)",
        LOSS + "test_gspo_token_has_the_very_ratio_of_gspo"),
    "the token form rounds its ratio": (
        "+ (logps - logps.detach())", "+ logps - logps.detach()",
        LOSS + "test_gspo_token_has_the_very_ratio_of_gspo"),
    "the loss has the wrong sign": (
        "loss = -torch.min(", "loss = torch.min(",
        LOSS + "test_only_the_harmful_side_is_cut"),
    "max in place of min": (
        "-torch.min(ratio", "-torch.max(ratio",
        LOSS + "test_only_the_harmful_side_is_cut"),
    "no clipping": (
        "-torch.min(ratio * advantages, clipped * advantages)", "-ratio * advantages",
        LOSS + "test_only_the_harmful_side_is_cut"),
    "clipping alone, without the min": (
        "-torch.min(ratio * advantages, clipped * advantages)", "-clipped * advantages",
        LOSS + "test_only_the_harmful_side_is_cut"),
    "the clip range is symmetric": (
        "clipped = ratio.clamp(1 - low, 1 + high)", "clipped = ratio.clamp(1 - low, 1 + low)",
        LOSS + "test_the_clip_range_may_be_asymmetric"),
    "a huge ratio overflows": (
        "log_ratio = log_ratio.clamp(max=20.0)", "pass",
        LOSS + "test_huge_log_ratios"),
    "clip fractions ignore the advantage's sign": (
        "((ratio < 1 - low) & (advantages < 0)).float()", "(ratio < 1 - low).float()",
        LOSS + "test_clip_fractions_count_what_is_cut"),
    "equal scores are divided by noise": (
        "masked_fill(without_spread(groups), 0.0).nan_to_num(0.0)", "nan_to_num(0.0)",
        LOSS + "test_equal_scores_get_advantages_of_exactly_zero"),
    "advantages over the rollout where the group is asked for": (
        "if USE_GROUP_NORMALIZATION else", "if not USE_GROUP_NORMALIZATION else",
        LOSS + "test_advantages_are_those_of_the_equation"),
    "the std always divides by n - 1": (
        "group_std(groups, STD_CORRECTION)", "group_std(groups)",
        LOSS + "test_advantages_are_those_of_the_equation"),
    "the loss is normalised in each micro-batch": (
        "(token_loss * micro.weights).sum().backward()",
        "(token_loss * token_weights(micro.completion_mask)).sum().backward()",
        LOSS + "test_train_minimises_the_stated_loss"),
    "tokens weigh the same, so that long answers weigh more": (
        "return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)",
        "return mask / mask.sum()",
        LOSS + "test_token_weights"),
    "the ratio is against the policy of the last update": (
        "policy_loss(logps, micro.old_logps,", "policy_loss(logps, logps.detach(),",
        LOSS + "test_train_minimises_the_stated_loss"),
    "padding counts in the metrics": (
        "self.totals[name] += (value.detach() * mask).sum()",
        "self.totals[name] += value.detach().sum()",
        LOSS + "test_metrics_are_means_over_what_they_say"),
    "KL is k1": (
        "return 1.0 - ratio * (1.0 + ref_logps - logps)", "return logps - ref_logps",
        LOSS + "test_kl_is_unbiased_in_value_and_in_gradient"),
    "KL is k3 without the ratio": (
        "return 1.0 - ratio * (1.0 + ref_logps - logps)",
        "return torch.exp(ref_logps - logps) - 1.0 - (ref_logps - logps)",
        LOSS + "test_kl_is_unbiased_in_value_and_in_gradient"),
    "KL's ratio carries no gradient": (
        "1.0 - ratio * (1.0", "1.0 - ratio.detach() * (1.0",
        LOSS + "test_kl_is_unbiased_in_value_and_in_gradient"),
    "KL is subtracted": (
        "+ kl_coef * kl", "- kl_coef * kl",
        LOSS + "test_signs_of_the_three_terms"),
    "the KL coefficient moves the wrong way": (
        "1.5 if kl > 2 * TARGET_KL else 0.5 if", "0.5 if kl > 2 * TARGET_KL else 1.5 if",
        LOSS + "test_adaptive_kl_coefficient"),
    "entropy is punished": (
        "- ENTROPY_COEF * entropy", "+ ENTROPY_COEF * entropy",
        LOSS + "test_signs_of_the_three_terms"),
    "entropy carries no gradient": (
        "centred = logits.sub_(expected[rows, None]).mul_(d_entropy[rows, None])",
        "centred = torch.zeros_like(logits)",
        LOSS + "test_entropy_is_that_of_the_distribution"),
    "entropy is -log p of the drawn token": (
        "return chosen - lse, lse - expected", "return chosen - lse, lse - chosen",
        LOSS + "test_entropy_is_that_of_the_distribution"),
    "scoring forgets the temperature": (
        "logits = product(states[rows], weight[columns].T) / TEMPERATURE        # (r, c)\n"
        "            new =",
        "logits = product(states[rows], weight[columns].T)\n            new =",
        BATCHING + "test_the_sampled_distribution_is_the_scored_one"),
    "sampling forgets the temperature": (
        "/ (temperature or 1.0)", "/ 1.0",
        BATCHING + "test_the_sampled_distribution_is_the_scored_one"),
    "the generation_config's top_k is used": (
        "    probs = logps.exp()\n",
        "    probs = logps.exp()\n    probs = probs * (probs >= probs.topk(20).values[:, -1:])\n",
        BATCHING + "test_sampling_follows_the_softmax_and_nothing_else"),
    "the token that crosses TOP_P is dropped": (
        "ordered.cumsum(-1) - ordered >= top_p", "ordered.cumsum(-1) >= top_p",
        BATCHING + "test_nucleus"),
    "the end token is not scored": (
        "self.mask.index_put_(where, running.float())",
        "self.mask.index_put_(where, (running & ~torch.isin(token, self.ends)).float())",
        BATCHING + "test_the_mask_ends_with_the_first_end_token"),
    "only the tokenizer's end id ends a completion": (
        "[*configured, tokenizer.eos_token_id]", "[tokenizer.eos_token_id]",
        BATCHING + "test_the_mask_ends_with_the_first_end_token"),
    "log-probs are those of the token before": (
        "some.completion_ids[mask]", "some.completion_ids.roll(1, 1)[mask]",
        BATCHING + "test_batched_scores_are_those_of_plain_forward_passes"),
    "padded prompts are attended to": (
        "torch.cat([seen[of], mask", "torch.cat([torch.ones_like(seen[of]), mask",
        BATCHING + "test_what_is_in_the_padding_never_matters"),
    "positions count padding": (
        "return (mask.cumsum(1) - 1).clamp(min=0)",
        "return torch.arange(mask.shape[1], device=mask.device).expand_as(mask)",
        BATCHING + "test_positions_count_real_tokens"),
    "a completion's positions start at 0": (
        "positions(before)[:, seen.shape[1]:]", "positions(mask[:, :-1])",
        BATCHING + "test_batched_scores_are_those_of_plain_forward_passes"),
    "prompts get no gradient": (
        "positions(seen), cache)[:, -1:]", "positions(seen), cache)[:, -1:].detach()",
        BATCHING + "test_gradient_with_shared_prompts_is_that_of_plain_forward_passes"),
    "rows that stay lose their own cache": (
        "(self.row, self.token, self.place, self.seen, *self.cache.buffers())",
        "(self.row, self.token, self.place, self.seen)",
        BATCHING + "test_dropping_finished_rows_changes_nothing"),
    "groups are mixed": (
        ".repeat_interleave(group_size)", ".repeat(group_size)",
        BATCHING + "test_the_mask_ends_with_the_first_end_token"),
    "every pass has the same minibatches": (
        "torch.randperm(len(groups), generator=generator)",
        "torch.arange(len(groups))",
        BATCHING + "test_minibatches_hold_every_completion_once_a_pass"),
    "bfloat16 keeps the sampler's log-probs": (
        'exact = DTYPE == "float32"', "exact = True",
        BATCHING + "test_bfloat16_rescores_the_old_log_probs"),
    "log-probs in bfloat16": (
        "return a.float() @ b.float()", "return (a.bfloat16() @ b.bfloat16()).float()",
        BATCHING + "test_batched_scores_are_those_of_plain_forward_passes"),
    "tiles forget what the tiles before had summed": (
        "total[rows] = total[rows] * shrink + weights.sum(1)",
        "total[rows] = total[rows] + weights.sum(1)",
        SPEED + "test_tiles_give_the_plain_values_and_gradients"),
    "only the first tile of the head gets a gradient": (
        "d_weight[columns] += product(d_logits.T, states[rows])",
        "d_weight[:len(d_logits.T)] += product(d_logits.T, states[rows])",
        SPEED + "test_tiles_give_the_plain_values_and_gradients"),
    "bfloat16 sums are rounded": (
        "return a.float() @ b.float()",
        "return (a @ b).float()",
        SPEED + "test_in_bfloat16_only_the_inputs_are_rounded"),
    "the decoder decides on the host": (
        "running = ~self.ended.index_select(0, row)",
        "running = ~self.ended.index_select(0, row) if self.count else bool(self.ended.any())\n"
        "        self.token[0] = int(token[0])",
        SPEED + "test_a_step_can_be_captured_and_replayed"),
    "a step makes a buffer anew": (
        "self.column += 1\n", "self.column = self.column + 1\n",
        SPEED + "test_a_step_can_be_captured_and_replayed"),
    "chance is drawn for the rows that are left": (
        "chance = self.chance.index_select(1, self.t)[:, 0].index_select(0, row)",
        "chance = self.chance.index_select(1, self.t)[:n, 0]",
        SPEED + "test_a_row_does_not_depend_on_what_is_decoded_beside_it"),
    "the decoding copy stays as it was loaded": (
        "weights[name.replace(\".base_layer\", \"\")].copy_(parameter)", "pass",
        SPEED + "test_the_decoding_copy_follows_the_weights"),
    "the decoding copy is without the adapter": (
        "weights[f\"{name}.weight\"] += module.get_delta_weight(\"default\")", "pass",
        SPEED + "test_the_decoding_copy_has_the_adapter_merged"),
    "the reference keeps the adapter on": (
        "run.policy.disable_adapters()", "run.policy.enable_adapters()",
        SPEED + "test_the_reference_of_lora_is_the_base_model"),
}


class CalledTests:
    """A pytest plugin: which tests failed in their own code, and how many passed."""

    def __init__(self):
        self.failed, self.passed = [], 0

    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            self.passed += report.passed
            if report.failed:
                self.failed.append(report.nodeid.split("/")[-1].split("[")[0])


def run_tests(script, names, output):
    """In a process of its own: run tests on a script; writes exit status and results to a file."""
    os.environ |= {"RL_HAND_SCRIPT": str(script), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    calls = CalledTests()
    with open(output.with_suffix(".log"), "w") as log, contextlib.redirect_stdout(log), \
            contextlib.redirect_stderr(log):
        status = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:unraisableexception",
                              *(str(ROOT / "tests" / name) for name in names)], plugins=[calls])
    output.write_text(json.dumps([int(status), calls.failed, calls.passed]))


def results_of(source, names, folder):
    """Exit status, failed tests and number of passed ones, for this source of the script."""
    compile(source, "mutated", "exec")
    script, output = folder / SCRIPT.name, folder / "result.json"
    script.write_text(source, encoding="utf-8")
    (folder / "constants.json").write_text(json.dumps({"project": str(ROOT)}))  # finds data/
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)
    context.set_forkserver_preload(["matplotlib.figure", "pandas", "pytest", "torch",
                                    "torch.utils.checkpoint", "tqdm.auto",
                                    "transformers.models.auto.modeling_auto",
                                    "transformers.models.qwen3.modeling_qwen3",
                                    "transformers.models.qwen3_moe.modeling_qwen3_moe"])
    process = context.Process(target=run_tests, args=(script, names, output))
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        raise AssertionError("the tests did not end within 120 s")
    assert output.exists(), (folder / "result.log").read_text()[-2000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(name, tmp_path):
    text, instead, test = MUTATIONS[name]
    source = SCRIPT.read_text(encoding="utf-8")
    assert source.count(text) == 1, f"{text!r} is there {source.count(text)} times: adapt it"
    status, failed, _ = results_of(source.replace(text, instead), [test], tmp_path)
    assert status == 1 and failed == [test], (tmp_path / "result.log").read_text()[-2000:]


def test_the_script_as_it_is_passes_these_tests(tmp_path):
    """So that it is the mutations that fail, and not the tests in a process of their own."""
    tests = sorted({test for _, _, test in MUTATIONS.values()})
    status, failed, passed = results_of(SCRIPT.read_text(encoding="utf-8"), tests, tmp_path)
    assert status == 0 and not failed, (tmp_path / "result.log").read_text()[-2000:]
    assert passed > len(tests)  # some are run for several parameters
