"""People's own models: each kind is trained right, or refused in one line, and nothing is written.

The models are tiny and random, made by transformers' own configurations with the tokenizer of
data/policy. What "right" is comes from transformers alone: a model loaded anew reads each text by
itself, without padding, cache or packing; log-probs and gradients must be those.
"""

import inspect
import json
import os
import re
import shutil
from pathlib import Path
from types import MethodType

import pandas as pd
import pytest
import torch
import transformers
from conftest import ROOT, SCRIPT, import_file, mutated_copy
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoTokenizer)

TABLES = import_file(ROOT / "tools" / "tables.py", "tables_of_architectures")
POLICY = ROOT / "data" / "policy"
LONGEST = 64  # tokens of a prompt and an answer, at most
SMALL = ["PROFILE=embedded", "DEVICE=cpu", "BATCH_SIZE=2", "GROUP_SIZE=8", "MINIBATCH=16",
         "MICRO_BATCH=16", "KL_COEF=0", "MAX_PROMPT_TOKENS=48", "MAX_NEW_TOKENS=16",
         "MAX_STEPS=1", "EVAL_QUESTIONS=2", "SHOW_SAMPLES=0", "TEMPERATURE=0.8"]
BASE = dict(vocab_size=416, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LONGEST,
            bos_token_id=None, eos_token_id=2, pad_token_id=0, initializer_range=0.3)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=LONGEST)
OPT = dict(ffn_dim=64, word_embed_proj_dim=32)
LINEAR = dict(head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
              linear_num_value_heads=2, layer_types=["linear_attention", "full_attention"])
GEMMA = dict(head_dim=8, query_pre_attn_scalar=8)
PICTURES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                image_size=28, patch_size=14)
STRETCHED = dict(max_position_embeddings=512, original_max_position_embeddings=48, rope_parameters={
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 48,
    "short_factor": [1.0] * 4, "long_factor": [4.0] * 4})
