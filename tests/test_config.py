"""Settings and source: every field's rule against bad values, names against typing errors, presets against models,
and the text of train_gpt.py against the project's limits (where the environment, ranks and bits may occur, length of
lines and functions, docstrings, bytes, side effects of importing).
"""

import ast
import json
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from conftest import ROOT

import train_gpt as t

FIELDS = {f.name.upper(): f for f in fields(t.Config)}
SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)

# A value that each rule refuses, and what the message must say.
REFUSED = [
    ("PRESET", "recrod", "a comma list of record, pr1749, pr1698, pr456, sample"),
    ("PRESET", "sample,nothing", "a comma list of record, pr1749, pr1698, pr456, sample"),
    ("RUN_ID", "a/b", "letters, digits, '.', '_' and '-' alone"),
    ("RUN_ID", "a b", "letters, digits, '.', '_' and '-' alone"),
    ("SEED", "-1", "at least 0"),
    ("CHECKPOINT_EVERY_SECONDS", "-1", "at least 0"),
    ("MAX_BAD_STEPS", "-1", "at least 0"),
    ("RANK_TIMEOUT_SECONDS", "0", "between 1 and 1000000"),
    ("DEVICE", "mps", "one of auto, cuda, cpu"),
    ("PROMPT_TOKENS", "0", "at least 1"),
    ("PROMPT_TEMPERATURE", "-0.1", "0 or at least 0.01"),
    ("VOCAB_SIZE", "1", "between 2 and 65536"),
    ("VOCAB_SIZE", "65537", "between 2 and 65536"),
    ("HOLDOUT_TOKENS", "-1", "at least 0"),
    ("MODEL_DIM", "0", "a positive multiple of 8"),
    ("MODEL_DIM", "-8", "a positive multiple of 8"),
    ("MODEL_DIM", "500", "a positive multiple of 8"),
    ("NUM_HEADS", "0", "at least 1"),
    ("NUM_KV_HEADS", "0", "at least 1"),
    ("SWA_WINDOW", "0", "at least 1"),
    ("ROPE_BASE", "1", "at least 2"),
    ("ROPE_DIMS", "-2", "at least 0"),
    ("GDN_HEADS", "0", "at least 1"),
    ("GDN_V_HEADS", "-4", "at least 0"),
    ("GDN_HEAD_DIM", "100", "a positive multiple of 8"),
    ("GDN_CONV", "0", "between 1 and 16"),
    ("GDN_CONV", "17", "between 1 and 16"),
    ("MLP_MULT", "0.2", "at least 0.25"),
    ("MLP_ACT", "gelu", "one of relu2, leaky_relu2"),
    ("NGRAM_BUCKETS", "-1", "between 0 and 16777216"),
    ("NGRAM_DIM", "0", "at least 1"),
    ("NGRAM_ORDER", "1", "between 2 and 3"),
    ("NGRAM_ORDER", "4", "between 2 and 3"),
    ("BOS_ID", "-2", "at least -1"),
    ("LOGIT_SOFTCAP", "0", "at least 1"),
    ("TIED_EMBED_INIT_STD", "-1", "at least 0"),
    ("TRAIN_SEQ_LEN", "1000", "a positive multiple of 64"),
    ("TRAIN_SEQ_LEN", "0", "a positive multiple of 64"),
    ("TRAIN_BATCH_TOKENS", "63", "0 or at least 64"),
    ("MICRO_BATCH_TOKENS", "-1", "at least 0"),
    ("ITERATIONS", "-1", "at least 0"),
    ("MAX_WALLCLOCK_SECONDS", "-1", "at least 0"),
    ("WARMUP_STEPS", "-1", "at least 0"),
    ("WARMDOWN_FRAC", "1.5", "between 0 and 1"),
    ("WARMDOWN_FRAC", "-0.1", "between 0 and 1"),
    ("MIN_LR", "2", "between 0 and 1"),
    ("MATRIX_LR", "-1", "at least 0"),
    ("TIED_EMBED_LR", "-1", "at least 0"),
    ("SCALAR_LR", "-1", "at least 0"),
    ("MUON_MOMENTUM", "1", "between 0 and 0.9999"),
    ("MUON_MOMENTUM_WARMUP_START", "1", "between 0 and 0.9999"),
    ("MUON_MOMENTUM_WARMUP_STEPS", "-1", "at least 0"),
    ("MUON_BACKEND_STEPS", "0", "between 1 and 20"),
    ("MUON_BACKEND_STEPS", "21", "between 1 and 20"),
    ("MUON_WEIGHT_DECAY", "-1", "at least 0"),
    ("ADAM_WEIGHT_DECAY", "-1", "at least 0"),
    ("BETA1", "1", "between 0 and 0.9999"),
    ("BETA2", "1", "between 0 and 0.99999"),
    ("GRAD_CLIP_NORM", "-1", "at least 0"),
    ("EMA_DECAY", "1", "between 0 and 0.99999"),
    ("AVERAGE_EVERY", "-1", "at least 0"),
    ("QAT_FRAC", "1.5", "between 0 and 1"),
    ("KV_SHARE", "0", "at least 1"),
    ("UNIQUE_LAYERS", "-2", "at least 0"),
    ("XSA_LAYERS", "-1", "at least 0"),
    ("MLP_BITS", "1", "0 or between 2 and 8"),
    ("TTT_SCORING", "roundtrip", "one of sliding, exact"),
    ("TTT_OPTIMIZER", "adam", "one of sgd, adamw, muon"),
    ("TTT_LR", "-1", "at least 0"),
    ("TTT_MOMENTUM", "1", "between 0 and 0.9999"),
    ("TTT_EPOCHS", "-1", "at least 0"),
    ("TTT_FREEZE_BLOCKS", "-1", "at least 0"),
    ("TTT_GRAD_CLIP", "-1", "at least 0"),
    ("VAL_LOSS_EVERY", "-1", "at least 0"),
    ("TRAIN_LOG_EVERY", "0", "at least 1"),
    ("KERNEL", "triton", "one of auto, flashqla, fla, reference"),
    ("ATTN_KERNEL", "xformers", "one of auto, flash_attn, varlen, flex, sdpa"),
    ("COMPILE", "yes", "one of auto, 0, 1"),
    ("MATRIX_BITS", "1", "between 2 and 8"),
    ("MATRIX_BITS", "9", "between 2 and 8"),
    ("EMBED_BITS", "9", "between 2 and 8"),
    ("MATRIX_CLIP_SIGMAS", "0.5", "at least 1"),
    ("EMBED_CLIP_SIGMAS", "0", "at least 1"),
    ("COMPRESSOR", "gzip", "one of rans, brotli, lzma, zstd"), ("GRID", "log", "one of rate, sdclip"),
    ("SANDWICH_BITS", "1", "0 or between 2 and 8"), ("CONTROL_BITS", "6", "0 or 8"),
    ("FREQUENT_ROWS", "-1", "at least 0"), ("FLOAT_MATRICES", "-1", "at least 0"),
    ("GPTQ_TOKEN_POWER", "1.5", "between 0 and 1"),
    ("GPTQ_CALIBRATION", "val", "one of train, self"),
    ("GPTQ_CALIBRATION_BATCHES", "0", "at least 1"),
    ("GPTQ_RESERVE_SECONDS", "-1", "at least 0"),
    ("CAP_BYTES", "0", "at least 1"),
    ("FINAL_SCORE", "best", "one of roundtrip, exact, sliding, ttt"),
    ("EVAL_STRIDE", "0", "at least 1"),
    ("EVAL_SPANS", "0", "at least 1"),
    ("EVAL_WARMUP_TOKENS", "-1", "at least 0"),
    ("EVAL_BATCH_TOKENS", "0", "at least 64"),
    ("EVAL_BUDGET_SECONDS", "0", "at least 1"),
    ("TTT_CHUNK_TOKENS", "0", "at least 1"),
    ("EVAL_OVERRUN", "skip", "one of error, trim"),
    ("EVAL_SAVE_SECONDS", "-1", "at least 0"),
    ("TTT_SCHEDULE", "linear", "one of cosine, constant"),
    ("TTT_PHASE_CHUNKS", "0", "at least 1"),
    ("TTT_ROLES", "mlp,attention", "a comma list of embed, gate, mlp, mixer, control"),
    ("TTT_LORA", "-1", "at least 0"),
    ("TTT_EMA", "1", "between 0 and 0.9999"),
    ("TTT_TILT", "-1", "at least 0"),
    ("TTT_TILT_ORDER", "10", "between 2 and 9"),
    ("TTT_HASH_BUCKETS", "-1", "between 0 and 16777216"),
    ("TTT_HASH_LR", "-1", "at least 0"),
]


