"""COCO AP against hand arithmetic, against COCOeval on JSON files, and over ranks."""

from __future__ import annotations

import json
import random
import warnings

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as mask_api

from leakfree.errors import LeakfreeError
from leakfree.evaluation import CocoAp
from tests.ranks import run_ranks

SIZE = 128
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def ellipses(boxes, size=SIZE):
    """Soft masks (N, 1, H, W) of the ellipses inside ``boxes``."""
    ys, xs = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    center, radius = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    center, radius = center[..., None, None], radius[..., None, None]
    distance = ((xs - center[:, 0]) / radius[:, 0]) ** 2 + ((ys - center[:, 1]) / radius[:, 1]) ** 2
    return torch.sigmoid(4 * (1 - distance))[:, None]


def scene(image_id, num_objects, num_extra, crowd=False):
    """Jittered detections of ``num_objects`` objects of small to large size, and ``num_extra`` random ones."""
    g = torch.Generator().manual_seed(image_id)

    def draw(n):
        side = torch.tensor([16.0, 48.0, 110.0])[torch.randint(3, (n, 1), generator=g)]
        sides = side * (0.8 + 0.4 * torch.rand(n, 2, generator=g))
        corner = torch.rand(n, 2, generator=g) * (SIZE - sides).clamp(min=0)
        return torch.cat([corner, corner + sides], 1)

    truth, labels = draw(num_objects), torch.randint(1, 4, (num_objects,), generator=g)
    boxes = torch.cat([truth + 3 * torch.randn(num_objects, 4, generator=g), draw(num_extra)])
    masks = (ellipses(truth)[:, 0] > 0.5).to(torch.uint8)
    prediction = {
        "boxes": boxes,
        "labels": torch.cat([labels, torch.randint(1, 4, (num_extra,), generator=g)]),
        "scores": (torch.rand(len(boxes), generator=g) * 10).round() / 10,  # ties, within and across images
        "masks": ellipses(boxes),
    }
    target = {
        "boxes": truth,
        "labels": labels,
        "masks": masks,
        "area": masks.flatten(1).sum(1).float(),
        "iscrowd": (torch.arange(num_objects) == 0).long() * crowd,
        "image_id": image_id,
    }
    return prediction, target


def scenes():
    """Images with objects, with a crowd, without objects, without detections, with neither."""
    counts = [(3, 4), (5, 2), (0, 3), (2, 0), (0, 0), (4, 120), (1, 1), (6, 6), (3, 0), (2, 5)]
    return [
        scene(97 * (position + 1) % 1009, objects, extra, crowd=position % 3 == 0)
        for position, (objects, extra) in enumerate(counts)
    ]


def evaluate(pairs, with_masks=True, per_update=3):
    ap = CocoAp(with_masks)
    for start in range(0, len(pairs), per_update):
        part = pairs[start : start + per_update]
        ap.update([prediction for prediction, _ in part], [target for _, target in part])
    return ap.compute()


def without_ids(pairs):
    return [(p, {key: value for key, value in target.items() if key != "image_id"}) for p, target in pairs]


def rle(mask):
    code = mask_api.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def coco_eval_on_files(pairs, folder, kind):
    """The official road: ground truth and results as COCO JSON, COCOeval, its first six numbers."""

    def xywh(box):
        x1, y1, x2, y2 = box.tolist()
        return [x1, y1, x2 - x1, y2 - y1]

    truth: dict = {"images": [], "annotations": [], "categories": [{"id": i, "name": str(i)} for i in range(1, 4)]}
    results = []
    for prediction, target in pairs:
        image = target["image_id"]
        truth["images"].append({"id": image, "height": SIZE, "width": SIZE})
        for k in range(len(target["labels"])):
            truth["annotations"].append(
                {"id": len(truth["annotations"]) + 1, "image_id": image, "category_id": int(target["labels"][k]),
                 "bbox": xywh(target["boxes"][k]), "area": float(target["area"][k]),
                 "iscrowd": int(target["iscrowd"][k]), "segmentation": rle(target["masks"][k])}
            )  # fmt: skip
        for k in range(len(prediction["labels"])):
            results.append(
                {"image_id": image, "category_id": int(prediction["labels"][k]),
                 "score": float(prediction["scores"][k])}
                | ({"bbox": xywh(prediction["boxes"][k])} if kind == "bbox"
                   else {"segmentation": rle(prediction["masks"][k, 0] > 0.5)})
            )  # fmt: skip
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "results.json").write_text(json.dumps(results))
    gt = COCO(str(folder / "truth.json"))
    run = COCOeval_faster(gt, gt.loadRes(str(folder / "results.json")), iouType=kind)
    run.evaluate()
    run.accumulate()
    run.summarize()
    return {f"{kind}/{name}": float(run.stats[i]) for i, name in enumerate(NAMES)}


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_equals_coco_eval_on_json_files(kind, tmp_path):
    pairs = scenes()
    expected = coco_eval_on_files(pairs, tmp_path, kind)
    assert all(0.05 < value < 0.95 for value in expected.values()), expected  # a regime where errors would show
    ours = evaluate(pairs)
    assert {key: ours[key] for key in expected} == pytest.approx(expected, abs=1e-7)


