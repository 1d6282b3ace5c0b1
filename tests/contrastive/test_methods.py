"""MoCo and SimCLR: the order of a step, the teacher's equations, the queue, and several forwards under DDP."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from leakfree.contrastive import ContrastiveMethod, Encoder, Mitigation, MoCo, SimCLR, Views
from leakfree.norms import convert_norms
from tests.ranks import run_ranks


def encoder(seed: int = 0) -> Encoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        return Encoder(convert_norms(net, "BN"), nn.Linear(36, 5)).double()


def moco(query: str = "bn", key: str = "bn", **options: Any) -> MoCo:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        options = {"feature_dim": 5, "queue_size": 10, "momentum": 0.9, **options}
        if key == "eman":
            options.setdefault("teacher_statistics", "ema")
        method = MoCo(encoder(), Mitigation(query, 2), Mitigation(key, 2), 0.2, **options)
    return method.double()


def views(count: int, step: int = 0, seed: int = 0, dtype: torch.dtype = torch.float64) -> Views:
    generator = torch.Generator().manual_seed(100 * seed + step)
    one, two = (torch.randn(count, 3, 5, 5, generator=generator, dtype=dtype) for _ in range(2))
    indices = torch.arange(count)
    return Views(one, two, indices % 10, indices, step)


def train_step(method: ContrastiveMethod, batch: Views, lr: float = 0.1) -> float:
    loss = method(batch).loss
    loss.backward()
    with torch.no_grad():
        for item in method.parameters():
            if item.grad is not None:
                item -= lr * item.grad
                item.grad = None
    method.after_step()
    return float(loss.detach())


def named(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# ------------------------------------------------------------------------------------- order of a step


def test_a_step_is_queries_then_teacher_then_keys_then_loss_and_the_queue_at_the_end() -> None:
    method = moco()
    events: list[tuple[str, Tensor, Tensor]] = []
    for name in ("query", "key"):
        module = getattr(method, name)

        def note(*_: Any, name: str = name) -> None:
            events.append((name, method.key.head.weight.clone(), method.queue.clone()))

        module.register_forward_pre_hook(note)
    train_step(method, views(4))  # so that the encoders differ
    student, teacher, queue = method.query.head.weight.clone(), method.key.head.weight.clone(), method.queue.clone()
    events.clear()
    found = method(views(4, 1))
    assert [name for name, _, _ in events] == ["query", "key"]
    assert torch.equal(events[0][1], teacher)  # not yet updated
    torch.testing.assert_close(events[1][1], 0.9 * teacher + 0.1 * student, rtol=1e-12, atol=1e-12)
    assert torch.equal(method.queue, queue)
    found.loss.backward()
    assert torch.equal(method.queue, queue)
    method.after_step()
    assert torch.equal(method.queue[4:8], found.keys)
    assert torch.equal(method.queue[[0, 1, 2, 3, 8, 9]], queue[[0, 1, 2, 3, 8, 9]])


def test_the_teacher_gets_no_gradient_and_no_optimizer_needs_it() -> None:
    method = moco()
    method(views(4)).loss.backward()
    assert all(item.grad is None and not item.requires_grad for item in method.key.parameters())
    assert all(item.grad is not None for item in method.query.parameters())


def test_after_step_without_a_step_leaves_the_queue() -> None:
    method = moco()
    train_step(method, views(4))
    before = named(method)
    method.after_step()
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


# ------------------------------------------------------------------------------------------- teacher


@pytest.mark.parametrize("policy", ["own", "copy", "ema"])
def test_teacher_statistics_are_those_of_the_equations(policy: str) -> None:
    method = moco(teacher_statistics=policy)
    train_step(method, views(6))
    before, start = named(method.key), named(method.query)
    found = method(views(6, 1))
    student, teacher = named(method.query), named(method.key)
    assert all(
        torch.equal(student[name], start[name]) for name in student if "running" not in name and "num" not in name
    )
    for name, value in teacher.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * student[name], rtol=1e-12, atol=1e-12)
    mean, var, counter = "backbone.1.running_mean", "backbone.1.running_var", "backbone.1.num_batches_tracked"
    assert int(student[counter]) == 2
    assert teacher[counter].dtype == torch.int64
    for name in (mean, var):
        if policy == "copy":
            assert torch.equal(teacher[name], student[name])
        elif policy == "ema":  # of what the student has after this batch
            torch.testing.assert_close(teacher[name], 0.9 * before[name] + 0.1 * student[name], rtol=1e-12, atol=1e-12)
            assert not torch.equal(teacher[name], student[name])
    assert int(teacher[counter]) == 2
    if policy == "own":  # an average of the key batches
        with torch.no_grad():
            x = method.key.backbone[0](views(6, 1).key)  # type: ignore[index]
        torch.testing.assert_close(teacher[mean], 0.9 * before[mean] + 0.1 * x.mean((0, 2, 3)), rtol=1e-9, atol=1e-12)
    assert found.loss.isfinite()


@pytest.mark.parametrize(("policy", "training"), [("own", True), ("copy", False), ("ema", False)])
def test_a_teacher_with_statistics_of_its_student_is_in_eval_after_every_train(policy: str, training: bool) -> None:
    method = moco(teacher_statistics=policy)
    wrapper = nn.Sequential(method)
    for module in (method, wrapper, method.eval(), wrapper.eval()):
        module.train()
        assert method.query.training
        assert [item.training for item in method.key.modules()] == [training] * len(list(method.key.modules()))
    wrapper.eval()
    assert not any(item.training for item in method.modules())


def test_a_teacher_in_eval_still_shares_statistics_where_its_word_says_so() -> None:
    method = moco(key="bn", teacher_statistics="copy")
    batch = views(6)
    one = method.encode_keys(batch.key, 0)
    other = method.encode_keys(batch.key.flip(0), 0).flip(0)  # pairs stay pairs
    torch.testing.assert_close(one, other)
    mates = torch.cat([batch.key[:1], batch.query[1:2], batch.key[2:]])
    moved = (method.encode_keys(mates, 0) - one).norm(dim=1)
    assert moved[0] > 1e-3  # its mate changed
    assert torch.equal(moved[2:], torch.zeros(4, dtype=torch.float64))
    before = named(method.key)
    method.encode_keys(batch.key, 0)
    assert all(torch.equal(value, before[name]) for name, value in method.key.state_dict().items())
    method.eval()
    assert torch.equal(method.encode_keys(batch.key, 0), method.key(batch.key))


@given(st.integers(0, 99), st.integers(2, 8))
def test_eman_s_features_of_an_image_do_not_depend_on_the_batch(seed: int, count: int) -> None:
    method = moco(key="eman")
    train_step(method, views(6))
    batch, others = views(count, 1, seed), views(count, 2, seed)
    mixed = torch.cat([batch.key[:1], others.key[1:]])
    assert torch.equal(method.encode_keys(batch.key, 1)[0], method.encode_keys(mixed, 1)[0])
    leaky = moco(key="bn")
    assert not torch.equal(leaky.encode_keys(batch.key, 1)[0], leaky.encode_keys(mixed, 1)[0])  # the check can fail


@pytest.mark.parametrize("steps", [1, 7])
def test_the_momentum_s_cosine(steps: int) -> None:
    method = moco(momentum=0.9, momentum_end=1.0, max_steps=steps)
    for step in range(steps + 3):
        share = min(step / steps, 1)
        byol = 1 - (1 - 0.9) * (math.cos(math.pi * share) + 1) / 2  # Grill et al. 2020, section 3.2
        assert method.momentum_at(step) == pytest.approx(byol, rel=1e-12)
    assert method.momentum_at(0) == 0.9
    assert method.momentum_at(steps) == 1.0
    assert moco(momentum=0.9, max_steps=steps).momentum_at(steps) == 0.9


def test_the_schedule_is_that_of_the_step_of_the_batch() -> None:
    method = moco(momentum=0.5, momentum_end=1.0, max_steps=4)
    with torch.no_grad():
        method.key.head.weight.zero_()
    student = method.query.head.weight.detach().clone()
    method(views(4, 2))
    torch.testing.assert_close(method.key.head.weight, (1 - 0.75) * student, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------- queue


@given(st.integers(1, 9), st.lists(st.integers(1, 14), min_size=1, max_size=6))
def test_the_queue_holds_the_newest_keys_in_a_ring(size: int, batches: list[int]) -> None:
    method = moco(queue_size=size)
    newest = list(method.queue)  # oldest first
    for step, count in enumerate(batches):
        with torch.no_grad():
            keys = method(views(count + 1, step)).keys  # a batch norm wants two images
        method.after_step()
        newest = [*newest, *keys][-size:]
        first = int(method.queue_pointer)
        assert 0 <= first < size
        assert torch.equal(torch.roll(method.queue, -first, 0), torch.stack(newest))
    assert method.queue_pointer.dtype == torch.int64


def test_the_queue_starts_with_directions_of_the_seed_alone() -> None:
    one, two = moco(), moco()
    assert torch.equal(one.queue, two.queue)
    torch.testing.assert_close(one.queue.norm(dim=1), torch.ones(10, dtype=torch.float64))
    assert (one.queue @ one.queue.T - torch.eye(10)).abs().max() < 0.999
    assert {"queue", "queue_pointer"} < one.state_dict().keys()


# --------------------------------------------------------------------------------------------- judge


def test_moco_judges_by_its_queue() -> None:
    method = moco()
    queries = nn.functional.normalize(torch.randn(3, 5, dtype=torch.float64))
    loss, hit = method.judge(queries, queries, queries)
    assert hit.tolist() == [1.0, 1.0, 1.0]
    logits = torch.cat([torch.ones(3, 1, dtype=torch.float64), queries @ method.queue.T], 1) / 0.2
    torch.testing.assert_close(loss, -logits.log_softmax(1)[:, 0])
    assert method.judge(queries, -queries, queries)[1].tolist() == [0.0, 0.0, 0.0]


def test_simclr_judges_by_the_rest_of_the_batch() -> None:
    """The mean over both directions is the loss of training, when each key is the batch's own."""
    method = SimCLR(encoder(), Mitigation("bn"), Mitigation("bn"), 0.2).double()
    queries, keys = (nn.functional.normalize(torch.randn(4, 5, dtype=torch.float64)) for _ in range(2))
    both = [method.judge(queries, keys, keys)[0], method.judge(keys, queries, queries)[0]]
    from leakfree.contrastive import nt_xent

    torch.testing.assert_close(torch.cat(both).mean(), nt_xent(queries, keys, 0.2).loss)
    # only the own key changes: the others stay those of the batch
    loss, _ = method.judge(queries, queries, keys)
    logits = torch.cat([keys, queries], 0) @ queries.T / 0.2
    logits = logits.T.clone()
    logits[torch.arange(4), torch.arange(4)] = 5.0
    logits[torch.arange(4), torch.arange(4) + 4] = float("-inf")
    torch.testing.assert_close(loss, -logits.log_softmax(1)[torch.arange(4), torch.arange(4)])


