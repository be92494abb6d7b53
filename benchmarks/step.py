"""Where the time of a calibration step goes, unit by unit: `python -m benchmarks.step --root FOLDER`.

In every unit blocks of steps taken by Lightning's loop alternate with blocks of the same steps taken by a bare one
(fetch, `training_step`, backward, optimizer); medians of both. What a step consists of comes from torch's profiler,
which sees operations, so these are taken one by one then, not played back; what time remains is Python's. The limit
is the unit's arithmetic, forward and backward, at the rate that this machine multiplies large matrices with.

Columns: ms of a step; what Lightning adds to it in percent of it; ms of a bare step whose operations are taken one by
one; shares in percent of that (on a GPU of the recorded step): layers (convolutions and matrix products), fake-
quantization, rounding with its regulariser, loss, optimizer, fetching the minibatch, other operations (activations,
additions, mixing), Python (on a GPU the time in which it does nothing); and the step's time over its limit.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.flop_counter import FlopCounterMode

import lightning_ptq as ptq
from benchmarks.common import DEFAULT_ROOT, commit
from benchmarks.speed import JOBS, TRAINER, VARIANTS, choose_kernels, prepare
from lightning_ptq.cache import Minibatch, Order
from lightning_ptq.loader import Minibatches

# What the profiler calls the operations of each part; time is counted where an operation is not inside another of them.
PARTS = {
    "layers": (
        "aten::convolution",
        "aten::convolution_backward",
        "aten::linear",
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
    ),
    "quantize": ("_FakeQuantize", "_FakeQuantizeBackward"),
    "rounding": ("_SoftRound", "_SoftRoundBackward", "_Undecided", "_UndecidedBackward"),
    "loss": ("_WeightedError", "_WeightedErrorBackward", "aten::mse_loss", "aten::mse_loss_backward"),
    "optimizer": ("aten::_fused_adam_", "aten::_foreach_add_"),
    "fetch": ("aten::index_select", "aten::randperm"),
}
BLOCK, BLOCKS = 10, 4
WARM_UP = 10
STEPS = WARM_UP + (2 * BLOCKS + 2) * BLOCK


def matrix_rate(device: torch.device, size: int = 2048) -> float:
    """Floating-point operations a second of a product of two float32 matrices."""
    a, b = torch.randn(2, size, size, device=device)
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Measure(L.Callback):
    """Takes the places of some of an epoch's steps to time them without Lightning."""

    def __init__(self, rate: float, operations: int = 0) -> None:
        self.rate, self.operations = rate, operations
        self.looped: list[float] = []
        self.bare: list[float] = []
        self.rows: list[dict[str, Any]] = []
        self.batch: Minibatch | None = None  # in whose memory minibatches come, where steps are recorded

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, step: int) -> None:
        """Time the block of steps that ends here, and take one."""
        assert isinstance(module, ptq.PTQModule)
        step *= module.steps_per_batch
        if step < WARM_UP or step % BLOCK:
            return
        if module.reuses_memory:
            self.batch = next(iter(batch)) if isinstance(batch, Minibatches) else batch
        _wait(module.device)
        if step > WARM_UP:
            self.looped.append((time.perf_counter() - self.start) / BLOCK)
        if len(self.bare) < BLOCKS:
            start = time.perf_counter()
            self.steps(module, step)
            self.bare.append((time.perf_counter() - start) / BLOCK)
        elif self.looped:
            self.rows.append(self.row(module, step))
            self.looped, self.bare = [], []
            trainer.fit_loop.epoch_loop.batch_progress.current.ready = trainer.num_training_batches
        self.start = time.perf_counter()

    def steps(self, module: ptq.PTQModule, first: int, count: int = BLOCK) -> None:
        """Steps as the Trainer would take them, on minibatches of their own."""
        cache, optimizer = module.session.opened, module.trainer.optimizers[0]
        order = Order(cache.drawn, module.batch_size, module.seed, 0, 0, device=module.device)
        for step in range(first + 1, first + 1 + count):  # not at a logging step
            batch = cache.minibatch(order.rows(step), into=self.batch)
            with module.trainer.precision_plugin.train_step_context():
                loss = module._step(batch, step % 50 or 1)
            module.optimizer_zero_grad(0, step, optimizer)
            module.backward(loss)
            optimizer.step()
            del loss  # a recording must find no graph of an earlier step
        _wait(module.device)

    def row(self, module: ptq.PTQModule, step: int) -> dict[str, Any]:
        """What was found about the unit in progress; operation by operation, and not played back."""
        module._records = False
        self.steps(module, step, 2)
        start = time.perf_counter()
        self.steps(module, step)
        single = 1000 * (time.perf_counter() - start) / BLOCK
        with FlopCounterMode(display=False) as counter:
            self.steps(module, step, 1)
        with torch.profiler.profile() as profiler:
            self.steps(module, step)
        # Deprecated spellings apart, `device_time_total` is 0 on the CPU.
        events = profiler.key_averages()
        kind = "device" if module.device.type == "cuda" else "cpu"
        if self.operations:
            print(events.table(f"self_{kind}_time_total", self.operations, max_name_column_width=90))
        total = {event.key: getattr(event, f"{kind}_time_total") for event in events}
        # A GPU's kernels are events of their own beside the operations that started them, and ours begin alike.
        operation = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
        own = sum(getattr(e, f"self_{kind}_time_total") for e in operation if e.key.startswith(("aten::", "_")))
        looped, bare = (1000 * statistics.median(times) for times in (self.looped, self.bare))
        per_step = {part: sum(total.get(key, 0) for key in keys) / 1000 / BLOCK for part, keys in PARTS.items()}
        operations = own / 1000 / BLOCK
        per_step["other"] = operations - sum(per_step.values())
        whole = bare if kind == "device" else single
        per_step["python"] = whole - operations
        limit = 1000 * counter.get_total_flops() / self.rate
        return {
            "unit": module.epoch_names[module.trainer.current_epoch],
            "ms": looped,
            "lightning": 100 * (looped - bare) / looped,
            "single": single,
            **{part: 100 * ms / whole for part, ms in per_step.items()},
            "limit_ms": limit,
            "over_limit": looped / limit,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(DEFAULT_ROOT), help="folder with calib/, val/ and teachers/")
    parser.add_argument("--job", choices=list(JOBS), default="cifar")
    parser.add_argument("--variant", choices=list(VARIANTS), default="qdrop")
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--steps_per_batch", type=int, choices=[1, 2, 5, 10], help="1, or on a GPU 10 by default")
    parser.add_argument("--operations", type=int, default=0, help="print so many of each unit, the dearest")
    args = parser.parse_args()
    choose_kernels(args.variant)
    model, images = prepare(args.job, args.root)
    bits = JOBS[args.job][3]
    module = ptq.PTQModule(
        model,
        ptq.QuantConfig(*bits),
        steps_per_unit=STEPS,
        seed=0,
        report=False,
        **{"network_steps": STEPS, "steps_per_batch": 10 if args.accelerator == "gpu" else 1}
        | VARIANTS[args.variant]
        | ({} if args.steps_per_batch is None else {"steps_per_batch": args.steps_per_batch}),
    )
    rate = matrix_rate(torch.device("cuda" if args.accelerator == "gpu" else "cpu"))
    measure = Measure(rate, args.operations)
    with tempfile.TemporaryDirectory() as folder:
        L.Trainer(
            accelerator=args.accelerator,
            devices=1,
            max_epochs=-1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **TRAINER.get(args.variant, {}),
            default_root_dir=folder,
            callbacks=[measure],
        ).fit(module, datamodule=ptq.CalibrationDataModule.from_loaders([images], calibration_samples=len(images)))
    where = torch.cuda.get_device_name() if args.accelerator == "gpu" else f"{torch.get_num_threads()} threads"
    print(f"\n{args.job}, {args.variant}, {where}, {rate / 1e9:.0f} GFLOP/s in matrix products, commit {commit()}\n")
    columns = ["ms", "lightning", "single", *PARTS, "other", "python", "limit_ms", "over_limit"]
    print(f"{'unit':<16}" + "".join(f"{column:>11}" for column in columns))
    for row in measure.rows:
        print(
            f"{row['unit']:<16}"
            + "".join(f"{row[key]:>11.{1 + (key in ('ms', 'single', 'limit_ms'))}f}" for key in columns)
        )
    total = {key: sum(row[key] for row in measure.rows) for key in ("ms", "limit_ms")}
    lightning = sum(row["ms"] * row["lightning"] for row in measure.rows) / total["ms"]
    print(f"one step each: {total['ms']:.1f} ms, {lightning:.1f} % of it Lightning's; limit {total['limit_ms']:.1f} ms")


if __name__ == "__main__":
    main()
