"""Settings: every rule against bad values, names against misspellings, STACK, presets, --help."""

import ast
import re
from dataclasses import fields

import pytest
import torch
from conftest import SCRIPT

import train_gpt as t

FIELDS = {f.name.upper(): f for f in fields(t.Config)}


def fault(**env):
    """The message of the GolfError that these variables raise."""
    with pytest.raises(t.GolfError) as caught:
        t.Config.from_env(env)
    return str(caught.value)


def values_outside(name):
    """The values next to a setting's limits, or a word that is not among those allowed."""
    low, high = [FIELDS[name].metadata[end] for end in ("low", "high")]
    if isinstance(low, str):
        return ["other"]
    step = 1 if type(FIELDS[name].default) is int else 0.001
    return [low - step, high + step]


LIMITED = [name for name, f in FIELDS.items()
           if type(f.default) in (int, float) or isinstance(f.metadata["low"], str)]


@pytest.mark.parametrize("name, value", [
    *((name, str(value)) for name in LIMITED for value in values_outside(name)),
    ("MODEL_DIM", "500"), ("GDN_HEAD_DIM", "100"), ("TRAIN_SEQ_LEN", "1000"), ("RUN_ID", 201 * "a"),
    *(("RUN_ID", text) for text in (".hidden", "..", "/root", "a/../b", "a//b", "-x", "a\\b"))
], ids=lambda text: text[:30])
def test_message_of_a_bad_value_has_name_value_and_rule(name, value):
    shown = re.escape(t.plain(type(FIELDS[name].default)(value))[:80])
    assert re.match(rf"{name}={shown}: must be .*\w", fault(**{name: value}))


def test_every_number_has_a_limit_and_may_be_it():
    lowest = t.knob(0, "").metadata["low"]
    assert [name for name in LIMITED if FIELDS[name].metadata["low"] == lowest] == ["QK_GAIN_INIT"]
    assert fault(MLP_BITS="1") == "MLP_BITS=1: must be between 2 and 8 or 0"
    text = "VOCAB_SIZE=2 MLP_MULT=0.25 MATRIX_BITS=8 MIN_LR=0 BOS_ID=-1 RUN_ID=a/2.b_c-d"
    t.Config.from_env(dict(pair.split("=") for pair in text.split()))


NO_NUMBERS = {int: ["", "1.5", "0x10"], float: ["", "1,5", "nan", "-inf"]}


def test_number_setting_refuses_other_text_and_what_is_not_finite():
    for name, f in FIELDS.items():
        for text in NO_NUMBERS.get(type(f.default), ()):
            assert re.match(f"{name}='?{text}'?: must be ", fault(**{name: text}))


def test_boolean_setting_is_0_or_1_alone():
    needed = {"MAX_WALLCLOCK_SECONDS": "0"}  # by DETERMINISTIC=1
    for name in [name for name, f in FIELDS.items() if type(f.default) is bool]:
        for text in ("true", "yes", "", "2", " 1", "-1"):
            assert fault(**{name: text}) == f"{name}={text!r}: must be 0 or 1"
        for text in ("0", "1"):
            cfg = t.Config.from_env(needed | {name: text})
            assert getattr(cfg, name.lower()) is (text == "1")


@pytest.mark.parametrize("text, other", [
    ("TRAIN_BATCH_TOKENS=3000", "TRAIN_SEQ_LEN=2048"),
    ("EVAL_BATCH_TOKENS=1024", "TRAIN_SEQ_LEN=2048"), ("EVAL_STRIDE=2049", "TRAIN_SEQ_LEN=2048"),
    ("NUM_HEADS=6 NUM_KV_HEADS=3", "MODEL_DIM=512"), ("NUM_HEADS=8 MODEL_DIM=8", "MODEL_DIM=8"),
    ("NUM_KV_HEADS=3", "NUM_HEADS=8"), ("NUM_KV_HEADS=16", "NUM_HEADS=8"),
    ("GPTQ_RESERVE_SECONDS=9 MAX_WALLCLOCK_SECONDS=9", "MAX_WALLCLOCK_SECONDS=9"),
    ("MAX_WALLCLOCK_SECONDS=600 DETERMINISTIC=1", "DETERMINISTIC=1"), ("RESUME=auto", "RUN_ID"),
    ("RESUME=x ARTIFACT=a", "ARTIFACT"), ("QAT_FRAC=0.1", "GRID=sdclip"),
    ("MLP_BITS=5", "GRID=sdclip"), ("SANDWICH_BITS=8", "GRID=sdclip"),
    ("MATRIX_CLIP_SIGMAS=12", "GRID=sdclip"), ("FREQUENT_ROWS=9", "GRID=sdclip"),
    ("FREQUENT_ROWS=9 GPTQ_ENABLED=0 GRID=sdclip", "GPTQ_ENABLED=1")])
