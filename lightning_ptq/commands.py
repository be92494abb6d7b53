"""What the command line does beyond Lightning: `plan`, `sensitivity`, `export`, `compare` and `report`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_ptq.building import build_network
from lightning_ptq.checkpoint import read_checkpoint
from lightning_ptq.compare import compare, open_artifact
from lightning_ptq.datamodule import CalibrationDataModule
from lightning_ptq.eight_bits import eight_bits, images_to_try
from lightning_ptq.errors import NoValidationImages, PTQError
from lightning_ptq.export import compare_lowered, export_onnx, export_pt2, save_packed
from lightning_ptq.front import front_data, front_text, pareto_front, plot_front
from lightning_ptq.help import PROGRAM
from lightning_ptq.memory import Room
from lightning_ptq.module import PTQModule
from lightning_ptq.parser import CommandParser
from lightning_ptq.plan import plan_text
from lightning_ptq.report import write_report
from lightning_ptq.session import held_out_of
from lightning_ptq.store import chunks
from lightning_ptq.summary import write_json


def report_parser() -> CommandParser:
    """Arguments of `report`, which needs neither model nor data nor Trainer."""
    parser = CommandParser(prog=f"{PROGRAM} report", description="Draw the report of a run, or several side by side.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder that a fit has left")
    parser.add_argument(
        "--output", help="the .html file to write; by default report.html, in the run's folder or, of several, here"
    )
    parser.add_argument(
        "--layers", nargs="+", default=[], metavar="PATTERN", help="layers whose histograms are drawn too"
    )
    parser.add_argument(
        "--overwrite", type=bool, default=False, help="replace what --output names; report.html is in any case"
    )
    return parser


def report(arguments: Sequence[str]) -> None:
    """Draw a report from what is in run folders, and say where it is."""
    told = report_parser().parse_args(list(arguments))
    print(f"report: {write_report(told.runs, told.output, layers=told.layers, overwrite=told.overwrite)}")


class NoModel(L.LightningModule):
    """What stands where a command that does without a model is given none."""


def build_module(
    model: nn.Module | str | None = None, weights: str | None = None, **kwargs: Any
) -> PTQModule:  # `compare` alone may get a NoModel
    """A `PTQModule` from a model and a weights file.

    Args:
        model: a torchvision model's name ("resnet18"), the import path of a function that returns a model
            ("my_package.net.build"), or a module class with its arguments (class_path, init_args).
        weights: a file with the model's state dict, or the name of torchvision weights ("DEFAULT"). None leaves the
            model as it was built.

    Raises:
        PTQError: an unknown model, or weights that do not fit it.
    """
    if model is None:
        return NoModel()  # type: ignore[return-value]
    return PTQModule(build_network(model, weights), **kwargs)


class Trainer(L.Trainer):
    """Lightning's Trainer and four more subcommands."""

    untrained: str | None = None  # why `plan` has the network without its weights, if it has
    network: nn.Module | None = None  # the model as it was trained, for `compare`

    def plan(self, model: L.LightningModule, datamodule: CalibrationDataModule | None = None) -> None:
        """Print each unit: layers, bits, shapes, parameters, cache size, and what stays float.

        Where there are calibration images, a few of them show what 8 bits do to the network.
        """
        assert isinstance(model, PTQModule)
        if datamodule is None or datamodule.image_shape is None:
            raise PTQError("plan needs the images' shape. Give the data section of the config.")
        shape, samples = model.input_shape(datamodule.image_shape), _count(datamodule)
        part = None if model.surroundings is None else model.surroundings.part
        network, folder = model.network_steps > 0, Path(model.cache_folder or self.default_root_dir)
        print(plan_text(model.chains, model.quant, shape, samples, network, part, model.cache_dtype))
        room = Room(self.strategy.root_device, model.memory_budget, folder, self.world_size)
        try:
            further = (_count(datamodule, model.judging) - samples) // self.world_size
            read = samples + held_out_of(further, self.world_size) * self.world_size
            print(f"\n{model.caches(shape, -(-read // self.world_size), room)}")
            print("  with the images, those that judge, and where a unit ends its output once more: not in the table")
        except PTQError as error:
            print(f"\nno fit: {error}")
        if self.untrained is None:
            print(f"\n{_eight_bits_text(model, datamodule, shape, self.strategy.root_device)}")
        else:
            print(f"\nnot tried with 8 bits: {self.untrained}")

    def sensitivity(self, model: L.LightningModule, datamodule: CalibrationDataModule | None = None) -> None:
        """Print what each tensor costs at 2, 3, 4, 5, 6 and 8 bits, and the best mixtures.

        Both go to `trainer.default_root_dir` too, in place of what lies there.
        """
        assert isinstance(model, PTQModule)
        if datamodule is None:
            raise PTQError("sensitivity needs calibration images. Give the data section of the config.")
        folder, device = Path(self.default_root_dir), self.strategy.root_device
        _set_up(datamodule)
        images = model.checked(datamodule.calibration_images())
        learned = model.method.rounding != "nearest"
        front = pareto_front(model.to(device).chains, images, model.quant, device, learned, rank_zero_info)
        print(front_text(front))
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "sensitivity.json", front_data(front))
        plot_front(front, folder / "sensitivity.png")
        print(f"\nwritten: {folder / 'sensitivity.json'}, {folder / 'sensitivity.png'}")

    def export(
        self,
        model: L.LightningModule,
        datamodule: CalibrationDataModule | None = None,
        ckpt_path: str | None = None,
        output: str = "model.onnx",
        overwrite: bool = False,
    ) -> None:
        """Write the quantized network: as ONNX model or PyTorch program, compared with the simulation, or packed.

        A program is compared once more in int8 kernels, where this machine and the network's quantizers allow that.

        Args:
            ckpt_path: a finished fit's checkpoint.
            output: the file to write: .onnx, .pt2, or .ptq for a packed checkpoint.
            overwrite: replace a file that is there.

        Exits with code 1 if the exported model does not do what the simulation does.
        """
        assert isinstance(model, PTQModule)
        if ckpt_path is None or datamodule is None:
            raise PTQError("export needs a finished fit: give its config with --config and --ckpt_path.")
        kind = Path(output).suffix
        if kind not in (".onnx", ".pt2", ".ptq"):
            raise PTQError(f"output={output!r} names no format. Let it end in .onnx, .pt2 or .ptq.")
        model.restore(read_checkpoint(ckpt_path))
        if kind == ".ptq":
            sizes = save_packed(model, output, overwrite=overwrite)
            parts = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
            print(f"{output}: {sum(sizes.values()):,} bytes ({parts})")
            return
        _set_up(datamodule)
        images = datamodule.calibration_images()
        export = export_pt2 if kind == ".pt2" else export_onnx
        report = export(model, output, images, overwrite=overwrite)
        print(report.text())
        if model.quant.act_bits == 8 and model.quant.placement == "paper":
            print(
                "Its layers compute in float32 between the quantizers. For a runtime's integer kernels calibrate with "
                "--model.quant.placement hardware --model.quant.weight_symmetric true."
            )
        if kind == ".pt2":
            try:
                print(compare_lowered(model, output, images).text())
            except Exception as error:  # whatever a compiler raises; the file is written and does without
                print(f"{output}: {(str(error) or type(error).__name__).splitlines()[0]}")
        if not report.passed:
            sys.exit(1)

    def compare(
        self,
        model: L.LightningModule,
        first: str,
        second: str,
        datamodule: CalibrationDataModule | None = None,
        least_agreement: float = 99.0,
        least_sqnr_db: float | None = None,
    ) -> None:
        """Print how two artifacts of one network compare: classes, accuracy, size and time.

        The images are those of validation, or of calibration where there is none.

        Args:
            first: a file that ends in .onnx, .pt2, .ptq or .ckpt, or "float" for the model itself.
            second: another; a model is needed for all but .onnx and .pt2.
            least_agreement: percent of images that have to get the same class.
            least_sqnr_db: signal-to-noise ratio that the outputs have to reach.

        Exits with code 1 if the two differ by more.
        """
        if datamodule is None:
            raise PTQError("compare needs images. Give the data section of the config.")
        a, b = (open_artifact(name, self.network) for name in (first, second))
        batches = datamodule.val_dataloader() if _set_up(datamodule) else []
        if not batches:
            print("no validation images: compared on those of calibration")
        found = compare(a, b, batches or chunks(datamodule.calibration_images()))
        datamodule.teardown("fit")
        print(found.text())
        short = found.shortfalls(least_agreement, least_sqnr_db)
        if short:
            print(f"NOT the same network: {'; '.join(short)}.")
            sys.exit(1)