def fault(**env):
    """The message of the ValueError that these variables raise."""
    with pytest.raises(ValueError) as caught:
        t.Config.from_env(env)
    assert isinstance(caught.value, t.GolfError), "the user must see one line, not a traceback"
    return str(caught.value)


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, value, rule", REFUSED, ids=[f"{n}={v}" for n, v, _ in REFUSED])
def test_value_outside_its_rule_is_refused(name, value, rule):
    message = fault(**{name: value})
    shown = value.split(",")[-1] if name == "PRESET" else value
    # Numbers are shown as parsed (0 -> 0.0): the message must contain the value one way or the other.
    assert message.startswith(f"{name}={shown}: ") or message.startswith(f"{name}={float(shown)}: ")
    assert rule in message


def test_every_rule_is_tried():
    with_rule = {name for name, f in FIELDS.items() if f.metadata["rule"]}
    assert with_rule <= {name for name, _, _ in REFUSED}


def test_bounds_of_rules_are_allowed():
    lowest = """VOCAB_SIZE=2 GDN_CONV=1 MLP_MULT=0.25 MATRIX_BITS=2 WARMDOWN_FRAC=0 MIN_LR=0 NGRAM_ORDER=2 BOS_ID=-1
                CAP_BYTES=1 SEED=0 ROPE_BASE=2 MUON_BACKEND_STEPS=1"""
    highest = """VOCAB_SIZE=65536 GDN_CONV=16 MATRIX_BITS=8 WARMDOWN_FRAC=1 MIN_LR=1 NGRAM_ORDER=3 MUON_MOMENTUM=0.9999
                 MUON_BACKEND_STEPS=20"""
    for text in (lowest, highest):
        t.Config.from_env(dict(pair.split("=") for pair in text.split()))


