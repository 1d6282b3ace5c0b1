#!/usr/bin/env python
"""What a step of MoCo and SimCLR costs under each remedy, our training loop against lightly's, and what watching costs.

moco, simclr  a whole step (two forwards, backward, gradients averaged by DDP, SGD, queue) of the small backbone, for
              1, 2, 4 ranks of one thread each: each word for the key encoder against plain batch norms, and against
              MoCo's image shuffle by all-gather. Images are 64x3x32x32 a rank; in one process shuffles have 4 groups.
loop          images per second of `leakfree train` against a Lightning training as in lightly's MoCo example
              (lightly.ai/docs, "MoCo"): ResNet-18, 64 images of 32 pixels from PNG files, MoCo v2 views, two loader
              processes, two threads; whole trainings in processes of their own, in turns.
monitor       time of the online kNN and the swap of batch-mates as a share of training, at the intervals of
              configs/contrastive/digits.

"(plain)" is our plain writing of MoCo's algorithm. Peers take part where they are installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import peers
import torch
import torch.distributed as dist
from measure import (
    Bar,
    Goal,
    Report,
    Shape,
    alternate,
    device_of,
    goal_bars,
    make_parser,
    make_setting,
    parse,
    peak_bytes,
    progress,
    run_ranks,
    timed_row,
    too_many_ranks,
    wanted,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from leakfree.config import load_config
from leakfree.contrastive import Views, build_contrastive
from leakfree.contrastive.methods import ContrastiveMethod, MoCo
from leakfree.distributed import get_rank, get_world_size
from leakfree.training.contrastive import ContrastiveTask

IMAGES: Shape = (64, 3, 32, 32)
SECTIONS = ("moco", "simclr", "loop", "monitor")
DIGITS = Path(__file__).parents[2] / "configs" / "contrastive" / "digits"
PLAIN, GROUPED = "bn", "bn, 4 groups"
KEYS = ("shuffle_bn", "loader_shuffle", "eman", "sync_bn")
MOCO, LIGHTLY = "MoCo all-gather (plain)", "MoCo all-gather (lightly)"
GOALS = [
    Goal("shuffle_bn", PLAIN, "<=", 1.05, [IMAGES], ranks=[1]),
    Goal("shuffle_bn", PLAIN, "<=", 1.15, [IMAGES], ranks=[2]),
    Goal("shuffle_bn", MOCO, "<=", 1.0, [IMAGES], ranks=[2, 4]),
    Goal("eman", MOCO, "<=", 1.0, [IMAGES], ranks=[2, 4]),
]


# --- A step ---------------------------------------------------------------------------------------------------------


class _AllGatherKeys(MoCo):
    """The key encoder among shuffled images, by all-gather."""

    shuffle: Callable[[Tensor], tuple[Tensor, Tensor]]

    @torch.no_grad()
    def encode_keys(self, images: Tensor, index: int, num_images: int | None = None) -> Tensor:
        shuffled, home = self.shuffle(images)
        keys = self.key(shuffled)
        everyone = peers.concat_all(keys)
        return everyone[home.view(dist.get_world_size(), -1)[dist.get_rank()]]


def make_method(section: str, key: str, rows: int) -> ContrastiveMethod:
    torch.manual_seed(0)
    words = [f"model.method={section}", f"trainer.total_batch_size={rows * get_world_size()}", "model.queue_size=4096"]
    known = {PLAIN: "bn", GROUPED: "bn"}.get(key, key if key in KEYS else "bn")
    groups = rows // 4 if get_world_size() == 1 and key not in (PLAIN, "eman", "sync_bn") else 0
    words += [f"model.key={known}", f"model.images_per_group={groups}", "schedule.warmup_steps=1"]
    words += [] if section == "moco" else ["model.momentum=0.999", "model.queue_size=65536"]
    model = build_contrastive(load_config(DIGITS / "base.yaml", words))  # type: ignore[arg-type]
    if key in (MOCO, LIGHTLY):
        model.__class__ = _AllGatherKeys
        tool = peers.moco_shuffle_and_home if key == MOCO else peers.installed_lightly_shuffle_and_home()
        model.shuffle = tool  # type: ignore[assignment]
    return model


def make_step(method: ContrastiveMethod, views: Views) -> Callable[[], object]:
    module: nn.Module = method
    if dist.is_initialized():
        module = DistributedDataParallel(method, broadcast_buffers=False)
    optimizer = torch.optim.SGD([item for item in method.parameters() if item.requires_grad], lr=0.01, momentum=0.9)

    def step() -> object:
        loss = module(views).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step()
        return loss

    return step


def compare(settings: argparse.Namespace, section: str, shape: Shape) -> dict[str, Any]:
    """What each rank runs: one table."""
    ranks, device = get_world_size(), device_of(settings)
    torch.manual_seed(get_rank())
    query, key = (torch.randn(shape).to(device).contiguous(memory_format=torch.channels_last) for _ in range(2))
    empty = torch.zeros(shape[0], dtype=torch.int64)
    views = Views(query, key, empty, empty, 1)
    names = [PLAIN, *([GROUPED] if ranks == 1 else []), *KEYS, *([MOCO, LIGHTLY] if ranks > 1 else [])]
    if section == "simclr":
        names = [name for name in names if name not in ("eman", MOCO, LIGHTLY)]
    steps: dict[str, Callable[[], object]] = {}
    skipped = []
    for name in names:
        if name != PLAIN and not wanted(name, settings):
            continue
        try:
            steps[name] = make_step(make_method(section, name, shape[0]).to(device), views)
        except ImportError as error:
            skipped.append((name, str(error)))
    title = f"{section}, {ranks} rank{'s' * (ranks > 1)}, {'×'.join(map(str, shape))}"
    say = progress(title)
    rounds = alternate(steps, settings.repeats, device, max_pressure=settings.max_pressure, say=say)
    row_bytes = float(query.numel() * query.element_size())
    rows = []
    for name, step in steps.items():
        say(f"memory: {name}")
        facts = {"section": section, "title": title, "setting": make_setting(settings, shape, "channels_last")}
        row = timed_row(rounds, name, PLAIN, row_bytes=row_bytes, peak=peak_bytes(step, device) / row_bytes, **facts)
        row.bars += goal_bars(GOALS, row, rounds)
        rows.append(row.as_dict())
    return {"timings": rows, "skipped": skipped}


# --- The loop -------------------------------------------------------------------------------------------------------

LOOP_STEPS, LOOP_BATCH, LOOP_THREADS, LOOP_WORKERS = 60, 64, 2, 2

_LIGHTLY_EXAMPLE = """
import copy, json, statistics, sys, time
import lightning.pytorch as L
import torch, torchvision
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import MoCoV2Transform
from lightly.utils.scheduler import cosine_schedule

