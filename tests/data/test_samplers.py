import collections
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leakfree.data import EvaluationBatchSampler, TrainingBatchSampler
from leakfree.errors import DataError

small = st.integers(1, 12)


def stream(num_images, images_per_rank, world_size, seed, steps, start=0):
    """The global batches, put together from the ranks."""
    samplers = [TrainingBatchSampler(num_images, images_per_rank, rank, world_size, seed, start, steps)
                for rank in range(world_size)]  # fmt: skip
    return [list(itertools.chain(*parts)) for parts in zip(*samplers, strict=True)]


@settings(max_examples=60, deadline=None)
@given(small, small, small, st.integers(0, 10**9), st.integers(1, 20))
def test_ranks_together_see_what_one_process_sees(num_images, images_per_rank, world_size, seed, steps):
    together = stream(num_images, images_per_rank, world_size, seed, steps)
    assert together == stream(num_images, images_per_rank * world_size, 1, seed, steps)


@settings(max_examples=60, deadline=None)
@given(small, small, st.integers(0, 10**9))
def test_every_image_comes_once_an_epoch(num_images, batch, seed):
    pairs = list(itertools.chain(*stream(num_images, batch, 1, seed, 3 * num_images)))
    assert [position for _, position in pairs] == list(range(3 * num_images * batch))
    images = [image for image, _ in pairs]
    for start in range(0, len(images), num_images):
        assert sorted(images[start : start + num_images]) == list(range(num_images))


@settings(max_examples=60, deadline=None)
@given(small, small, st.integers(0, 99), st.integers(0, 15), st.integers(0, 15))
def test_a_resumed_run_gets_the_tail(num_images, batch, seed, start, more):
    whole = stream(num_images, batch, 1, seed, start + more)
    assert stream(num_images, batch, 1, seed, start + more, start) == whole[start:]


def test_steps_in_any_order_are_the_same_steps():
    sampler = TrainingBatchSampler(7, 3, 0, 1, seed=0, max_steps=40)
    forward = [sampler.batch(step) for step in range(40)]
    assert [sampler.batch(step) for step in reversed(range(40))] == forward[::-1]


def test_epochs_and_seeds_are_in_different_orders():
    orders = {tuple(image for image, _ in TrainingBatchSampler(50, 50, 0, 1, seed=seed).batch(epoch))
              for seed in range(5) for epoch in range(5)}  # fmt: skip
    assert len(orders) == 25


def test_the_length_is_the_whole_runs():
    sampler = TrainingBatchSampler(7, 3, 0, 1, seed=0, start_step=30, max_steps=40)
    assert (len(sampler), len(list(sampler)), sampler.start_step) == (40, 10, 30)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), small, small)
def test_evaluation_batches_are_the_one_process_batches_dealt_to_ranks(num_images, images_per_batch, world_size):
    alone = list(EvaluationBatchSampler(num_images, images_per_batch, 0, 1))
    assert list(itertools.chain(*alone)) == list(range(num_images))
    assert all(len(batch) == images_per_batch for batch in alone[:-1])
    for rank in range(world_size):
        sampler = EvaluationBatchSampler(num_images, images_per_batch, rank, world_size)
        assert list(sampler) == alone[rank::world_size]
        assert len(sampler) == len(alone[rank::world_size])


def test_no_images_and_impossible_ranks_are_refused():
    with pytest.raises(DataError, match="no image to train on"):
        TrainingBatchSampler(0, 1, 0, 1, 0)
    for sampler in (TrainingBatchSampler, EvaluationBatchSampler):
        with pytest.raises(ValueError, match="rank 2 of 2"):
            sampler(5, 1, 2, 2, *([0] if sampler is TrainingBatchSampler else []))


def test_within_an_epoch_the_order_is_uniform():
    """First image of an epoch over 2000 seeds: each of 4 images 500 times, standard deviation 19."""
    firsts = collections.Counter(TrainingBatchSampler(4, 1, 0, 1, seed).batch(0)[0][0] for seed in range(2000))
    assert all(abs(count - 500) < 80 for count in firsts.values())