INTS = [name for name, f in FIELDS.items() if type(f.default) is int]
FLOATS = [name for name, f in FIELDS.items() if type(f.default) is float]
BOOLS = [name for name, f in FIELDS.items() if type(f.default) is bool]


@pytest.mark.parametrize("name", INTS)
def test_integer_setting_refuses_other_text(name):
    for text in ("abc", "1.5", "", "1e3", "0x10"):
        assert fault(**{name: text}) == f"{name}={text!r}: must be a whole number"


@pytest.mark.parametrize("name", FLOATS)
def test_float_setting_refuses_other_text(name):
    for text in ("abc", "", "1,5"):
        assert fault(**{name: text}) == f"{name}={text!r}: must be a number"
    for text in ("nan", "inf", "-inf"):
        message = fault(**{name: text})
        assert message.startswith(f"{name}={text}: ") and "must be a finite number" in message


@pytest.mark.parametrize("name", BOOLS)
def test_boolean_setting_is_0_or_1(name):
    for text in ("true", "True", "yes", "on", "", "2", " 1", "-1"):
        assert fault(**{name: text}) == f"{name}={text!r}: must be 0 or 1"
    for text, value in (("0", False), ("1", True)):
        needs = {("EVAL_ONLY", "1"): {"ARTIFACT": "a"}, ("DETERMINISTIC", "1"): {"MAX_WALLCLOCK_SECONDS": "0"},
                 ("TTT_ENABLED", "0"): {"FINAL_SCORE": "exact"}}
        cfg = t.Config.from_env({name: text} | needs.get((name, text), {}))
        assert getattr(cfg, name.lower()) is value


@pytest.mark.parametrize("name", t.ELSEWHERE)
def test_names_of_other_scripts_are_answered_with_ours(name):
    assert f"{name}: not a setting of this script; {t.ELSEWHERE[name]} takes its place" == fault(**{name: "1"})
    assert t.ELSEWHERE[name] in {f.name.upper() for f in fields(t.Config)}