folder, steps, batch, threads, workers = sys.argv[1], *map(int, sys.argv[2:6])
torch.set_num_threads(threads)


class MoCo(L.LightningModule):
    def __init__(self):
        super().__init__()
        resnet = torchvision.models.resnet18()
        self.backbone = torch.nn.Sequential(*list(resnet.children())[:-1])
        self.projection_head = MoCoProjectionHead(512, 512, 128)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NTXentLoss(memory_bank_size=(4096, 128))
        self.times = []

    def forward(self, x):
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def forward_momentum(self, x):
        return self.projection_head_momentum(self.backbone_momentum(x).flatten(start_dim=1)).detach()

    def training_step(self, batch, batch_idx):
        momentum = cosine_schedule(self.current_epoch, 10, 0.996, 1)
        update_momentum(self.backbone, self.backbone_momentum, m=momentum)
        update_momentum(self.projection_head, self.projection_head_momentum, m=momentum)
        x_query, x_key = batch[0]
        return self.criterion(self.forward(x_query), self.forward_momentum(x_key))

    def on_train_batch_end(self, *args):
        self.times.append(time.perf_counter())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.06)


normalize = {"mean": [0.5] * 3, "std": [0.25] * 3}
data = torchvision.datasets.ImageFolder(folder, transform=MoCoV2Transform(input_size=32, normalize=normalize))
loader = torch.utils.data.DataLoader(data, batch_size=batch, shuffle=True, drop_last=True, num_workers=workers,
                                     persistent_workers=workers > 0)
model = MoCo()
trainer = L.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
                    enable_progress_bar=False, enable_model_summary=False)
trainer.fit(model, loader)
gaps = [after - before for before, after in zip(model.times, model.times[1:])]
print(json.dumps({"seconds": statistics.mean(gaps[10:])}))
"""

_LOOP_CONFIG = """
task: contrastive
output_dir: {out}
data:
  train: {{name: image_folder, path: {folder}}}
  val: {{name: image_folder, path: {folder}}}
  image_size: 32
  mean: [0.5, 0.5, 0.5]
  std: [0.25, 0.25, 0.25]
  num_workers: {workers}
  views: {{name: moco_v2}}
model: {{method: moco, backbone: resnet18, feature_dim: 128, queue_size: 4096, query: bn, key: {key},
        images_per_group: {group}}}