def test_contradicting_settings_are_refused(text, other):
    message = fault(**dict(pair.split("=") for pair in text.split()))
    assert message.startswith(text.split()[0] + ": ") and other in message
    t.Config.from_env(dict(STACK="gdn*2", NUM_HEADS="7", NUM_KV_HEADS="3"))  # no heads are used
    for text in ("1", "true", "x\n" * 99):
        assert fault(EVAL_ONLY=text) == "EVAL_ONLY: needs ARTIFACT, an artifact's path"
    assert t.Config.from_env(dict(EVAL_ONLY="1", ARTIFACT="a")) == t.Config(artifact="a")


@pytest.mark.parametrize("stack, part", [
    ("", "layer"), ("mamba", "'mamba'"), ("gdn*0", "'gdn*0'"), ("gdn*257", "257 layers"),
    ("gdn*2:a", "'gdn*2:a'"), ("gdn:::a", "'gdn:::a'"), ("(gdn", "'(gdn'"), ("gdn)*2", "'gdn)*2'"),
    ("()", "layer"), ("(gdn)*0", "'*0'"), ("(gdn*16)*17", "272 layers"),
    ("swa:a gdn:a", "tag 'a' names both swa and gdn"), ("swa::a attn:a", "tag 'a' names both"),
    ("((gdn*999)*999)*999", "to 256"), ("gdn*999 " * 10_000, "to 256"),
], ids=lambda text: text[:20])
def test_bad_stack_is_refused(stack, part):
    message = fault(STACK=stack)
    assert message.startswith("STACK=") and part in message


@pytest.mark.parametrize("stack, layers", [  # kind, first layers with its mixer and its MLP
    ("gdn*2 swa", [("gdn", 0, 0), ("gdn", 1, 1), ("swa", 2, 2)]),
    ("gdn,attn", [("gdn", 0, 0), ("attn", 1, 1)]),
    ("swa:a gdn swa:a", [("swa", 0, 0), ("gdn", 1, 1), ("swa", 0, 2)]),
    ("swa::a gdn swa::a", [("swa", 0, 0), ("gdn", 1, 1), ("swa", 0, 0)]),
    ("attn::b*2", [("attn", 0, 0), ("attn", 0, 0)]),
    ("((gdn::a)*2 swa:b)*2", [("gdn", 0, 0), ("gdn", 0, 0), ("swa", 2, 2),
                              ("gdn", 0, 0), ("gdn", 0, 0), ("swa", 2, 5)])])
def test_stack_lists_layers_in_order_with_what_they_share(stack, layers):
    found = t.parse_stack(stack)
    mixers, mlps = [layer.mixer for layer in found], [layer.mlp for layer in found]
    assert [(layer.kind, mixers.index(layer.mixer), mlps.index(layer.mlp))
            for layer in found] == layers


@pytest.mark.parametrize("name, meant", [
    ("MODEL_DIMM", "did you mean MODEL_DIM?"), ("MODELDIM", "did you mean MODEL_DIM?"),
    ("MAX_WALLCLOCK_SECS", "did you mean MAX_WALLCLOCK_SECONDS?"), ("SEEDS", "mean SEED?"),
    ("TOKENISER_PATH", "did you mean TOKENIZER_PATH?"), ("RUNID", "did you mean RUN_ID?"),
    ("SEQ_LEN", "did you mean TRAIN_SEQ_LEN?"), ("WEIGHT_DECAY", "mean MUON_WEIGHT_DECAY?"),
    *((name, "") for name in """PHASED_TTT_ENABLED TTT_LORA MY_SWA GPTQ NUM_LAYERS UNIQUE_LAYERS
      SHARE_MLP WARMDOWN_ITERS HEAD_LR LR LEARNING_RATE BATCH_SIZE MAX_STEPS NUM_STEPS MAX_ITERS
      BIGRAM_DIM ROPE_THETA ATTN_KERNEL""".split())])
def test_unknown_name_is_refused_with_the_right_one_if_there_is_one(name, meant):
    """Misspelt, or with a word in it of ours or of another script."""
    message = fault(**{name: "1"})
    assert message.startswith(f"{name}: ") and meant in message