def test_artifact_without_a_use_is_refused():
    assert "only EVAL_ONLY=1 or PROMPT=text reads it" in fault(ARTIFACT="a")


def test_values_of_all_types_arrive():
    cfg = t.Config.from_env(dict(SEED="7", MATRIX_LR="2e-3", SMEAR="0", MLP_ACT="leaky_relu2", OUT_DIR="here"))
    assert (cfg.seed, cfg.matrix_lr, cfg.smear, cfg.mlp_act, cfg.out_dir) == (7, 0.002, False, "leaky_relu2", "here")


def test_config_cannot_be_changed_afterwards():
    with pytest.raises(AttributeError):
        t.Config().seed = 1


@pytest.mark.parametrize("env, parts", [
    (dict(TRAIN_BATCH_TOKENS="3000"), ["TRAIN_BATCH_TOKENS=3000", "multiple of TRAIN_SEQ_LEN=2048"]),
    (dict(MICRO_BATCH_TOKENS="1024"), ["MICRO_BATCH_TOKENS=1024", "0 or at least TRAIN_SEQ_LEN=2048"]),
    (dict(EVAL_BATCH_TOKENS="1024"), ["EVAL_BATCH_TOKENS=1024", "at least TRAIN_SEQ_LEN=2048"]),
    (dict(EVAL_STRIDE="2049"), ["EVAL_STRIDE=2049", "at most TRAIN_SEQ_LEN=2048"]),
    (dict(GDN_V_HEADS="6"), ["GDN_V_HEADS=6", "multiple of GDN_HEADS=4"]),
    (dict(NUM_HEADS="6", NUM_KV_HEADS="3"), ["NUM_HEADS=6", "MODEL_DIM=512 must be a multiple of twice that"]),
    (dict(MODEL_DIM="8", NUM_HEADS="8"), ["NUM_HEADS=8", "MODEL_DIM=8 must be a multiple of twice that"]),
    (dict(NUM_KV_HEADS="3"), ["NUM_KV_HEADS=3", "must divide NUM_HEADS=8"]),
    (dict(NUM_KV_HEADS="16"), ["NUM_KV_HEADS=16", "must divide NUM_HEADS=8"]),
    (dict(GPTQ_RESERVE_SECONDS="9", MAX_WALLCLOCK_SECONDS="9"), ["GPTQ_RESERVE_SECONDS=9", "MAX_WALLCLOCK_SECONDS=9"]),
    (dict(STACK="gdn attn", UNIQUE_LAYERS="1"), ["UNIQUE_LAYERS=1", "layers of two kinds"]),
    (dict(AVERAGE_EVERY="2", MIN_LR="1"), ["AVERAGE_EVERY=2", "MIN_LR=1"]),
    (dict(AVERAGE_EVERY="2", WARMDOWN_FRAC="0"), ["AVERAGE_EVERY=2", "WARMDOWN_FRAC=0"]),
    (dict(BOS_ID="1024"), ["BOS_ID=1024", "VOCAB_SIZE=1024"]),
    (dict(ROPE_DIMS="3"), ["ROPE_DIMS=3", "even"]),
    (dict(ROPE_DIMS="66"), ["ROPE_DIMS=66", "at most MODEL_DIM / NUM_HEADS"]),
    (dict(DETERMINISTIC="1"), ["MAX_WALLCLOCK_SECONDS=600", "DETERMINISTIC=1", "ITERATIONS"]),
    (dict(RESUME="auto"), ["RESUME=auto", "RUN_ID"]),
    (dict(MODEL_DIM="2000000"), ["MODEL_DIM=2000000", "must be at most 1048576"]),
    (dict(MLP_MULT="1e9"), ["MLP_MULT x MODEL_DIM=5.12e+11", "must be at most 1048576"]),
    (dict(NGRAM_BUCKETS="2147483648"), ["NGRAM_BUCKETS=2147483648", "must be below 2147483648"]),
    (dict(MAX_WALLCLOCK_SECONDS="1e300"), ["MAX_WALLCLOCK_SECONDS=1e+300", "a finite number, at most 1e+38"]),
    (dict(RESUME="x", EVAL_ONLY="1", ARTIFACT="a"), ["RESUME=x", "EVAL_ONLY", "checkpoint"]),
    (dict(EVAL_SAVE_SECONDS="9", EVAL_ONLY="1", ARTIFACT="a"), ["EVAL_SAVE_SECONDS=9", "EVAL_ONLY=1", "resumed"]),
    (dict(EVAL_ONLY="1"), ["ARTIFACT=: ", "EVAL_ONLY"]),
    (dict(PROMPT="hello"), ["ARTIFACT=: ", "PROMPT"]),
], ids=lambda x: " ".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "")
def test_contradicting_settings_are_refused(env, parts):
    message = fault(**env)
    assert all(part in message for part in parts), message