# ------------------------------------------------------------------------------- precision and DDP


@pytest.mark.parametrize("method", ["moco", "eman", "simclr"])
def test_bf16_autocast_trains(method: str) -> None:
    if method == "simclr":
        model: ContrastiveMethod = SimCLR(encoder(), Mitigation("shuffle_bn", 2), Mitigation("shuffle_images", 2), 0.2)
    else:
        model = moco(key="eman" if method == "eman" else "shuffle_images")
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(views(6, dtype=torch.float32))
    found.loss.backward()
    model.after_step()
    assert found.loss.dtype == torch.float32
    assert all(item.grad is not None and item.grad.isfinite().all() for item in model.query.parameters())
    exact = model.float()(views(6, dtype=torch.float32)).loss
    assert float(found.loss.detach()) == pytest.approx(float(exact.detach()), rel=0.2)


@pytest.mark.parametrize("word", ["bn", "sync_bn", "shuffle_bn", "shuffle_images"])
@pytest.mark.parametrize("method", ["moco", "simclr"])
def test_statistics_written_between_forward_and_backward_do_no_harm(method: str, word: str) -> None:
    """What DDP's broadcast of buffers does on GPUs when a module runs again before the backward."""

    def run(net: Encoder) -> list[Tensor]:
        if method == "simclr":
            model: ContrastiveMethod = SimCLR(net, Mitigation(word, 2), Mitigation(word, 2), 0.2)
        else:
            model = moco(word, word)
            model.query = net
        loss = model(views(6)).loss
        for buffer in model.query.buffers():
            buffer.add_(0)
        loss.backward()
        return [item.grad for item in model.query.parameters()]  # type: ignore[misc]

    assert all(item.isfinite().all() for item in run(encoder()))
    theirs = encoder()
    theirs.backbone[1] = nn.BatchNorm2d(4).double()  # type: ignore[index]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(theirs)