MODELS = {  # name, as in tables.py -> transformers' model type, what differs from BASE
    "Arcee": ("arcee", {}), "BLOOM": ("bloom", dict(n_layer=2, n_head=4)),
    "CodeGen": ("codegen", GPT2 | dict(rotary_dim=4)),
    "Cohere": ("cohere", dict(logit_scale=0.25)), "Cohere with logit_scale=1": ("cohere", dict(
        logit_scale=1.0)),
    "DeepSeek-V3": ("deepseek_v3", dict(
        n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, num_key_value_heads=4,
        moe_intermediate_size=16, first_k_dense_replace=1)),
    "DiffLlama": ("diffllama", {}), "ERNIE 4.5": ("ernie4_5", dict(head_dim=8)),
    "Falcon": ("falcon", dict(alibi=False)), "Falcon with ALiBi": ("falcon", dict(alibi=True)),
    "Gemma": ("gemma", dict(head_dim=8)), "Gemma 2": ("gemma2", GEMMA),
    "Gemma 3": ("gemma3_text", GEMMA),
    "Gemma 3 with a short window": ("gemma3_text", GEMMA | dict(sliding_window=16)),
    "Gemma 3 with pictures": ("gemma3", dict(
        text_config=BASE | GEMMA, vision_config=PICTURES, mm_tokens_per_image=4)),
    "Gemma 4": ("gemma4_text", dict(head_dim=8, vocab_size_per_layer_input=416)),
    "GLM-4": ("glm4", dict(head_dim=8)), "GPT-2": ("gpt2", GPT2),
    "GPT-2 with 40 positions": ("gpt2", GPT2 | dict(n_positions=40, max_position_embeddings=40)),
    "GPT-BigCode": ("gpt_bigcode", GPT2), "GPT-J": ("gptj", GPT2 | dict(rotary_dim=4)),
    "GPT-Neo": ("gpt_neo", dict(num_layers=2, num_heads=4, max_position_embeddings=512,
                                attention_types=[[["global", "local"], 1]])),
    "GPT-NeoX": ("gpt_neox", {}),
    "GPT-OSS": ("gpt_oss", dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8)),
    "Granite": ("granite", dict(logits_scaling=8.0)),
    "Granite with logits_scaling=1": ("granite", dict(embedding_multiplier=2.0)),
    "Helium": ("helium", dict(head_dim=8)), "Hunyuan": ("hunyuan_v1_dense", dict(head_dim=8)),
    "Jamba": ("jamba", dict(num_experts=2, use_mamba_kernels=False)),
    "LFM2": ("lfm2", dict(layer_types=["conv", "full_attention"])),
    "Llama": ("llama", dict(tie_word_embeddings=True)),
    "Llama with an untied head": ("llama", dict(tie_word_embeddings=False)),
    "Llama with 40 positions": ("llama", dict(max_position_embeddings=40)),
    "Mamba": ("mamba", dict(state_size=4)), "Mistral": ("mistral", dict(sliding_window=None)),
    "Mistral with a long window": ("mistral", dict(sliding_window=LONGEST - 1)),
    "Mistral with a short window": ("mistral", dict(sliding_window=LONGEST - 16)),
    "Mixtral": ("mixtral", dict(num_local_experts=4)),
    "MPT": ("mpt", dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=512)),
    "Nemotron": ("nemotron", {}), "OLMo 2": ("olmo2", {}), "OLMo 3": ("olmo3", {}),
    "OPT": ("opt", OPT),
    "Phi": ("phi", {}), "Phi-3": ("phi3", {}), "Phi-3 with long positions": ("phi3", STRETCHED),
    "Qwen2": ("qwen2", {}), "Qwen2-MoE": ("qwen2_moe", EXPERTS),
    "Qwen3": ("qwen3", dict(head_dim=8)),
    "Qwen3-MoE": ("qwen3_moe", EXPERTS | dict(head_dim=8)),
    "Qwen3-Next": ("qwen3_next", EXPERTS | LINEAR), "Qwen3.5": ("qwen3_5_text", LINEAR),
    "Seed-OSS": ("seed_oss", dict(head_dim=8)), "SmolLM3": ("smollm3", {}),
    "StableLM": ("stablelm", {}), "StarCoder2": ("starcoder2", {}),
    "StarCoder2 with a short window": ("starcoder2", dict(sliding_window=16)),
}
RESULTS = {name: result for result, names, _ in TABLES.ARCHITECTURES for name in names.split(", ")}
WORK = [name for name in MODELS if RESULTS.get(name) == "works"]
REASONS = {  # the reason in the table -> whether it is true of a model
    "scaled logits": lambda model: getattr(model, "logit_scale", 1) != 1
    or getattr(model.config, "logits_scaling", 1) != 1,
    "capped logits": lambda model: model.config.final_logit_softcapping,
    "head with bias": lambda model: model.get_output_embeddings().bias.abs().max() > 0,
    "window too short": lambda model: model.config.sliding_window < LONGEST - 1,
    "too few positions": lambda model: model.config.max_position_embeddings < LONGEST,
    "positions that stretch": lambda model:
        model.config.rope_parameters["original_max_position_embeddings"] < LONGEST,
    "positions as biases": lambda model: re.search(
        "alibi", inspect.getsource(type(model.base_model)).lower()),
    "linear attention": lambda model: any(re.search("mamba|conv|linear_attn", name)
                                          for name, _ in model.named_modules()),
    "attention without SDPA": lambda model: model.config._attn_implementation == "eager",
}


# ---- Models, and what transformers says of them


def new_model(kind, changes, loader=AutoModelForCausalLM):
    """A random model, whose norms and biases, too, are as they are in no other."""
    torch.manual_seed(0)
    model = loader.from_config(AutoConfig.for_model(kind, **(BASE | changes)))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def saved(model, folder, **tokenizer_settings):
    """The model's folder, with the tokenizer; a setting of None leaves it out."""
    if model.can_generate():
        model.generation_config.eos_token_id = [2, *range(300, 380)]  # answers of many lengths
    model.save_pretrained(folder)
    for file in POLICY.glob("*token*"):
        shutil.copy(file, folder)
    shutil.copy(POLICY / "chat_template.jinja", folder)
    settings(folder, **tokenizer_settings)
    return folder