def test_head_counts_of_absent_attention_do_not_matter():
    t.Config.from_env(dict(STACK="gdn*2", NUM_HEADS="7", NUM_KV_HEADS="3"))


@pytest.mark.parametrize("stack, part", [
    ("", "at least one layer"), ("  ", "at least one layer"), ("mamba", "'mamba'"), ("gdn*0", "'gdn*0'"),
    ("gdn*-1", "'gdn*-1'"), ("gdn*100", "'gdn*100'"), ("gdn:", "'gdn:'"), ("gdn*2:a", "'gdn*2:a'"),
    ("swa:a gdn:a", "tag 'a' names both swa and gdn"),
])
def test_bad_stack_is_refused(stack, part):
    message = fault(STACK=stack)
    assert message.startswith("STACK") and part in message


@pytest.mark.parametrize("stack, layers", [
    ("gdn", [("gdn", "")]),
    ("gdn*2 swa:a,attn:b*2", [("gdn", ""), ("gdn", ""), ("swa", "a"), ("attn", "b"), ("attn", "b")]),
    ("gdn*5 swa:a gdn*5 swa:a", ([("gdn", "")] * 5 + [("swa", "a")]) * 2),
])
def test_stack_lists_layers_in_order(stack, layers):
    assert [tuple(layer) for layer in t.parse_stack(stack)] == layers


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, meant", [
    ("MODEL_DIMM", "MODEL_DIM"), ("MODELDIM", "MODEL_DIM"), ("TRAIN_SEQLEN", "TRAIN_SEQ_LEN"),
    ("ITERATION", "ITERATIONS"), ("EVAL_SPAN", "EVAL_SPANS"), ("MAX_WALLCLOCK_SECS", "MAX_WALLCLOCK_SECONDS"),
    ("COMPRESSSOR", "COMPRESSOR"), ("TOKENISER_PATH", "TOKENIZER_PATH"), ("MUON_MOMENTUN", "MUON_MOMENTUM"),
    ("FINAL_SCORES", "FINAL_SCORE"),
])
def test_misspelt_name_is_refused_with_a_suggestion(name, meant):
    message = fault(**{name: "1"})
    assert message.startswith(f"{name}: ") and f"did you mean {meant}?" in message and "--help" in message


@pytest.mark.parametrize("name", [
    "PHASED_TTT_ENABLED", "TTT_LORA_RANK", "GDN_EXPAND", "MY_SWA", "MUON_NESTEROV", "NGRAM_TILT"])
def test_unknown_name_with_one_of_our_words_is_refused(name):
    message = fault(**{name: "1"})
    assert message.startswith(f"{name}: unknown setting") and "--help" in message