def several_forwards(rank: int, world_size: int, word: str, broadcast: bool) -> list[float]:
    """Two forwards of the whole method before one backward, and DDP around the encoder alone."""
    if word.startswith("simclr"):
        method: ContrastiveMethod = SimCLR(encoder(), Mitigation(word[7:], 2), Mitigation(word[7:], 2), 0.2).double()
    else:
        method = moco(key=word)
    module = DistributedDataParallel(method, broadcast_buffers=broadcast)
    losses = []
    for step in range(2):
        with module.no_sync():  # gradients of the first half stay here
            half = module(views(4, 2 * step, rank)).loss
        loss = half + module(views(4, 2 * step + 1, rank)).loss
        loss.backward()
        assert all(item.grad.isfinite().all() for item in method.query.parameters())  # type: ignore[union-attr]
        method.after_step()
        losses.append(float(loss.detach()))
    student = DistributedDataParallel(method.query, broadcast_buffers=broadcast)
    one, two = (student(images) for images in views(4, 9, rank)[:2])
    (one * two).sum().backward()
    return losses


@pytest.mark.parametrize("word", ["bn", "shuffle_bn", "eman", "simclr bn", "simclr sync_bn", "simclr shuffle_bn"])
@pytest.mark.parametrize("broadcast", [True, False])
def test_several_forwards_under_ddp_change_nothing_that_a_backward_needs(word: str, broadcast: bool) -> None:
    one, two = run_ranks(several_forwards, 2, word, broadcast)
    assert all(math.isfinite(loss) for loss in one + two)