def settings(folder, file="tokenizer_config.json", **changes):
    values = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """folder_of(name): the folder of an architecture's model, made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def folder(name):
        if name not in made:
            made[name] = saved(new_model(*MODELS[name]), root / name.replace(" ", "_"))
        return made[name]

    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Questions of many lengths, as an argument for both data sets."""
    path = tmp_path_factory.mktemp("data") / "questions.parquet"
    texts = [f"What is {i}?" if i % 2 else f"Ann has {i} and finds {7 * i}." for i in range(6)]
    pd.DataFrame({"question": texts, "answer": map(str, range(6))}).to_parquet(path)
    entry = [{"path": str(path), "input": "question", "output": "answer"}]
    return [f"train_datasets={entry}", f"eval_datasets={entry}"]


@pytest.fixture
def script(questions, tmp_path):
    """The script, imported anew, with `arguments`."""
    torch.set_num_threads(1)
    module = import_file(SCRIPT)
    module.arguments = [*SMALL, *questions, "REWARD_WEIGHTS={'verifier': 1.0}",
                        f"OUTPUT_DIR={tmp_path / 'runs' / 'run'}"]
    return module


def started(script, policy, *more):
    """The run after its start: the check has passed."""
    return script.start([*script.arguments, f"POLICY_MODEL={policy}", *more])


def files_of(arguments):
    """The files of the models that are named, with the times at which they were changed."""
    return [(path, path.stat().st_mtime_ns) for each in arguments
            if each.startswith(("POLICY_MODEL=", "REWARD_MODEL="))
            for path in sorted(Path(each.partition("=")[2]).rglob("*"))]


def refusal(script, *more):
    """The one line with which `main` stops; no folder is made, no file of a model changed."""
    before = files_of(more)
    with pytest.raises(SystemExit) as stop:
        script.main([*script.arguments, *more])
    line = stop.value.code  # a text: the interpreter prints it and exits with 1
    assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line
    assert before == files_of(more)
    output = next(each for each in script.arguments if each.startswith("OUTPUT_DIR="))
    assert not Path(output.partition("=")[2]).parent.exists()
    return line


def rollout(run, script, count=2):
    """Completions of the first questions: prompts and answers of several lengths."""
    batch = script.sample_groups(run.policy, run.tokenizer, run.train_rows[:count], 8)
    assert len(set(batch.completion_mask.sum(1).tolist())) > 1
    assert len(set(batch.prompt_mask.sum(1).tolist())) == count
    return batch


def alone(model, batch, temperature=0.8):
    """transformers' own log-probs of the completion tokens, (n,): each text by itself."""
    found = []
    for prompt, seen, ids, mask in zip(batch.prompt_ids, batch.prompt_mask.bool(),
                                       batch.completion_ids, batch.completion_mask.bool()):
        text = torch.cat([prompt[seen], ids[mask]])
        logits = model(input_ids=text[None]).logits[0, int(seen.sum()) - 1:-1].float() / temperature
        found.append(logits.log_softmax(-1).gather(1, ids[mask][:, None])[:, 0])
    return torch.cat(found)


# ---- Architectures


def test_the_table_names_the_models_that_are_tried():
    assert RESULTS.keys() == MODELS.keys()
    assert set(RESULTS.values()) == {"works", *(f"refused: {reason}" for reason in REASONS)}
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert TABLES.architectures() in page  # so tools/tables.py --check finds it stale, too
    assert f"with transformers {transformers.__version__}." in TABLES.architectures()


