"""Training: each optimizer rule against torch's or a written-out one, several ranks against one,
averaging, late QAT, the schedule, and ten steps against golden_loss.txt.

After an intended change of the model or the optimizer: python tests/test_training.py
"""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same, fixed_data, tiny_config, tiny_model, weight_of, weights_of

import train_gpt as t

GOLDEN = Path(__file__).with_name("golden_loss.txt")


def on_threads(count, work):
    """[work(run) of each of `count` ranks], each a thread of this process."""
    barrier = threading.Barrier(count)
    box = [None] * count

    class ThreadRun(t.Run):
        def gather(self, value):
            box[self.rank] = pickle.dumps(value)
            barrier.wait(60)
            everyone = [pickle.loads(one) for one in box]
            barrier.wait(60)
            return everyone

        def all_sum(self, tensor):
            return tensor.copy_(sum(self.gather(tensor)))

        def broadcast(self, value):
            return self.gather(value)[0]

        def all_gather_rows(self, tensor):
            return torch.cat(self.gather(tensor))

    def rank(number):
        try:
            return work(ThreadRun(number, count))
        except BaseException:
            barrier.abort()
            raise
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(rank, range(count)))


def gradients(model, seed=0):
    """Random gradients by name."""
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=rng) for name, p in model.named_parameters()}


def fill(optimizer, grads):
    """Put gradients where a backward pass would."""
    for name, place in zip(optimizer.names, optimizer.grads):
        place.copy_(grads[name])


ROLES = {"embed.weight": "embed", "embed.ngram_table": "embed", "embed.ngram_proj": "mixer",
         "blocks.0.mixer.a_proj": "gate", "blocks.0.mixer.q_proj": "mixer",
         "blocks.0.mixer.kv.k_proj": "mixer", "blocks.0.mlp.up_proj": "mlp",
         "blocks.0.mixer.kv.k_conv": "control", "blocks.1.qk_gain": "control"}


def test_every_parameter_is_trained_once_by_its_role():
    model = t.LM(tiny_config(unet=True))
    optimizer = t.training_optimizer(model, model.cfg, t.Run())
    assert sorted(optimizer.names) == sorted(name for name, _ in model.named_parameters())
    assert {name: t.route(name).role for name in ROLES} == ROLES


def optimizer_of(model, rule, decay=0.0, clip=0.0, run=None):
    """An Optimizer with one rule for every matrix and sgd for vectors, rate 0.1, momentum 0.9."""
    treatment = {name: (rule if name.endswith("_proj") else "sgd", 0.1, decay)
                 for name, p in model.named_parameters()}
    return t.Optimizer(model, treatment, run or t.Run(), clip, momentum=0.9, compiled=False)


def test_parameters_of_any_size_begin_at_multiples_of_16_bytes():
    optimizer = optimizer_of(tiny_model(tiny_config(gdn_heads=3)), "adamw")
    assert any(p.numel() % 4 for p in optimizer.params)
    for flat in (optimizer.weights, optimizer.grad, optimizer.m):
        assert not any(view.data_ptr() % 16 for view in optimizer.views(flat))


def written_muon(p, equal_rows):
    """Muon for one matrix as published: Nesterov momentum, five Newton-Schulz steps.

    equal_rows: MuonEq-R, which divides each row of the momentum by its norm first.
    """
    buffer = torch.zeros_like(p.data)
    group = {}  # gets the rate

    def step():
        buffer.copy_(0.9 * buffer + 0.1 * p.grad)
        X = 0.1 * p.grad + 0.9 * buffer
        if equal_rows:
            X = X / X.norm(dim=1, keepdim=True)
        X = X / X.norm()
        for _ in range(5):
            A = X @ X.T
            X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
        scale = max(1, len(X) / X.shape[1]) ** 0.5
        p.data = p.data * (1 - group["lr"] * 0.3) - group["lr"] * scale * X
    return SimpleNamespace(param_groups=[group], step=step)


RULES = {"sgd": lambda p, _: torch.optim.SGD([p], momentum=0.9),
         "muon": written_muon,
         "adamw": lambda p, _: torch.optim.AdamW([p], betas=(0.8, 0.9), weight_decay=0.3,
                                                 eps=1e-10)}