FOREIGN = """PATH HOME SHELL USER LANG TERM _ HOSTNAME EDITOR TMPDIR TZ PS1 DISPLAY LIBRARY_PATH
PROMPT_COMMAND PYTHONPATH PYTEST_CURRENT_TEST CUDA_VISIBLE_DEVICES CUDA_HOME CUDA_DEVICE_ORDER CI
NVIDIA_VISIBLE_DEVICES NCCL_DEBUG NCCL_SOCKET_IFNAME TORCHELASTIC_RUN_ID TORCH_LOGS TORCH_HOME RANK
TORCHINDUCTOR_MAX_AUTOTUNE TRITON_CACHE_DIR WORLD_SIZE LOCAL_RANK ROLE_NAME MASTER_ADDR HF_HOME OUT
PYTORCH_CUDA_ALLOC_CONF OMP_NUM_THREADS WANDB_MODE SLURM_JOB_ID SLURM_JOB_NAME DATA_DIR OUTPUT_DIR
RUNPOD_POD_ID JOB_ID MODEL VERSION DEBUG LOG_LEVEL PORT http_proxy COMPILER TOOLS AWS_BATCH_JOB_ID
MODEL_DIR PROMPT ARTIFACTS DEVICES"""


def test_variables_of_other_programs_are_ignored():
    assert t.Config.from_env(dict.fromkeys(FOREIGN.split(), "1")) == t.Config()


def test_presets_apply_from_left_to_right_and_the_user_wins(monkeypatch):
    monkeypatch.setitem(t.PRESETS, "one", dict(model_dim=256, num_heads=4, seed=1))
    monkeypatch.setitem(t.PRESETS, "two", dict(model_dim=128, seed=2))
    both = t.Config.from_env({"PRESET": "one, two", "SEED": "3", "MATRIX_LR": "2e-3", "SMEAR": "0"})
    assert (both.model_dim, both.num_heads, both.seed) == (128, 4, 3)
    assert (both.matrix_lr, both.smear) == (0.002, False)
    assert t.Config.from_env({}) == t.Config.from_env(dict(PRESET="record")) == t.Config()
    assert re.match("PRESET=nothing: .*" + ", ".join(t.PRESETS), fault(PRESET="sample,nothing"))


@pytest.mark.parametrize("preset, stack, kept", [
    ("sample", "gdn*2 swa:a gdn swa:a", {}),
    ("pr1749,sample", "gdn*2 swa:a gdn swa:a", dict(float_matrices=2, ttt_tilt=0.1)),
    ("pr1698,sample", "gdn*4", dict(kv_share=2, gptq_enabled=False, average_every=50)),
    ("pr456,sample", "attn*6", dict(unet=True, xsa_layers=3, mlp_bits=5, ngram_order=2))])
def test_sample_shrinks_an_architecture_and_keeps_its_features(preset, stack, kept):
    cfg = t.Config.from_env({"PRESET": preset})
    with torch.device("meta"):
        assert len(t.LM(cfg).blocks) == len(t.parse_stack(cfg.stack))
    assert (cfg.stack, cfg.vocab_size) == (stack, 1024)
    assert {name: getattr(cfg, name) for name in kept} == kept


def test_help_lists_every_setting_with_default_and_meaning():
    listed = dict(re.findall(r"^  ([A-Z][A-Z0-9_]*)=(.*)", t.help_text(), re.MULTILINE))
    assert list(listed) == list(FIELDS)
    for name, f in FIELDS.items():
        meaning = f.metadata["help"]
        default = listed[name].removesuffix(meaning).strip()
        assert meaning and listed[name].endswith(meaning), name
        words = f.metadata["low"]
        assert not isinstance(words, str) or meaning.endswith(f"({words})"), name
        assert t.Config.from_env({name: default}) == t.Config(), name


@pytest.mark.parametrize("preset", ["pr1749", "pr1698", "pr456", "sample", "pr456,sample"])
def test_help_shows_a_preset_as_the_environment_takes_it(preset):
    [line] = re.findall(rf"^PRESET={preset}: (.*)", t.help_text(), re.MULTILINE)
    pairs = dict(word.split("=") for word in re.split(r" (?=[A-Z][A-Z0-9_]*=)", line))
    shown = (t.PRESETS | t.WITH_SAMPLE)[preset]
    cfg = t.Config.from_env(pairs)
    assert {name: getattr(cfg, name) for name in shown} == shown


@pytest.mark.parametrize("text, places", [
    (r"dist\.\w+", ["Run"]), (r"math\.log\(2(\.0)?\)", ["Ledger"]),
    (r"\w+\.cross_entropy", ["token_nll"]), (r"(exec|eval|pickle\.loads|torch\.load)\b.*", []),
])
def test_what_legality_rests_on_happens_in_one_definition(text, places):
    tree = ast.parse(SCRIPT.read_text("utf-8"))
    nodes = [(top, n) for top in tree.body for n in ast.walk(top) if isinstance(n, ast.expr)]
    found = {getattr(top, "name", "") for top, n in nodes if re.fullmatch(text, ast.unparse(n))}
    assert sorted(found) == places