UNRELATED = """
PATH=/usr/bin HOME=/home/me PWD=/ OLDPWD=/ SHELL=/bin/bash USER=me LOGNAME=me LANG=C.UTF-8 LC_ALL=C TERM=xterm SHLVL=1
_=/usr/bin/env HOSTNAME=node7 EDITOR=vi PAGER=less TMPDIR=/var/tmp TZ=UTC PS1=$ DISPLAY=:0 MAIL=m SSH_CLIENT=1
SSH_CONNECTION=1 SSH_TTY=1 XDG_RUNTIME_DIR=/run LS_COLORS= LD_LIBRARY_PATH= LIBRARY_PATH=
DEBIAN_FRONTEND=noninteractive VIRTUAL_ENV=/v CONDA_PREFIX=/c CONDA_DEFAULT_ENV=base PROMPT_COMMAND=history
PYTHONPATH= PYTHONHASHSEED=0 PYTHONUNBUFFERED=1 PYTEST_CURRENT_TEST=x VIRTUAL_ENV_PROMPT=v CUDA_VISIBLE_DEVICES=0
CUDA_HOME=/cuda CUDA_VERSION=13.0 CUDA_LAUNCH_BLOCKING=1 CUDA_DEVICE_ORDER=PCI_BUS_ID NVIDIA_VISIBLE_DEVICES=all
NVIDIA_DRIVER_CAPABILITIES=all NCCL_DEBUG=INFO NCCL_VERSION=2 NCCL_SOCKET_IFNAME=eth0 NCCL_P2P_LEVEL=NVL
TORCHELASTIC_RUN_ID=1 TORCHELASTIC_RESTART_COUNT=0 TORCHELASTIC_MAX_RESTARTS=0 TORCHELASTIC_USE_AGENT_STORE=True
TORCH_NCCL_ASYNC_ERROR_HANDLING=1 TORCH_LOGS=recompiles TORCH_HOME=/h TORCHINDUCTOR_CACHE_DIR=/c
TORCHINDUCTOR_MAX_AUTOTUNE=1 TRITON_CACHE_DIR=/c PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True RANK=0 WORLD_SIZE=1
LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 GROUP_RANK=0 GROUP_WORLD_SIZE=1 ROLE_NAME=default ROLE_RANK=0 ROLE_WORLD_SIZE=1
MASTER_ADDR=localhost MASTER_PORT=29500 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
NUMEXPR_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HOME=/hf HF_TOKEN=x WANDB_MODE=offline SLURM_JOB_ID=1
SLURM_NTASKS=8 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NNODES=1 SLURM_STEP_ID=0 SLURM_NODELIST=n SLURM_CPUS_PER_TASK=8
SLURM_JOB_NAME=train SLURM_ARRAY_TASK_ID=1 DATA_DIR=/data OUT=/out OUTPUT_DIR=/out CI=true GITHUB_ACTIONS=true
GITHUB_RUN_ID=1 KUBERNETES_SERVICE_HOST=10.0.0.1 RUNPOD_POD_ID=1 JOB_ID=3 MODEL=x VERSION=1 DEBUG=1 LOG_LEVEL=info
PORT=80 http_proxy= no_proxy=localhost VENV=/v
"""


def test_realistic_environment_is_no_fault():
    t.Config.from_env(dict(pair.split("=", 1) for pair in UNRELATED.split()))


# ---- presets and --help --------------------------------------------------------------------------


def test_presets_apply_from_left_to_right_and_the_user_wins(monkeypatch):
    monkeypatch.setitem(t.PRESETS, "one", dict(model_dim=256, num_heads=4, seed=1))
    monkeypatch.setitem(t.PRESETS, "two", dict(model_dim=128, seed=2))
    both = t.Config.from_env({"PRESET": "one, two", "SEED": "3"})
    assert (both.model_dim, both.num_heads, both.seed, both.swa_window) == (128, 4, 3, t.Config().swa_window)
    assert t.Config.from_env({"PRESET": "two,one"}).model_dim == 256


def test_no_preset_means_the_record_and_the_record_is_the_defaults():
    assert t.Config.from_env({}) == t.Config() == t.Config.from_env({"PRESET": "record"})


def test_sample_keeps_features_of_the_preset_before_it():
    """`sample` sets sizes, data and budget only: an architecture's switches survive it."""
    sizes = set("""
        data_path tokenizer_path stack model_dim num_heads num_kv_heads swa_window gdn_heads gdn_head_dim mlp_mult
        ngram_buckets ngram_dim train_seq_len train_batch_tokens max_wallclock_seconds warmup_steps
        muon_momentum_warmup_steps val_loss_every train_log_every checkpoint_every_seconds eval_stride eval_spans
        eval_warmup_tokens eval_batch_tokens eval_diagnostics gptq_calibration_batches gptq_reserve_seconds
        ttt_chunk_tokens ttt_epochs
        """.split())
    assert set(t.PRESETS["sample"]) <= sizes


