"""Fixtures: the scripts under test are imported from their files, never copied."""

import contextlib
import importlib.util
import inspect
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side: one core each
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs a model hub

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # for what a benchmark imports beside itself
SCRIPT = Path(os.environ.get("RL_HAND_SCRIPT", ROOT / "RL_HAND" / "gspo" / "gspo.py"))


def import_file(path, name="script_under_test"):
    """A fresh module object from a file: its constants belong to the caller alone."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # for what is looked up by its module, such as doctests
    spec.loader.exec_module(module)
    return module


def fresh(name, path=None):
    """A script by its name as a new module, its constants as in the file."""
    torch.set_num_threads(1)
    return import_file(path or ROOT / "RL_HAND" / name / f"{name}.py", f"{name}_under_test")


def fixture_of(name):
    """A fixture that is that module."""
    return pytest.fixture(lambda: fresh(name), name=name)


grpo, dapo, ppo, reinforce, gmpo, cispo = map(
    fixture_of, ("grpo", "dapo", "ppo", "reinforce", "gmpo", "cispo"))


def mutated_copy(script, text, instead, folder):
    """A copy of a script in which `text`, which must stand there once, is replaced: its path."""
    source = script.read_text(encoding="utf-8")
    assert source.count(text) == 1, f"{text!r} is there {source.count(text)} times: adapt it"
    copied = folder / script.name
    copied.write_text(source.replace(text, instead), encoding="utf-8")
    if not (folder / "data").exists():
        (folder / "data").symlink_to(ROOT / "data")  # a script looks for it in the folders above it
    return copied


def must_fail(test, available):
    """An assertion of a test fails, and nothing crashes; it gets what its arguments name."""
    with pytest.raises(AssertionError):
        test(**{argument: available[argument] for argument in inspect.signature(test).parameters})


def run_script(*arguments, script=SCRIPT, timeout=300, cwd=ROOT):
    """Run a script as a user does; returns the finished process with stdout and stderr as text."""
    return subprocess.run([sys.executable, str(script), *map(str, arguments)], cwd=cwd, text=True,
                          capture_output=True, timeout=timeout)


def fork(function, log, *arguments):
    """Start a function of a test file in a process of its own, forked from one that has PyTorch
    loaded: to be killed, or sent signals, without the seconds that a start takes. It writes to the
    file `log`. Returns the process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["matplotlib.figure", "pandas", "pytest", "torch", "tqdm.auto",
                                    "transformers.models.auto.modeling_auto",
                                    "transformers.models.qwen3.modeling_qwen3"])
    process = context.Process(target=call_into, args=(function, log, arguments), daemon=True)
    process.start()
    return process


def call_into(function, log, arguments):
    """Call a function with all that it prints in a file; one thread, the signals' defaults."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)
    with open(log, "w", buffering=1) as file, contextlib.redirect_stdout(file), \
            contextlib.redirect_stderr(file):
        function(*arguments)


@pytest.fixture(autouse=True)
def same_signals():
    """`main` takes Ctrl-C over: give it back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def gspo():
    """gspo.py, imported anew, its constants as in the file."""
    torch.set_num_threads(1)
    return import_file(SCRIPT)


@pytest.fixture
def embedded(gspo):
    """gspo.py with the embedded profile's constants in force."""
    gspo.configure(["PROFILE=embedded", "DEVICE=cpu"])
    return gspo
