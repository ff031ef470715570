#!/usr/bin/env bash
# Group self-play preference optimization in one command: see usage below, or --help.
set -euo pipefail

usage() {
    cat <<'END'
RL_HAND/self_play/train.sh [OPTION VALUE ...] [NAME=VALUE ...]

    --model MODEL            what is trained: a folder or a model id    (POLICY_MODEL)
    --rollout_n N            answers per question                       (ROLLOUT_N)
    --self_play_rounds N     rounds                                     (SELF_PLAY_ROUNDS)
    --reward_func FILE       a file with a compute_score                (REWARD_FUNC)
    --n_gpus N               0: none, even if there is one; 1: one; more: torchrun, a process each

NAME=VALUE sets any other constant of self_play.py, which lists them with --help:

    RL_HAND/self_play/train.sh --rollout_n 10 --self_play_rounds 5 LEARNING_RATE=5e-5 SEED=1

With --rollout_n, an optimiser step still sees 16 questions and a forward pass one, unless
MINIBATCH or MICRO_BATCH are given. Python is that of the project's .venv, or else python3.
END
}

fail() {
    echo "error: $*" >&2
    exit 1
}

whole_number() { # option, value, least
    [[ $2 =~ ^[0-9]{1,6}$ ]] && ((10#$2 >= $3)) ||
        fail "$1 $2: expected a whole number, $3 or more"
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
options=()
settings=()
gpus=1

while (($#)); do
    name=${1%%=*}
    case $name in
    -h | --help)
        usage
        exit 0
        ;;
    --model | --rollout_n | --self_play_rounds | --reward_func | --n_gpus)
        if [[ $1 == *=* ]]; then
            value=${1#*=}
        else
            (($# > 1)) || fail "$name: found no value behind it; expected one"
            value=$2
            shift
        fi
        [[ -n $value && $value != --* ]] || fail "$name: found '$value'; expected a value"
        ;;
    [A-Za-z]*)
        [[ $1 == *=* ]] || fail "$1: expected an option or NAME=VALUE; see --help"
        settings+=("$1")
        ;;
    *) fail "$1: no such option; expected --model, --rollout_n, --self_play_rounds," \
        "--reward_func, --n_gpus or NAME=VALUE" ;;
    esac
    case $name in
    --model) options+=("POLICY_MODEL=$value") ;;
    --rollout_n)
        whole_number "$name" "$value" 2
        options+=("ROLLOUT_N=$((10#$value))" "MINIBATCH=$((16 * 10#$value))" "MICRO_BATCH=$((10#$value))")
        ;;
    --self_play_rounds)
        whole_number "$name" "$value" 1
        options+=("SELF_PLAY_ROUNDS=$((10#$value))")
        ;;
    --reward_func)
        [[ -f ${value%:*} || -f $value || -f $here/../../$value ]] ||
            fail "$name $value: no such file; expected one with a compute_score"
        options+=("REWARD_FUNC=$value")
        ;;
    --n_gpus)
        whole_number "$name" "$value" 0
        gpus=$((10#$value))
        ;;
    esac
    shift
done

python=$here/../../.venv/bin/python
[[ -x $python ]] || python=$(command -v python3) || fail "python3 is missing; expected Python 3.11"
command=("$python")
if ((gpus > 1)); then
    command+=(-m torch.distributed.run --standalone --nproc_per_node "$gpus")
elif ((gpus == 0)); then
    export CUDA_VISIBLE_DEVICES=
fi
exec "${command[@]}" "$here/self_play.py" ${options[@]+"${options[@]}"} ${settings[@]+"${settings[@]}"}