@pytest.mark.parametrize("name", WORK)
def test_what_works_is_trained_right(script, folder_of, name):
    """Log-probs of sampler and trainer, and the gradient, are those of transformers alone; a step
    changes the weights. The rows of a training pass are longer than the model has positions."""
    run = started(script, folder_of(name))
    fresh = AutoModelForCausalLM.from_pretrained(folder_of(name)).eval()
    batch = rollout(run, script)
    real = batch.completion_mask.bool()
    logps, own = script.score_tokens(run.policy, batch)[0], alone(fresh, batch)
    assert logps[real].detach() == pytest.approx(own.detach(), abs=1e-4)
    assert batch.sampled_logps[real] == pytest.approx(own.detach(), abs=1e-4)

    weights = torch.randn(len(own))
    (logps[real] * weights).sum().backward()
    (own * weights).sum().backward()
    gradients = {each: parameter.grad for each, parameter in fresh.named_parameters()
                 if parameter.grad is not None}
    size = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for each, parameter in run.policy.named_parameters():
        apart = parameter.grad if parameter.grad is not None else torch.zeros(())
        assert (apart - gradients.get(each, 0)).norm() < 1e-4 * size, each
    script.optimiser_step(run, "policy", script.Meter())
    before = fresh.state_dict()
    changed = {each for each, after in run.policy.state_dict().items()
               if (after != before[each]).any()}
    assert changed >= {each for each, grad in gradients.items() if grad.norm() > 1e-3 * size}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in WORK])
def test_what_cannot_work_is_refused(script, folder_of, name, capfd):
    """In one line that names the model; the reason in the table is true of it."""
    model = AutoModelForCausalLM.from_pretrained(folder_of(name))
    assert REASONS[RESULTS[name].removeprefix("refused: ")](model)
    capfd.readouterr()
    line = refusal(script, f"POLICY_MODEL={folder_of(name)}")
    assert line.startswith(f"error: POLICY_MODEL={folder_of(name)}: ")
    assert f"expected full attention over MAX_PROMPT_TOKENS + MAX_NEW_TOKENS = {LONGEST}" in line
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name, less", [
    ("Mistral with a short window", 15), ("GPT-2 with 40 positions", 24),
    ("Llama with 40 positions", 24), ("Phi-3 with long positions", 16)])
def test_the_advice_helps(script, folder_of, name, less):
    """As many tokens fewer as the table says, not one more, and it works."""
    started(script, folder_of(name), f"MAX_PROMPT_TOKENS={48 - less}")


@pytest.mark.parametrize("name", WORK)
def test_what_works_works_in_bfloat16(script, folder_of, name):
    """It is not refused, and near to what float32 says."""
    run = started(script, folder_of(name), "DTYPE=bfloat16")
    fresh = AutoModelForCausalLM.from_pretrained(folder_of(name)).eval()
    batch = rollout(run, script)
    with torch.no_grad():
        real, own = batch.completion_mask.bool(), alone(fresh, batch)
        apart = (script.score_tokens(run.policy, batch)[0][real] - own).abs().clamp(max=1)
    assert 0 < apart.mean() < 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["Qwen3-MoE", "Mixtral", "DeepSeek-V3", "GPT-2"])
def test_an_adapter_is_trained_right(script, folder_of, name, dtype):
    """Beside experts too: a step changes the adapter alone, and sampler and trainer agree on what
    the model says with it, which is not what the base says."""
    pytest.importorskip("peft")
    run = started(script, folder_of(name), "LORA_RANK=4", f"DTYPE={dtype}", "LEARNING_RATE=0.05")
    before = {each: value.clone() for each, value in run.policy.state_dict().items()}
    for _ in range(2):  # an adapter's first factor has no gradient until the second is not 0
        batch = rollout(run, script)
        script.score_tokens(run.policy, batch)[0].sum().backward()
        script.optimiser_step(run, "policy", script.Meter())
    for each, after in run.policy.state_dict().items():
        assert ("lora" in each) == bool((after != before[each]).any()), each
    batch = rollout(run, script)
    with torch.no_grad():
        real, own = batch.completion_mask.bool(), alone(run.policy, batch)
        logps = script.score_tokens(run.policy, batch)[0][real]
    bound = 1e-4 if dtype == "float32" else 0.1
    for ours in (logps, batch.sampled_logps[real]):  # another expert may be chosen for a token
        assert (ours - own).abs().clamp(max=1).mean() < bound
    assert (script.reference_logps(run, batch)[real] - own).abs().mean() > 0.2