optimizer: {{lr: 0.06}}
schedule: {{max_steps: {steps}, warmup_steps: 0, decay: constant}}
trainer: {{total_batch_size: {batch}, num_threads: {threads}, log_period: 10, checkpoint_period: 100000}}
evaluation: {{statistics: [population], max_images: 64}}
leakage: {{enabled: false}}
"""


def write_images(folder: Path, count: int) -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    for number in range(count):
        place = folder / str(number % 4)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place / f"{number}.png")


def ours(folder: Path, scratch: Path, key: str, number: int) -> float:
    """Seconds a step of a whole `leakfree train`, without its first steps, data included."""
    out = scratch / f"{key}{number}"
    text = _LOOP_CONFIG.format(
        out=out, folder=folder, workers=LOOP_WORKERS, steps=LOOP_STEPS, batch=LOOP_BATCH, threads=LOOP_THREADS,
        key=key, group=16 if key != "bn" else 0,
    )  # fmt: skip
    path = scratch / "run.yaml"
    path.write_text(text)
    command = [sys.executable, "-m", "leakfree.cli", "train", "--config-file", str(path)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    rows = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    return statistics.mean(row["seconds_per_step"] for row in rows if row.get("step", 0) > 10 and "loss" in row)


def theirs(folder: Path) -> float:
    numbers = [str(value) for value in (LOOP_STEPS, LOOP_BATCH, LOOP_THREADS, LOOP_WORKERS)]
    command = [sys.executable, "-c", _LIGHTLY_EXAMPLE, str(folder), *numbers]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def measure_loop(repeats: int) -> list[dict[str, Any]]:
    say = progress("loop")
    times: dict[str, list[float]] = {"lightly's example": [], "leakfree, bn": [], "leakfree, shuffle_bn": []}
    with TemporaryDirectory() as name:
        scratch = Path(name)
        write_images(scratch / "images", 1024)
        for number in range(repeats):
            say(f"round {number + 1} of {repeats}")
            times["lightly's example"].append(theirs(scratch / "images"))
            times["leakfree, bn"].append(ours(scratch / "images", scratch, "bn", number))
            times["leakfree, shuffle_bn"].append(ours(scratch / "images", scratch, "shuffle_bn", number))
    rows = []
    for variant, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(times["lightly's example"], seconds, strict=True))
        values = {"images/s": LOOP_BATCH / statistics.median(seconds), "x lightly's": ratio}
        bars = [Bar("x lightly's images per second", ratio, ">=", 1.0).as_dict()] if "leakfree" in variant else []
        rows.append(_figure("loop", "loop, ResNet-18, 64 images of 32 pixels", variant, values, bars))
    return rows


# --- Watching -------------------------------------------------------------------------------------------------------


def measure_monitor(repeats: int) -> list[dict[str, Any]]:
    rows = []
    for name in ("moco_bn", "moco_shuffle_bn"):
        config: Any = load_config(DIGITS / f"{name}.yaml", [])
        torch.manual_seed(0)
        task = ContrastiveTask(config)
        optimizer = torch.optim.SGD([item for item in task.model.parameters() if item.requires_grad], lr=0.1)
        steps, watching = [], []
        batches = iter(task.train_batches(0))
        for _ in range(repeats):
            for _ in range(10):
                start = time.perf_counter()
                loss = task.losses(next(batches))["loss_contrast"]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                task.after_step()
                steps.append(time.perf_counter() - start)
            start = time.perf_counter()
            task.validate(lambda batches, what: batches)
            watching.append(time.perf_counter() - start)
        between = statistics.median(steps) * config.trainer.eval_period
        share = statistics.median(watching) / between
        values = {
            "ms a step": statistics.median(steps) * 1e3,
            "s to watch": statistics.median(watching),
            "share": share,
        }
        bars = [Bar("share of training", share, "<=", 0.03).as_dict()]
        title = f"monitor, every {config.trainer.eval_period} steps"
        rows.append(_figure("monitor", title, name, values, bars))
    return rows


def _figure(section: str, title: str, variant: str, values: dict[str, float], bars: list[Any]) -> dict[str, Any]:
    setting = {"ranks": 1, "threads": torch.get_num_threads()}
    return {
        "section": section, "title": title, "setting": setting, "variant": variant, "values": values, "bars": bars,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    shapes = f"default: {','.join(map(str, IMAGES))}"
    parser = make_parser(__doc__ or "", ranks=[1, 2, 4], threads=1, shapes=shapes)
    settings = parse(parser, arguments, SECTIONS, [PLAIN, GROUPED, *KEYS, MOCO, LIGHTLY])
    report = Report("contrastive", settings)
    for ranks in settings.ranks:
        if reason := too_many_ranks(ranks, settings):
            report.add_skipped([(f"{ranks} ranks", reason)])
            continue
        sections = [name for name in settings.only_sections if name in ("moco", "simclr")]
        jobs = [(compare, name, shape) for name in sections for shape in settings.shape or [IMAGES]]
        for found in run_ranks(jobs, ranks, settings):
            report.add_skipped(found["skipped"])
            report.add_timings(found["timings"])
    torch.set_num_threads(settings.threads)
    if "loop" in settings.only_sections:
        report.add_figures(measure_loop(min(settings.repeats, 5)))
    if "monitor" in settings.only_sections:
        report.add_figures(measure_monitor(min(settings.repeats, 5)))
    report.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