@pytest.mark.parametrize("name", ["blocks.0.mlp.up_proj", "blocks.0.mlp.down_proj"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("equal_rows", [False, True])
def test_rule_moves_weights_as_the_published_optimizer_does(equal_rows, rule, name):
    model = tiny_model(tiny_config(beta1=0.8, beta2=0.9, muon_row_norm=equal_rows))
    ours = optimizer_of(model, rule, decay=0.0 if rule == "sgd" else 0.3)
    p = torch.nn.Parameter(model.get_parameter(name).detach().clone())
    theirs = RULES[rule](p, equal_rows)
    for step, rate in enumerate((1.0, 0.25, 0.5)):
        grads = gradients(model, step)
        p.grad = grads[name].clone()
        theirs.param_groups[0]["lr"] = 0.1 * rate
        theirs.step()
        fill(ours, grads)
        ours.step(rate)
    torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clip, share", [(0.0, 1.0), (1e9, 1.0), (2.0, None)],
                         ids=["off", "not reached", "reached"])
def test_gradients_are_clipped_to_a_global_norm(clip, share):
    model = tiny_model(tiny_config())
    optimizer = optimizer_of(model, "sgd", clip=clip)
    before = weights_of(model)
    grads = gradients(model)
    share = share or 2.0 / float(torch.cat([g.flatten() for g in grads.values()]).norm())
    fill(optimizer, grads)
    optimizer.step(1.0)
    want = {name: before[name] - 0.1 * share * grads[name] for name in before}
    assert_same(weights_of(model), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_as_if_it_had_never_been(rule, bad):
    weights = []
    for with_bad_step in (True, False):
        model = tiny_model(tiny_config())
        optimizer = optimizer_of(model, rule, decay=0.1, clip=1.0)
        for step in (0, 1):
            fill(optimizer, gradients(model, step))
            optimizer.step(1.0)
            if with_bad_step and step == 0:
                optimizer.grads[3].view(-1)[0] = bad
                optimizer.step(1.0)
        weights.append(weights_of(model))
        assert int(optimizer.bad_steps) == with_bad_step
    assert_same(*weights)


def steps_of(run, rule, seeds, weights=None, state=None):
    """(weights, state) after a step for each seed; the ranks' gradients have a mean of one's."""
    model = tiny_model(tiny_config(stack="gdn swa gdn attn gdn"))
    t.copy_all(list(model.parameters()), list((weights or weights_of(model)).values()))
    optimizer = optimizer_of(model, rule, decay=0.1, clip=1.0, run=run)
    own = dict(m=optimizer.m, v=optimizer.v, count=optimizer.count, bad_steps=optimizer.bad_steps)
    for name, x in (state or {}).items():
        own[name].copy_(x)
    noise = gradients(model, 100)
    for seed in seeds:
        off = run.rank - (run.world_size - 1) / 2
        fill(optimizer, {name: g + off * noise[name] for name, g in gradients(model, seed).items()})
        optimizer.step(1.0)
    return weights_of(model), {name: x.clone() for name, x in own.items()}


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_ranks_take_the_steps_of_one_rank_and_any_number_goes_on(rule, before, after):
    """The matrices of one shape are 3, 5 and others: not all can be shared evenly."""
    wanted = steps_of(t.Run(), rule, (0, 1))
    ranks = on_threads(before, lambda run: steps_of(run, rule, (0, 1)))
    last, _ = steps_of(t.Run(), rule, (0, 1, 2))
    for found in ranks:
        for got, want in zip(found, wanted):  # weights, state
            assert_same(got, want, rtol=1e-4, atol=1e-5)
    for weights, _ in on_threads(after, lambda run: steps_of(run, rule, (2,), *ranks[0])):
        assert_same(weights, last, rtol=1e-4, atol=1e-5)


# settings, the rate of each step, the share of the weights after each step, the first included
AVERAGES = {
    "ema": (dict(ema_decay=0.3), [1.0] * 4, [2 / 11 * 3 / 12 * 0.09, 9 / 11 * 3 / 12 * 0.09,
                                             9 / 12 * 0.09, 0.7 * 0.3, 0.7]),
    "every third": (dict(average_every=3), [1.0] * 3 + [0.5] * 7, [0] * 6 + [0.5, 0, 0, 0.5, 0]),
    "off": (dict(ema_decay=0.0), [1.0] * 2, [0, 0, 1])}


@pytest.mark.parametrize("case", AVERAGES)
def test_average_is_this_mix_of_the_weights(case):
    overrides, rates, shares = AVERAGES[case]
    cfg = tiny_config(stack="gdn", **overrides)
    model = tiny_model(cfg)
    job = t.Training(model, fixed_data(cfg), cfg, t.Run(), None)
    path = [weights_of(model)]
    for job.step, rate in enumerate(rates, 1):
        for p, move in zip(model.parameters(), gradients(model, job.step).values()):
            p.data.add_(move)
        job.average(rate)
        path.append(weights_of(model))
    job.optimizer.weights.copy_(job.mean)
    want = {name: sum(share * weights[name] for share, weights in zip(shares, path))
            for name in path[0]}
    assert_same(weights_of(model), want, rtol=1e-5, atol=1e-5)


def fixed_batch(cfg, seed=0):
    """One global batch (rows, T + 1) of a repeating, learnable text."""
    rows = cfg.train_batch_tokens // cfg.train_seq_len
    start = torch.randint(61, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return (2 + (start + 3 * torch.arange(cfg.train_seq_len + 1)) % 61).int()


def golden_losses():
    """The training losses of ten steps of a fresh tiny model on a fixed text.

    At the default learning rates rounding alone would move the last loss by 1e-3.
    """
    cfg = tiny_config(matrix_lr=0.008, tied_embed_lr=0.012, scalar_lr=0.008,
                      muon_weight_decay=0.04, muon_row_norm=False, warmdown_frac=0.6, min_lr=0.1)
    model = t.init_weights(t.LM(cfg), cfg.seed)
    optimizer = t.training_optimizer(model, cfg, t.Run())
    return [float(t.train_step(model, optimizer, fixed_batch(cfg, step % 2), 4,
                               t.learning_rate(step / 10, cfg), step)) for step in range(10)]


def test_ten_steps_give_the_golden_losses():
    golden = [float(line.split()[1]) for line in GOLDEN.read_text().splitlines()]
    assert golden_losses() == pytest.approx(golden, rel=1e-4)


def test_learning_rate_is_flat_then_falls_linearly_to_min_lr():
    for progress, warmdown, want in ((0.0, 0.6, 1.0), (0.4, 0.6, 1.0), (0.7, 0.6, 0.6),
                                     (1.0, 0.6, 0.2), (1.5, 0.6, 0.2), (0.9, 0.0, 1.0)):
        cfg = tiny_config(warmdown_frac=warmdown, min_lr=0.2)
        assert t.learning_rate(progress, cfg) == pytest.approx(want), progress


def test_batch_grows_with_the_ranks_and_is_divided_into_micro_batches():
    for ranks, tokens in ((1, 65536), (2, 131072), (7, 458752), (8, 524288)):
        assert t.settle_batch(t.Config(), t.Run(world_size=ranks)).train_batch_tokens == tokens
    for rows, ranks, most, want in ((12, 1, 0, 12), (12, 2, 0, 6), (12, 1, 320, 4), (12, 3, 200, 2),
                                    (7, 1, 200, 1)):
        cfg = tiny_config(train_batch_tokens=64 * rows, micro_batch_tokens=most)
        assert t.micro_batch_rows(cfg, t.Run(world_size=ranks)) == want
    with pytest.raises(t.GolfError, match=r"TRAIN_BATCH_TOKENS=512: .* set it to 576"):
        t.micro_batch_rows(tiny_config(), t.Run(0, 3))


def test_warm_up_leaves_no_trace():
    model = tiny_model(tiny_config(warmup_steps=2))
    before = weights_of(model)
    random_state = torch.get_rng_state()
    t.warm_up(model, model.cfg, t.Run(), 4)
    assert_same(weights_of(model), before)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_qat_rounds_to_the_exports_grid_and_puts_the_weights_back():
    cfg = tiny_config(matrix_clip_sigmas=9.0, mlp_bits=5, grid="sdclip")
    model = tiny_model(cfg)
    before = weights_of(model)
    with t.on_export_grid(model):
        inside = weights_of(model)
    matrices = t.prepare_matrices(model, cfg, t.UNCALIBRATED, t.Run())
    stored = {name: weight_of(q) for name, q in t.quantize(matrices, 9.0 / 31).items()}
    assert_same(inside, before | stored)
    assert_same(weights_of(model), before)


def test_qat_moves_the_weights_by_the_gradient_of_the_rounded_ones():
    moves = []
    for qat in (True, False):
        model = tiny_model(tiny_config(matrix_bits=3, grid="sdclip"))
        if not qat:
            with t.on_export_grid(model):
                rounded = list(weights_of(model).values())
            t.copy_all(list(model.parameters()), rounded)
        before = weights_of(model)
        t.train_step(model, optimizer_of(model, "sgd"), fixed_batch(model.cfg), 8, 1.0, 0, qat)
        moves.append({name: before[name] - p for name, p in weights_of(model).items()})
    assert_same(*moves, rtol=1e-3, atol=1e-5)


def with_wrong(ops, operation):
    """The Ops with one operation that returns something else."""
    right = getattr(ops, operation)

    def wrong(*args, **keywords):
        out = right(*args, **keywords)
        return (out[0].roll(1, 1), *out[1:]) if isinstance(out, tuple) else 1.3 * out
    return ops._replace(**{operation: wrong})


@pytest.mark.parametrize("operation", t.Ops._fields[:3])
def test_a_wrong_operation_alone_fails_the_check_of_the_fast_path(operation, capsys):
    model = tiny_model(tiny_config())
    fast = t.LM(model.cfg, with_wrong(t.REFERENCE, operation))
    fast.load_state_dict(model.state_dict())
    with pytest.raises(t.GolfError, match="KERNEL=reference COMPILE=0: the fast path's loss"):
        t.check_fast_path(fast, t.Run(), fixed_batch(model.cfg)[:2])
    t.check_fast_path(model, t.Run(), fixed_batch(model.cfg)[:2])
    assert "fast_path loss_error:0.000" in capsys.readouterr().out


@pytest.mark.parametrize("off", [0.1, float("nan")])
def test_a_wrong_loss_alone_fails_the_check_of_the_fast_path(off):
    model = tiny_model(tiny_config())
    right = model.embed.nll
    model.embed.nll = lambda *rest: right(*rest) + off
    with pytest.raises(t.GolfError, match="the fast path's loss"):
        t.check_fast_path(model, t.Run(), fixed_batch(model.cfg)[:2])


@pytest.mark.parametrize("argument, factor, passes", [
    ("conv", 1.1, True), ("conv", 1.2, False), ("A_log", 1.2, True), ("A_log", 1.5, False)])
def test_check_of_the_fast_path_allows_vectors_more_rounding(argument, factor, passes):
    def gdn(proj, taps, A_log, *rest):
        def scaled(x, name):  # x, with `factor` times its gradient
            return x * factor + (x - x * factor).detach() if name == argument else x
        return t.gdn(proj, scaled(taps, "conv"), scaled(A_log, "A_log"), *rest)

    model = t.LM(tiny_config(), t.REFERENCE._replace(gdn=gdn))
    with nullcontext() if passes else pytest.raises(t.GolfError, match=argument):
        t.check_fast_path(t.init_weights(model, 1), t.Run(), fixed_batch(model.cfg)[:2])


@pytest.fixture
def loop(tmp_path, monkeypatch):
    """loop(run, **settings): train a tiny model; it, and (its weights, qat) after every step."""
    step = t.train_step
    history = []

    def recorded(model, *args, qat):
        loss = step(model, *args, qat=qat)
        history.append((weights_of(model), qat))
        return loss
    monkeypatch.setattr(t, "train_step", recorded)

    def call(run=None, **settings):
        cfg = tiny_config(out_dir=str(tmp_path), run_id="x", gptq_enabled=False, **settings)
        model = tiny_model(cfg)
        t.train(model, fixed_data(cfg), cfg, run or t.Run(), None)
        return model, history
    return call


def test_late_qat_covers_the_last_part_of_the_run(loop):
    _, history = loop(iterations=10, qat_frac=0.35, grid="sdclip")
    assert [qat for _, qat in history] == [False] * 7 + [True] * 3


@pytest.mark.parametrize("env, want", [({}, 1), (dict(OMP_NUM_THREADS="3"), 3)])
def test_a_cpu_rank_has_one_thread_unless_the_user_says_otherwise(env, want):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)  # as torch itself reads OMP_NUM_THREADS
        t.Run.from_env(env, tiny_config())
        assert torch.get_num_threads() == want
    finally:
        torch.set_num_threads(before)


def test_training_ends_with_the_averaged_weights(loop):
    model, ((one, _), (two, _)) = loop(iterations=2, ema_decay=0.99)
    first = weights_of(tiny_model(model.cfg))
    mean = {name: 2 / 11 * first[name] + 9 / 11 * one[name] for name in first}
    mean = {name: 3 / 12 * mean[name] + 9 / 12 * two[name] for name in first}
    assert_same(weights_of(model), mean, atol=1e-5)


def test_ranks_whose_clocks_differ_stop_at_one_step(loop, monkeypatch):
    elapsed = t.Clock.elapsed
    monkeypatch.setattr(t.Clock, "elapsed", lambda clock: elapsed(clock) + 3600 * clock.run.rank)
    ranks = on_threads(2, lambda run: loop(run, iterations=100_000, max_wallclock_seconds=0.5))
    (one, history), (other, _) = ranks
    assert len(history) > 1
    assert_same(weights_of(one), weights_of(other))


def test_training_stops_after_too_many_bad_steps(loop):
    with pytest.raises(t.GolfError, match="11 steps had gradients .* more than 10;"):
        loop(iterations=30, tied_embed_lr=2e9)


if __name__ == "__main__":
    GOLDEN.write_text("".join(f"{i} {loss:.6f}\n" for i, loss in enumerate(golden_losses(), 1)))