def _set_up(datamodule: CalibrationDataModule) -> bool:
    """Build the data sets; False if the folder of validation images is missing."""
    warnings.filterwarnings("ignore", r"data\.calibration_samples=")  # fit says it
    datamodule.prepare_data()
    try:
        datamodule.setup("fit")
    except NoValidationImages:  # looked for behind those of calibration
        return False
    return True


def _count(datamodule: CalibrationDataModule, further: float = 0.0) -> int:
    """How many images a fit would read; where they are not there yet, as many as it asks for."""
    try:
        return datamodule.count_with(further)
    except Exception:  # whatever a user's data set raises: a plan does without images
        return datamodule.calibration_samples


def _eight_bits_text(
    model: PTQModule, datamodule: CalibrationDataModule, shape: tuple[int, ...], device: torch.device
) -> str:
    try:
        with suppress(NoValidationImages):
            datamodule.setup("fit")  # nothing is downloaded for a plan
        # As one of so many processes: that reads no more images than are looked at.
        count = _count(datamodule)
        few = datamodule.calibration_images(0, -(-count // images_to_try(shape)))
        found = eight_bits(model.to(device).chains, model.checked(few).to(device), model.quant, device)
        return found.text(of=count)
    except Exception as error:  # whatever a user's data set raises: a plan does without images
        return f"not tried with 8 bits: {error}"