# ---- The check itself


def loud(folder):
    """A model whose logits are all near 30, as those of trained models are: bfloat16 has steps of
    0.125 there, which log-probs are off by while nothing is wrong."""
    model = new_model("gpt2", GPT2 | dict(tie_word_embeddings=False, initializer_range=0.2))
    with torch.no_grad():
        model.transformer.ln_f.bias[0], model.transformer.ln_f.weight[0] = 30.0, 0.0
        model.lm_head.weight[:, 0] = 1.0
    return saved(model, folder)


@pytest.mark.parametrize("more", [[], ["LORA_RANK=4"]])
def test_large_logits_are_not_refused_in_bfloat16(script, tmp_path, more):
    """The single worst token, which was compared at first, is off by more than 0.1."""
    if more:
        pytest.importorskip("peft")
    folder = loud(tmp_path / "loud")
    started(script, folder, "DTYPE=bfloat16", *more)
    if more:
        copy = mutated_copy(SCRIPT, "apart.mean((1, 2)).max()", "apart.max()", tmp_path)
        worst = import_file(copy)
        with pytest.raises(SystemExit, match="nats off gpt2's own"):
            worst.start([*script.arguments, "DTYPE=bfloat16", *more, f"POLICY_MODEL={folder}"])


def behind_the_head(change):
    """A fault: the model does something with its logits that a script does not do."""
    def plant(script):
        load = script.load_policy

        def loaded(*given, **options):
            policy = load(*given, **options)
            forward = policy.forward

            def changed(self, *inputs, **more):
                output = forward(*inputs, **more)
                output.logits = change(output.logits)
                return output

            policy.forward = MethodType(changed, policy)
            return policy

        script.load_policy = loaded
    return plant


def before_the_model(change):
    """A fault: the passes of a script get another mask, or other positions."""
    def plant(script):
        run_model = script.run_model
        script.run_model = lambda model, ids, mask, place, cache=None: run_model(
            model, ids, *change(mask, place), cache)
    return plant


def windowed(mask, place):
    """A training pass sees the last 16 tokens only."""
    if mask.dim() == 4 and mask.shape[2] > 1:
        mask = mask & (place[:, None, :, None] - place[:, None, None, :] < 16)
    return mask, place


FAULTS = {  # what is planted
    "logits are scaled": behind_the_head(lambda logits: 0.9 * logits),
    "logits are capped": behind_the_head(lambda logits: 5 * torch.tanh(logits / 5)),
    "logits have a bias": behind_the_head(lambda logits: logits + torch.linspace(0, 2, 416)),
    "a window of 16": before_the_model(windowed),
    "positions are swapped": before_the_model(lambda mask, place: (mask, torch.cat(
        [place[:, 1:2], place[:, :1], place[:, 2:]], 1) if place.shape[1] > 1 else place)),
    "decoding is one place ahead": before_the_model(lambda mask, place: (
        mask, place + (place.shape[1] == 1))),
    "padding is seen": before_the_model(lambda mask, place: (torch.ones_like(mask), place)
                                        if mask.dim() == 2 else (mask, place)),
    "answers see one another": before_the_model(lambda mask, place: (
        torch.ones_like(mask).tril() if mask.dim() == 4 else mask, place)),
}


@pytest.mark.parametrize("fault, dtype", [
    (fault, dtype) for fault in FAULTS for dtype in ("float32", "bfloat16")
    if (fault, dtype) != ("padding is seen", "bfloat16")])  # half the sampler's tokens are off by