def test_boxes_alone_equal_boxes_beside_masks():
    pairs = scenes()
    both, boxes = evaluate(pairs), evaluate(pairs, with_masks=False)
    assert boxes == {key: value for key, value in both.items() if key.startswith("bbox/")}
    assert len(both) == 12


def square(*corners, labels=None, scores=None, **more):
    boxes = torch.tensor([[x, y, x + 20.0, y + 20.0] for x, y in corners]).reshape(-1, 4)
    masks = torch.zeros(len(corners), SIZE, SIZE)
    for mask, (x, y) in zip(masks, corners, strict=True):
        mask[y : y + 20, x : x + 20] = 1
    item = {"boxes": boxes, "labels": torch.tensor(labels or [1] * len(corners), dtype=torch.int64), "masks": masks}
    if scores is not None:
        item |= {"scores": torch.tensor(scores), "masks": masks[:, None]}
    return item | {key: torch.tensor(value) for key, value in more.items()}


def test_ap_of_right_wrong_right_by_hand():
    target = square((0, 0), (60, 60))
    prediction = square((0, 0), (30, 80), (60, 60), scores=[0.9, 0.8, 0.7])
    result = evaluate([(prediction, target)])
    # precision 1 up to recall 0.5 (51 of 101 points), then 2/3
    expected = (51 + 50 * 2 / 3) / 101
    for key in ("bbox/AP", "bbox/AP50", "bbox/AP75", "bbox/APs", "segm/AP", "segm/AP50", "segm/APs"):
        assert result[key] == pytest.approx(expected, abs=1e-6)
    assert result["bbox/APm"] is None
    assert result["segm/APl"] is None


def test_an_iou_exactly_on_a_threshold_is_a_match():
    prediction = square((0, 0), scores=[0.9])
    prediction["boxes"][0, 3] = 11.0  # 20 x 11 of 20 x 20 pixels: IoU 0.55
    prediction["masks"][:, :, 11:] = 0
    result = evaluate([(prediction, square((0, 0)))])
    assert result["bbox/AP"] == result["segm/AP"] == pytest.approx(2 / 10, abs=1e-6)  # at 0.5 and 0.55


def test_perfect_predictions_score_one():
    pairs = []
    for _, target in scenes():
        prediction = {key: target[key] for key in ("boxes", "labels")}
        prediction |= {"scores": torch.ones(len(target["labels"])), "masks": target["masks"][:, None].float()}
        pairs.append((prediction, target))
    assert evaluate(pairs) == pytest.approx(dict.fromkeys(evaluate(pairs), 1.0))


def test_no_predictions_score_zero_and_no_objects_score_nothing():
    empty = square(scores=[])
    missed = evaluate([(empty, square((0, 0)))])
    assert missed["bbox/AP"] == missed["segm/AP"] == 0.0
    assert missed["bbox/APl"] is None
    for pairs in ([], [(empty, square())], [(empty, square())] * 3, [(square((0, 0), scores=[0.5]), square())]):
        result = evaluate(pairs)
        assert list(result) == [f"{kind}/{name}" for kind in ("bbox", "segm") for name in NAMES]
        assert set(result.values()) == {None}


def test_false_positives_on_images_without_objects_count():
    right = (square((0, 0), scores=[0.5]), square((0, 0)))
    wrong = (square((0, 0), scores=[0.9]), square())
    assert evaluate([right])["segm/AP"] == pytest.approx(1.0)
    assert evaluate([right, wrong])["segm/AP"] == pytest.approx(0.5)
    assert evaluate([right, wrong])["bbox/AP"] == pytest.approx(0.5)


def test_matches_with_a_crowd_are_neither_right_nor_wrong():
    prediction = square((0, 0), (60, 60), (60, 60), scores=[0.5, 0.9, 0.8])
    crowd = square((0, 0), (60, 60), iscrowd=[0, 1])
    plain = square((0, 0), (60, 60), iscrowd=[0, 0])
    assert evaluate([(prediction, crowd)])["bbox/AP"] == pytest.approx(1.0)
    assert evaluate([(prediction, crowd)])["segm/AP"] == pytest.approx(1.0)
    assert evaluate([(prediction, plain)])["bbox/AP"] < 0.9