@pytest.mark.parametrize("preset", [*t.PRESETS, "pr1749,sample"])
def test_preset_builds_a_model(preset):
    cfg = t.Config.from_env({"PRESET": preset})
    with torch.device("meta"):
        model = t.LM(cfg)
    assert len(model.blocks) == len(t.parse_stack(cfg.stack))
    assert all(t.route(name) for name, _ in model.named_parameters())


def test_preset_values_have_their_fields_types():
    for values in t.PRESETS.values():
        for name, value in values.items():
            assert type(value) is type(FIELDS[name.upper()].default), name


def test_model_settings_of_the_artifact_are_fields():
    assert set(t.MODEL_FIELDS) <= {f.name for f in fields(t.Config)}


def test_help_lists_every_setting_with_default_and_meaning():
    listed = {}
    for line in t.help_text().splitlines():
        setting = re.match(r"  ([A-Z][A-Z0-9_]*)=(.*)", line)
        if setting:
            listed[setting[1]] = setting[2]
    assert list(listed) == list(FIELDS)
    for name, f in FIELDS.items():
        text, meaning = listed[name], f.metadata["help"]
        assert meaning and text.endswith(meaning), name
        assert t.parse_value(name, text.removesuffix(meaning).strip(), type(f.default)) == f.default


def test_help_lists_the_presets_as_the_environment_takes_them():
    for name in t.PRESETS:
        [line] = [line for line in t.help_text().splitlines() if line.startswith(f"PRESET={name}: ")]
        if name != "record":
            settings = dict(word.split("=") for word in re.split(r" (?=[A-Z][A-Z0-9_]*=)", line.partition(": ")[2]))
            cfg = t.Config.from_env(settings)
            assert all(getattr(cfg, key) == value for key, value in t.PRESETS[name].items())


def test_a_foreign_variable_of_one_word_is_not_ours():
    assert t.Config.from_env(dict(COMPILER="gcc", TOOLS="1")) == t.Config()


def test_run_name_has_no_character_of_a_preset_list():
    name = t.name_run(t.Config.from_env(dict(PRESET="pr1749, sample")), t.Run()).run_id
    assert re.fullmatch(r"[\d-]+_pr1749-sample_seed1337", name)


# ---- source --------------------------------------------------------------------------------------


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def definition(name):
    return next(node for node in TREE.body if getattr(node, "name", None) == name)


def enclosing(node_test):
    """Names of the top-level definitions (or 'module') in which a node passes the test, one per node."""
    return [getattr(top, "name", "module") for top in TREE.body for node in ast.walk(top) if node_test(node)]


def test_every_setting_is_read_outside_the_class():
    read = set()
    for top in TREE.body:
        if getattr(top, "name", None) == "Config":
            continue
        for node in ast.walk(top):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] == "cfg":
                read.add(node.attr)
    routes = next(top for top in TREE.body if isinstance(top, ast.Assign) and ast.unparse(top.targets[0]) == "ROUTES")
    read |= {node.value for node in ast.walk(routes) if isinstance(node, ast.Constant)}  # by getattr(cfg, route.lr)
    assert {f.name for f in fields(t.Config)} - read == set()


