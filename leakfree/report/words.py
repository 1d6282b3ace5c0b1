"""What each task calls its samples, its structured batches and its numbers: the captions and terms of a report.

Values are :class:`markupsafe.Markup` where they hold markup of ours; no text of a run passes through here.
"""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from leakfree.report.measures import Measure, accuracy, ap, features, pretext, roi_accuracy

__all__ = ["ADAPTED", "FindingWords", "Words", "words_of"]


@dataclass(frozen=True)
class FindingWords:
    """What a finding calls the samples and the structured batches of its task."""

    samples: str
    numbers: str  # what a judgement needs
    alone: str  # the structured statistics, as an adjective
    what: str  # the headline's: what is classified, while what is normalized together


@dataclass(frozen=True)
class Words:
    """The words of one task on the page and the console."""

    finding: FindingWords
    console: str  # what the columns are
    results: str  # caption of the first table
    times_100: str  # what is shown times 100
    bold: str  # what is best
    gap: str  # the difference in which a leak shows
    signature: str
    flow: str  # caption of the figure on where the information flows
    flow_table: str
    curves: str
    terms: tuple[tuple[str, Markup], ...]
    limits: tuple[str, ...]
    of_a_run: tuple[tuple[str, Measure], ...]  # in the list of runs


_INFLUENCE_ZERO = "influence of other {} as a share of input-gradient energy, where 0 certifies independence."
_POPULATION = (
    "<i>precise</i> pools the moments of training batches with the final weights, <i>running averages</i> are what "
    "training left in the model."
)
_CURVES = "Training curves in training mode: with a leak, a better curve does not mean a better model."

ADAPTED = (
    "Target domain, mixture of domains",
    Markup(
        "For images of a domain that the model was not trained on: each batch norm normalizes with statistics of these "
        "images, without their labels (AdaBN); or the predictions with the statistics of each known domain are mixed "
        "by how near the image is to it (BN embeddings)."
    ),
)

_DETECTION = Words(
    FindingWords(
        "RoIs",
        "RoI accuracy under both per-image and population statistics",
        "per-image",
        "{} of the foreground RoIs of validation images correctly while the RoIs of an image are normalized together",
    ),
    console="AP and accuracy x100. (a) statistics per image, (b) of random groups, (c) of the population; run.: "
    "running averages.",
    results="The same checkpoint under mini-batch statistics of each image (a), of random groups of RoIs (b), and "
    "under population statistics (c). AP and accuracy times 100.",
    times_100="AP",
    bold="best mean under (c)",
    gap="(a) − (c)",
    signature="The signature of a leak is a line that falls from (a) to (b) and (c): the head relies on the other "
    "RoIs of the image. A clean head rises or stays level.",
    flow="What a head owes to the RoIs it shares an image with; what the class of a companion image is worth at equal "
    "group size; and how much of an RoI's output is made by other RoIs in training.",
    flow_table="RoI classification accuracy times 100 by kind of statistics; accuracy when two images share "
    "statistics; " + _INFLUENCE_ZERO.format("RoIs"),
    curves=_CURVES,
    terms=(
        (
            "(a) per image, (b) random groups",
            Markup(
                "The RoI heads normalize with mini-batch statistics: of the RoIs of one image in (a) (of as many "
                "images as share a group in training, where that is more), which is what a leaky head saw in "
                "training; of equally many random groups of RoIs in (b)."
            ),
        ),
        (
            "(c) population",
            Markup(
                f"The heads normalize with fixed statistics, as a deployed model does: {_POPULATION} Weights, "
                "proposals and sampled RoIs are the same in (a), (b) and (c). A head frozen at the end of its "
                "training has trained with the statistics of (c): its gap (a) − (c) is a shortcut left in the "
                "weights, not a loss."
            ),
        ),
        (
            "RoI accuracy",
            Markup(
                "Share of foreground RoIs, sampled as in training, that get their right class; background is one of "
                "the answers. The gap (a) − (b) is what the head owes to the structure of a group, (a) − (c) what of "
                "that is gone under fixed statistics, as in deployment."
            ),
        ),
        (
            "Box and mask AP",
            Markup("COCO AP over IoU 0.50 to 0.95 on the validation images, with the ordinary test path."),
        ),
        (
            "Influence",
            Markup(
                "For a random direction of an RoI's output, the share of the energy of the input gradient that lies on "
                "other RoIs, with the box head in training mode. Exactly 0 certifies that an RoI is processed alone. "
                "Influence shows that a path exists; the gap shows that the head uses it."
            ),
        ),
        (
            "Pairs of images",
            Markup(
                "RoI accuracy when two images share statistics: of the same class, or two random ones. Images and "
                "group size are the same, so the difference is what the companion's class tells. It needs no "
                "population statistics."
            ),
        ),
    ),
    limits=(
        "A model without batch statistics (GroupNorm, frozen BatchNorm) has one answer; (a), (b) and the gaps are n.a. "
        "for it.",
        "Clean heads may score lower in (a) than in (c): statistics of one image take away information that a head not "
        "trained for them needs. A negative gap is no leak.",
        "A finite group is not the population: (b) and (c) of a clean head differ a little.",
    ),
    of_a_run=(
        ("box AP (a)", ap("bbox")[0]),
        ("box AP (c)", ap("bbox")[2]),
        ("RoI acc. (a)", roi_accuracy("val")[0]),
        ("RoI acc. (c)", roi_accuracy("val")[2]),
    ),
)