def test_size_goes_by_the_area_of_the_target_else_of_its_mask():
    prediction = square((0, 0), scores=[0.9])
    assert evaluate([(prediction, square((0, 0), area=[2000.0]))])["segm/APm"] == pytest.approx(1.0)
    assert evaluate([(prediction, square((0, 0)))])["segm/APs"] == pytest.approx(1.0)


def test_mask_probabilities_are_cut_at_a_half():
    target = square((0, 0))
    prediction = square((0, 0), scores=[0.9])
    prediction["masks"] = prediction["masks"] * 0.2 + 0.4  # 0.6 inside, 0.4 outside
    assert evaluate([(prediction, target)])["segm/AP"] == pytest.approx(1.0)
    prediction["masks"] = prediction["masks"] * 0.8  # 0.48 inside
    assert evaluate([(prediction, target)])["segm/AP"] == 0.0


def test_more_than_100_detections_are_cut_without_a_warning():
    prediction = square(*[(90, 90)] * 100, (0, 0), scores=[0.9] * 100 + [0.1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluate([(prediction, square((0, 0)))])["bbox/AP"] == 0.0


def test_half_precision_outputs_on_any_layout_are_taken():
    prediction = square((0, 0), (60, 60), scores=[0.5, 0.25])
    half = {key: value.bfloat16() if value.is_floating_point() else value for key, value in prediction.items()}
    half["masks"] = half["masks"][:, 0].bool()
    target = square((0, 0), (60, 60))
    assert evaluate([(half, target)]) == evaluate([(prediction, target)])


def test_order_and_repetition_of_images_with_ids_do_not_matter():
    pairs = scenes()
    expected = evaluate(pairs)
    shuffled = [*pairs, *pairs[:3]]
    random.Random(0).shuffle(shuffled)
    assert evaluate(shuffled, per_update=4) == expected
    assert evaluate(without_ids(pairs + pairs[:3])) != expected  # without ids every image counts


def test_reset_forgets_and_compute_does_not():
    ap = CocoAp(with_masks=True)
    pairs = scenes()
    ap.update([pairs[0][0]], [pairs[0][1]])
    assert ap.compute() == ap.compute() == evaluate(pairs[:1])
    ap.update([pairs[1][0]], [pairs[1][1]])
    assert ap.compute() == evaluate(pairs[:2])
    ap.reset()
    assert ap.compute()["bbox/AP"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, t: p.pop("scores"), "a prediction lacks scores; it has boxes, labels, masks"),
        (lambda p, t: t.pop("masks"), "a target lacks masks"),
        (lambda p, t: p.update(labels=torch.tensor([1, 2])), "different length"),
    ],
)
def test_unusable_outputs_are_told(change, message):
    prediction, target = square((0, 0), scores=[0.5]), square((0, 0))
    change(prediction, target)
    with pytest.raises(LeakfreeError, match=message):
        CocoAp(with_masks=True).update([prediction], [target])
    with pytest.raises(LeakfreeError, match="same length"):
        CocoAp(with_masks=True).update([square((0, 0), scores=[0.5])], [])


# --- ranks

SHARDS = {2: [slice(0, 7), slice(7, 10)], 3: [slice(0, 0), slice(0, 6), slice(4, 10)]}  # none; repeated images


def _rank(rank, world_size, with_ids):
    pairs = scenes()[SHARDS[world_size][rank]]
    return evaluate(pairs if with_ids else without_ids(pairs))


@pytest.mark.parametrize(("world_size", "with_ids"), [(2, True), (2, False), (3, True)])
def test_uneven_and_empty_ranks_equal_one_process(world_size, with_ids):
    pairs = scenes() if with_ids else without_ids(scenes())
    expected = evaluate(pairs)
    assert run_ranks(_rank, world_size, with_ids) == [expected] * world_size


def _empty_rank(rank, world_size):
    return evaluate([])


def test_no_images_on_any_rank_is_no_crash():
    for result in run_ranks(_empty_rank, 2):
        assert set(result.values()) == {None}


def _broken_rank(rank, world_size):
    ap = CocoAp(with_masks=False)
    ap.update(*[[item] for item in scenes()[0]])
    if rank == 1:
        ap._ids.append(0)  # what rank 0 gathers is inconsistent
    with pytest.raises(IndexError if rank == 0 else RuntimeError) as caught:
        ap.compute()
    return str(caught.value)


def test_failure_of_rank_0_is_raised_on_all():
    first, second = run_ranks(_broken_rank, 2)
    assert first
    assert second.startswith("CocoAp: rank 0 failed: ")
