"""What the benchmarks share: scripts as modules, and the shape of the model that is meant."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QWEN3 = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
         "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
         "tie_word_embeddings": True, "rope_theta": 1e6,
         "max_position_embeddings": 40_960}  # Qwen/Qwen3-0.6B's config.json, but for vocab_size
QWEN3_VOCABULARY = 151_936


def import_file(path, name=None):
    """A file as a module, by the file's name unless another is given."""
    name = name or path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def import_gspo():
    """gspo.py as a module."""
    return import_file(ROOT / "RL_HAND" / "gspo" / "gspo.py")


def end_ids(policy, tokenizer):
    """The ids that end a completion, sorted: the model's own and the tokenizer's."""
    ends = policy.generation_config.eos_token_id
    return sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})