_CLASSIFICATION = Words(
    FindingWords(
        "images",
        "accuracy under both one-class and population statistics",
        "one-class",
        "{} of the validation images correctly while images of one class are normalized together",
    ),
    console="AP and accuracy x100. (d) statistics of images of one class, (b) of random groups, (c) of the population; "
    "run.: running averages.",
    results="The same checkpoint under mini-batch statistics of images of one class (d), of random images (b), and "
    "under population statistics (c). Accuracy times 100.",
    times_100="accuracy",
    bold="best mean under (c)",
    gap="(d) − (c)",
    signature="The signature of a leak is a line that falls from (d) to (b) and (c): the model relies on the class "
    "of the other images. A clean model rises, since images of one class mislead it, or stays level.",
    flow="What the model owes to the class of the images that it is normalized with; and how much of an image's "
    "output is made by other images in training.",
    flow_table=_INFLUENCE_ZERO.format("images").capitalize(),
    curves=_CURVES,
    terms=(
        (
            "(d) one class, (b) random groups",
            Markup(
                "Each batch norm normalizes a test batch with its own statistics: the images of a batch are of one "
                "class in (d), drawn at random in (b)."
            ),
        ),
        (
            "(c) population",
            Markup(f"The model normalizes with fixed statistics, as a deployed model does: {_POPULATION}"),
        ),
        (
            "Accuracy",
            Markup(
                "Share of validation images that get their right class. The gap (d) − (c) is what the model is better "
                "by when its batch-mates are of its class; (d) − (b) the same at equal kind of statistics."
            ),
        ),
        (
            "Influence",
            Markup(
                "For a random direction of an image's output, the share of the energy of the input gradient that lies "
                "on other images, with the model in training mode. Exactly 0 certifies that an image is processed "
                "alone."
            ),
        ),
    ),
    limits=(
        "A model without batch statistics (GroupNorm, frozen BatchNorm) has one answer; (d), (b) and the gaps are n.a. "
        "for it.",
        "Clean models score lower in (d) than in (c): statistics of one class take the class away. A negative gap is "
        "no leak.",
        "A finite group is not the population: (b) and (c) of a clean model differ a little.",
    ),
    of_a_run=(("accuracy (d)", accuracy()[0]), ("accuracy (c)", accuracy()[2])),
)