def test_the_check_finds_a_fault(script, folder_of, fault, dtype):  # less than bfloat16's noise
    FAULTS[fault](script)
    line = refusal(script, f"POLICY_MODEL={folder_of('Llama')}", f"DTYPE={dtype}")
    assert re.search("log-probs are [0-9.]+ nats off llama's own; expected full attention", line)


# ---- Folders: weights, adapters, tokenizers


@pytest.fixture
def copied(folder_of, tmp_path):
    """A copy of a model's folder, to be changed."""
    return shutil.copytree(folder_of("Qwen3"), tmp_path / "copied")


def pickled(folder, change=lambda weights: None):
    """The folder's weights as hubs had them at first."""
    loader = (AutoModelForSequenceClassification if "SequenceClassification" in
              (folder / "config.json").read_text() else AutoModelForCausalLM)
    weights = loader.from_pretrained(folder).state_dict()
    change(weights)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def sharded(folder):
    """The folder's weights in several files."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def old_tokenizer(folder):
    """The folder's tokenizer in two files, without a tokenizer.json."""
    tokens = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    known = tokens["model"]["vocab"] | {each["content"]: each["id"]
                                        for each in tokens["added_tokens"]}
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tokens["model"]["merges"])]
    (folder / "vocab.json").write_text(json.dumps(known), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").unlink()
    settings(folder, tokenizer_class="Qwen2Tokenizer", added_tokens_decoder={
        str(each.pop("id")): each for each in tokens["added_tokens"]})
    return folder


@pytest.mark.parametrize("stored", [pickled, sharded, old_tokenizer])
def test_what_transformers_loads_is_loaded(script, folder_of, copied, stored):
    """The same weights and the same ids as from the folder as it was."""
    run, plain = started(script, stored(copied)), started(script, folder_of("Qwen3"))
    theirs = plain.policy.state_dict()
    assert all((value == theirs[each]).all() for each, value in run.policy.state_dict().items())
    assert run.train_rows == plain.train_rows


class Attack:
    """What a pickle can do to those who load it without care."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_weights_that_are_missing_or_an_attack(script, copied, tmp_path):
    """A policy with random layers is not trained; a pickle runs nothing."""
    def less(weights):
        del weights["model.layers.1.mlp.up_proj.weight"]

    line = refusal(script, f"POLICY_MODEL={pickled(copied, less)}")
    assert "missing are ['model.layers.1.mlp.up_proj.weight']; expected a folder" in line
    torch.save({"weight": Attack(tmp_path / "attacked")}, copied / "pytorch_model.bin")
    assert f"POLICY_MODEL={copied}: " in refusal(script, f"POLICY_MODEL={copied}")
    assert not (tmp_path / "attacked").exists()


def test_an_adapter_is_a_policy(script, folder_of, tmp_path):
    """A checkpoint of LORA_RANK is the policy of a full run, of another adapter's run and their KL
    reference; and what the README says makes a plain model of it. All say what it said."""
    pytest.importorskip("peft")
    adapted = started(script, folder_of("Qwen3"), "LORA_RANK=4", "LEARNING_RATE=0.1")
    batch = rollout(adapted, script)
    script.score_tokens(adapted.policy, batch)[0].sum().backward()
    script.optimiser_step(adapted, "policy", script.Meter())
    adapted.step, adapted.finished = 1, {"name": "epoch_1"}
    script.save_checkpoint(adapted)
    checkpoint = adapted.folder / "epoch_1"
    expected = script.score_without_grad(adapted.policy, batch)
    assert (script.reference_logps(adapted, batch) - expected).abs().max() > 0.2

    full = started(script, checkpoint, "KL_COEF=0.1")
    again = started(script, checkpoint, "KL_COEF=0.1", "LORA_RANK=2")
    assert all(each.requires_grad for each in full.policy.parameters())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search("```python\n(from peft.*?)```", readme, re.S)[1]
    assert code.count("\n") == 2
    exec(code.replace("runs/gspo/epoch_1", checkpoint.as_posix())
         .replace('"merged"', repr((tmp_path / "merged").as_posix())))
    for policy in (full.policy, full.reference, again.policy,
                   AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()):
        assert script.score_without_grad(policy, batch) == pytest.approx(expected, abs=1e-4)
    script.configure([*script.arguments, "LORA_RANK=2"])
    assert script.reference_logps(again, batch) == pytest.approx(expected, abs=1e-4)
    settings(checkpoint, "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(SystemExit, match=f"^error: POLICY_MODEL={re.escape(str(checkpoint))}: "):
        started(script, checkpoint)


def test_tokens_that_are_missing(script, copied):
    """One of end and padding token does; with neither it is said what is missing."""
    settings(copied, eos_token=None)
    rollout(started(script, copied), script)
    settings(copied, pad_token=None)
    line = refusal(import_again(script), f"POLICY_MODEL={copied}")
    assert "does not have a padding token" in line
    settings(copied, eos_token="<|im_end|>")
    run = started(script, copied)
    assert run.tokenizer.pad_token_id == run.tokenizer.eos_token_id == 2
    rollout(run, script)


def import_again(script):
    """Another module of the script, whose arguments have an output folder of its own."""
    module = import_file(SCRIPT)
    module.arguments = [re.sub(r"\bruns\b", "others", each) for each in script.arguments]
    return module


def test_tokens_beyond_the_vocabulary(script, copied):
    """A padding token, and one of the prompts', that the model has no row for."""
    tokenizer = AutoTokenizer.from_pretrained(copied)
    tokenizer.add_tokens(["<a>", "<b>"])  # rows that the model has to spare: 416 of 414
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(copied)
    assert "416 token ids of 417" in refusal(script, f"POLICY_MODEL={copied}")
    tokenizer.add_tokens(["What is"])
    tokenizer.pad_token = "<a>"
    tokenizer.save_pretrained(copied)
    assert "416 token ids of 418" in refusal(script, f"POLICY_MODEL={copied}")


@pytest.mark.parametrize("template, says", [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{% for turn in messages %}", "TemplateSyntaxError"),
    ("{{ messages[1]['content'] }}", "UndefinedError"),
    ("{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{% endfor %}", "the same prompt"),
    ("{% for turn in messages %}{% for part in turn['content'] %}{{ part['text'] }}{% endfor %}"
     "<|im_end|>{% endfor %}", "the same prompt"),
    ("{{ messages[0]['content'][:6] }}", "the same prompt"),
    ("", "chat template")])
def test_templates_that_raise_or_drop_the_text(script, copied, template, says):
    (copied / "chat_template.jinja").write_text(template)
    line = refusal(script, f"POLICY_MODEL={copied}")
    assert line.startswith(f"error: POLICY_MODEL={copied}: ") and says in line


# ---- Reward models

JUDGES = {  # name -> model type, what differs from BASE, settings of its tokenizer
    "Qwen2 without padding": ("qwen2", dict(pad_token_id=None), dict(pad_token=None)),
    "Llama": ("llama", dict(pad_token_id=None), {}),
    "GPT-2, padded on the left": ("gpt2", GPT2 | dict(n_positions=512, max_position_embeddings=512),
                                  dict(padding_side="left")),
    "Mistral with a start token": ("mistral", dict(pad_token_id=None, bos_token_id=1),
                                   dict(pad_token=None, bos_token="<|im_start|>")),
    "RoBERTa": ("roberta", dict(max_position_embeddings=600), dict(padding_side="right")),
    "DeBERTa": ("deberta-v2", dict(type_vocab_size=0, max_position_embeddings=512), {}),
}
ROWS = [{"question": f"What is {i}+{i}?", "answer": str(2 * i)} for i in range(5)]
ANSWERS = ["1. " * 30 + "Answer: 0", "2", "", "1+1=2. Answer: 4", "Answer: 8" * 9]


def judge(name, folder, chat=False, **changes):
    """A reward model's folder."""
    kind, differs, tokens = JUDGES[name]
    model = new_model(kind, dict(num_labels=1, initializer_range=0.2) | differs | changes,
                      AutoModelForSequenceClassification)
    saved(model, folder, **tokens)
    if not chat:
        (folder / "chat_template.jinja").unlink()
    return folder


def scores_of(script, folder, *more):
    """The script's scores of ANSWERS, all in one batch."""
    script.configure([*script.arguments, "REWARD_WEIGHTS={'model': 1.0}", "REWARD_SIGMOID=False",
                      f"REWARD_MODEL={folder}", *more])
    return script.load_scorers(ROWS[0])["model"](ROWS, ANSWERS)


def scores_alone(folder, *texts, **options):
    """transformers' own: each text by itself, without padding, as tensors of one."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model.config.pad_token_id = None  # there is none: a decoder's last token counts
    with torch.no_grad():
        return [model(**tokenizer(*each, return_tensors="pt", **options)).logits.item()
                for each in zip(*texts)]


@pytest.mark.parametrize("name", JUDGES)
def test_a_score_in_a_batch_is_the_score_alone(script, tmp_path, name):
    folder = judge(name, tmp_path / "judge")
    scores = scores_of(script, folder)
    expected = scores_alone(folder, [row["question"] for row in ROWS], ANSWERS)
    assert scores == pytest.approx(expected, abs=1e-5)
    assert len({f"{score:.3f}" for score in scores}) == len(scores)


def test_a_pickled_reward_model(script, tmp_path):
    folder = judge("DeBERTa", tmp_path / "judge")
    expected = scores_of(script, folder)
    assert scores_of(script, pickled(folder)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["Llama", "Mistral with a start token"])
def test_a_reward_model_with_a_chat_template_reads_chats(script, tmp_path, name):
    """The text is the chat; its last token counts, also where that is the end token."""
    folder = judge(name, tmp_path / "judge", chat=True)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>\n", "<|im_end|>"))
    texts = [f"<|im_start|>user\n{row['question']}<|im_end|><|im_start|>assistant\n{text}<|im_end|>"
             for row, text in zip(ROWS, ANSWERS)]
    expected = scores_alone(folder, texts, add_special_tokens=False)
    assert scores_of(script, folder) == pytest.approx(expected, abs=1e-5)
    settings(folder, truncation_side="left")  # the answer's end is kept
    expected = scores_alone(folder, texts, add_special_tokens=False, truncation=True, max_length=20)
    settings(folder, truncation_side="right")
    scores = scores_of(script, folder, "MAX_REWARD_TOKENS=20")
    assert scores == pytest.approx(expected, abs=1e-5)


def test_reward_models_that_cannot_judge(script, tmp_path):
    """Two outputs, no head, a causal model, too few positions for MAX_REWARD_TOKENS, no tokens."""
    def headless(weights):
        del weights["score.weight"]

    def refused(folder):
        line = refusal(script, f"REWARD_MODEL={folder}", "REWARD_WEIGHTS={'model': 1.0}")
        assert line.startswith(f"error: REWARD_MODEL={folder}: ")
        return line

    assert "2 outputs" in refused(judge("Llama", tmp_path / "two", num_labels=2))
    assert "missing are ['score.weight']" in refused(
        pickled(judge("Llama", tmp_path / "headless"), headless))
    assert "missing are ['score.weight']" in refused(POLICY)
    assert "MAX_REWARD_TOKENS" in refused(judge("GPT-2, padded on the left", tmp_path / "short",
                                                n_positions=200, max_position_embeddings=200))
    folder = judge("Llama", tmp_path / "tokenless")
    settings(folder, pad_token=None, eos_token=None)
    assert "does not have a padding token" in refused(folder)