def test_environment_is_read_in_one_function():
    assert set(enclosing(lambda n: isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv"))) == {"entry"}


def test_torch_distributed_is_called_in_run_alone():
    assert set(enclosing(lambda n: isinstance(n, ast.Name) and n.id == "dist")) == {"Run"}
    assert not [n for n in ast.walk(TREE) if isinstance(n, ast.Attribute) and ast.unparse(n) == "torch.distributed"]


def test_nats_become_bits_in_one_place():
    def is_log2(node):
        return (isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "log"
                and node.args and ast.unparse(node.args[0]) in ("2", "2.0"))
    assert enclosing(is_log2) == ["Ledger"]
    assert SOURCE.count("log(2") == 1


def test_there_is_one_cross_entropy():
    assert enclosing(lambda n: isinstance(n, ast.Attribute) and n.attr == "cross_entropy") == ["token_nll"]


LONGER_FUNCTIONS = {}  # name: lines that it may have; empty on purpose


def test_functions_are_short():
    lines = SOURCE.splitlines()
    long = {}
    for node in functions(TREE):
        doc = ast.get_docstring(node, clean=False)
        count = sum(bool(line.strip()) for line in lines[node.lineno - 1:node.end_lineno])
        count -= len([line for line in doc.splitlines() if line.strip()]) if doc else 0
        if count > LONGER_FUNCTIONS.get(node.name, 60):
            long[node.name] = count
    assert long == {}


def test_functions_and_classes_have_docstrings():
    """At module level; `_` is the stub by which torch.library learns shapes."""
    missing = [node.name for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
               and node.name != "_" and not ast.get_docstring(node)]
    assert missing == []


def test_lines_fit_120_columns():
    assert [i for i, line in enumerate(SOURCE.splitlines(), 1) if len(line) > 120] == []


def test_code_leaves_the_cap_to_the_weights():
    assert len(t.code_bytes()) == len((ROOT / "train_gpt.py").read_bytes()) < 282_000


def test_source_is_python_3_10():
    ast.parse(SOURCE, feature_version=(3, 10))


def test_nothing_is_executed_from_text_or_pickles():
    def runs_text(node):
        forbidden = ("exec", "eval", "compile", "pickle.loads", "torch.load")
        return isinstance(node, ast.Call) and ast.unparse(node.func) in forbidden
    assert enclosing(runs_text) == []


# ---- importing -----------------------------------------------------------------------------------

IMPORT_PROBE = """
import json, os, sys, time
began = time.perf_counter()
import torch, torch.distributed
before, seen = set(sys.modules), {"environ": [], "open": []}

def by_script(depth):
    frame = sys._getframe(depth)
    for _ in range(3):  # the script itself, or a library function that it called directly
        if frame is None:
            return False
        if frame.f_code.co_filename.endswith("train_gpt.py"):
            return True
        frame = frame.f_back
    return False

def watch(name):
    original = getattr(type(os.environ), name)
    def spy(self, *args):
        if by_script(2):
            seen["environ"].append(str(args))
        return original(self, *args)
    setattr(type(os.environ), name, spy)
for name in ("__getitem__", "__iter__"):
    watch(name)
sys.addaudithook(lambda event, args: seen["open"].append(str(args[0])) if event == "open" and by_script(2) else None)
import train_gpt
seen["seconds"] = time.perf_counter() - began
seen["modules"] = sorted(set(sys.modules) - before)
seen["cuda"] = torch.cuda.is_initialized()
print(json.dumps(seen), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def imported():
    """What importing the script does in a process with an empty environment: (process, its findings)."""
    process = subprocess.run([sys.executable, "-B", "-c", IMPORT_PROBE], cwd=ROOT, env={}, capture_output=True,
                             text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return process, json.loads(process.stderr.splitlines()[-1])


def test_import_prints_nothing(imported):
    process, _ = imported
    assert (process.stdout, len(process.stderr.splitlines())) == ("", 1)


def test_import_reads_no_environment_no_file_and_no_gpu(imported):
    _, seen = imported
    assert (seen["environ"], seen["open"], seen["cuda"]) == ([], [], False)


def test_import_loads_no_kernel_and_no_optional_package(imported):
    _, seen = imported
    optional = {"triton", "fla", "flash_qla", "flash_attn", "flash_attn_interface", "sentencepiece", "brotli",
                "zstandard"}
    assert optional & {name.split(".")[0] for name in seen["modules"]} == set()
    assert "torch._dynamo" not in seen["modules"]  # torch's compiler takes a second


def test_import_takes_seconds(imported):
    assert imported[1]["seconds"] < 15


@pytest.mark.parametrize("preset, stack, kept", [
    ("sample", "gdn*2 swa:a gdn swa:a", {}), ("pr1749,sample", "gdn*2 swa:a gdn swa:a", {}),
    ("pr1698,sample", "gdn*4", dict(kv_share=2, gptq_enabled=False, compressor="zstd", average_every=50)),
    ("sample,pr1698", "gdn*4", dict(kv_share=2)),
    ("pr456,sample", "attn*6", dict(unet=True, xsa_layers=3, mlp_bits=5, ngram_order=2, qat_frac=0.15))])
def test_sample_shrinks_an_architecture_and_keeps_its_features(preset, stack, kept):
    cfg = t.Config.from_env({"PRESET": preset})
    assert cfg.stack == stack
    assert {name: getattr(cfg, name) for name in kept} == kept