_CONTRASTIVE = Words(
    FindingWords("images", "", "", ""),  # its sentences are its own: leakfree.report.pretext
    console="Accuracies x100. kNN and linear probe under statistics (c) of the population; run.: running averages. "
    "Pretext: held-out queries that find their key, encoded with its own batch (same) and among other batch-mates "
    "(other). fall.: % of the way that the loss has come from features that tell nothing. Probe: AUC, 0.5 is silence.",
    results="What the features are worth, under precise population statistics (c) and under running averages; and the "
    "pretext task on held-out images, keys encoded with their own batch and among other batch-mates, with its loss. "
    "Accuracies times 100.",
    times_100="accuracy",
    bold="best mean",
    gap="same − other",
    signature="The signature of a leak is a line that falls when keys are encoded among other batch-mates: queries "
    "find their key by the batch it was in. The accuracy counts only where the loss is well below that of features "
    "that tell nothing (hollow): a collapsed run can score anything. Whether the features suffer is a question of "
    "its own.",
    flow="What of the pretext accuracy is owed to batch-mates; whether two features tell that they shared "
    "statistics; and how much of a query's features is made by other images in training.",
    flow_table="Probes: AUC of telling from two features whether they shared statistics, 0.5 is silence. Key moves "
    "by: distance between a key and the same among other mates, where keys have length 1. Influence: share of "
    "input-gradient energy on other images, where 0 certifies independence.",
    curves="Pretext-gap curves. With a leak, keys among other mates (dashed) are not found however well the training "
    "accuracy does; kNN tells what that costs, if anything. Read accuracy beside the loss: near the grey line it says "
    "nothing.",
    terms=(
        (
            "Pretext accuracy, same and other mates",
            Markup(
                "Share of held-out queries that are most similar to their own key, against the queue (MoCo) or the "
                "batch (SimCLR), in training mode. <i>Same</i>: keys are encoded with their batch as in training. "
                "<i>Other</i>: the same key views are encoded among other batch-mates (companion swap), nothing else "
                "changes. Same − other is the part of the accuracy that batch-mates give away."
            ),
        ),
        (
            "Loss, and how far it has fallen",
            Markup(
                "Features that tell nothing have the loss ln(1 + n) with n negatives: n is the queue's size in MoCo, "
                "2B − 2 in SimCLR. 100 % is ln(1 + n exp(−1/T)): positives aligned, negatives orthogonal on average. "
                "Below 25 % a run counts as collapsed or not yet learned, and its accuracy is not judged."
            ),
        ),
        (
            "kNN accuracy, linear probe",
            Markup(
                "Of the backbone's features with labels of the training images: weighted nearest neighbours, and a "
                f"linear classifier. The backbone normalizes with fixed statistics: {_POPULATION}"
            ),
        ),
        (
            "Batch-mate probe",
            Markup(
                "AUC with which a classifier tells from two features of different images whether they shared "
                "statistics. 0.5 is silence; n.a. where nothing is shared."
            ),
        ),
        (
            "Influence",
            Markup(
                "For a random direction of a query's features, the share of the energy of the input gradient that "
                "lies on other images, of its group and of other groups, with the query encoder in training mode. "
                "Exactly 0 certifies that an image is processed alone. The query may share statistics as long as its "
                "key does not share the same ones."
            ),
        ),
    ),
    limits=(
        "A higher pretext accuracy is not a better model, and poor features are not proof of a leak: judge the gap, "
        "the loss and kNN together.",
        "A leak need not cost kNN accuracy. In the regime this package was measured in it did where images carry a "
        "class-free trait that survives the augmentation, and did not on plain digits.",
        "Where the whole batch shares statistics (SyncBN), a part of the mates stays together in the swap by chance: "
        "the gap is a lower bound.",
        "Gaps of a point or two are within the noise of some hundred queries.",
    ),
    of_a_run=(
        ("kNN (c)", features("knn")[0]),
        ("pretext, same", pretext("same")),
        ("pretext, other", pretext("other")),
        ("loss", pretext("loss")),
    ),
)

_WORDS = {"detection": _DETECTION, "classification": _CLASSIFICATION, "contrastive": _CONTRASTIVE}


def words_of(task: str) -> Words:
    """The words of ``task``; a task unknown here is told as detection."""
    return _WORDS.get(task, _DETECTION)
