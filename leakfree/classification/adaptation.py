"""A classifier in a domain that it was not trained on: with statistics of that domain, or a mixture of known ones.

Labels are used for nothing but the accuracy. Nothing here changes the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from leakfree.classification.batches import composed_batches, evaluated_images
from leakfree.classification.model import classify
from leakfree.config.schema import ClassificationRunConfig
from leakfree.data import LabelledImages
from leakfree.keeping import attributes_kept
from leakfree.leakage import error_rates
from leakfree.norms import BatchNormEmbeddings, DomainBatchNorm
from leakfree.population import recompute_statistics
from leakfree.state import buffers_kept, evaluating

__all__ = ["has_unknown_domains", "mixture_accuracy", "target_accuracy"]

Track = Callable[[Iterable[Any], str], Iterable[Any]]


def has_unknown_domains(model: nn.Module, images: LabelledImages) -> bool:
    """Whether a DomainBN of ``model`` has no statistics for some of the ``images``."""
    known = min((layer.num_domains for layer in model.modules() if isinstance(layer, DomainBatchNorm)), default=None)
    return known is not None and any(images.domains.index(name) >= known for name in images.config.corruptions)


def target_accuracy(
    model: nn.Module, config: ClassificationRunConfig, images: LabelledImages, track: Track
) -> float | None:
    """Accuracy with statistics of the images themselves (AdaBN), of each corruption by itself.

    Each layer sees what it sees at inference (the exact mode of :func:`leakfree.population.recompute_statistics`), so
    neither the size of batches nor the number of ranks changes the numbers. ``evaluation.source_share`` of the
    statistics is what the model has stored.
    """
    wrong, seen = 0.0, 0
    for corruption in dict.fromkeys(images.config.corruptions):
        count = len(evaluated_images(images, config.evaluation.max_images, corruption))
        if not count:
            continue
        with buffers_kept(model):
            _adapt(model, config, images, corruption)
            batches = composed_batches(config, images, "random", config.evaluation.max_images, corruption)
            what = f"accuracy with statistics of the target ({corruption})"
            error = error_rates(model, track(batches, what), forward=classify)["stored"]
        assert error is not None
        wrong, seen = wrong + error * count, seen + count
    return 1 - wrong / seen if seen else None


def mixture_accuracy(
    model: nn.Module, config: ClassificationRunConfig, images: LabelledImages, track: Track
) -> float | None:
    """Accuracy of BN embeddings: predictions in all known domains, mixed by how near each image is to them."""
    batches = composed_batches(config, images, "random", config.evaluation.max_images)
    mixed = BatchNormEmbeddings(model)
    error = error_rates(mixed, track(batches, "accuracy of the mixture of domains"), forward=_mixture)["stored"]
    return None if error is None else 1 - error


def _adapt(model: nn.Module, config: ClassificationRunConfig, images: LabelledImages, corruption: str) -> None:
    evaluation = config.evaluation
    count = evaluation.target_images or evaluation.max_images
    batches = composed_batches(config, images, "random", count, corruption)
    num_images = len(evaluated_images(images, count, corruption))
    share = evaluation.source_share
    with evaluating(model), attributes_kept([model], "communicates"):
        if hasattr(model, "communicates"):
            model.communicates = False  # type: ignore[assignment]  # in training only: ranks may have other batches
        recompute_statistics(
            model,
            batches,
            source_samples=num_images * share / (1 - share),
            layerwise=True,
            forward=classify,
            progress=False,
        )


def _mixture(mixed: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    parameter = next(mixed.parameters())
    prediction: Tensor = mixed(batch[0].to(parameter.device, parameter.dtype))
    return prediction
