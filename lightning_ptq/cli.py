"""The command line: `lightning-ptq fit|validate|test|predict|plan|sensitivity|export|compare`."""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback, instantiate_class
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_ptq.cache import chunks
from lightning_ptq.calibration import RANGE_IMAGES
from lightning_ptq.callbacks import PredictionFile
from lightning_ptq.checkpoint import read_checkpoint
from lightning_ptq.checks import check_run_folder, run_folder
from lightning_ptq.compare import compare, open_artifact
from lightning_ptq.datamodule import CalibrationDataModule
from lightning_ptq.eight_bits import eight_bits, images_to_try
from lightning_ptq.errors import PTQError
from lightning_ptq.export import compare_lowered, export_onnx, export_pt2, save_packed
from lightning_ptq.files import write_whole
from lightning_ptq.front import front_data, front_text, pareto_front, plot_front
from lightning_ptq.interruptions import LAUNCHER, lost_process
from lightning_ptq.module import PTQModule
from lightning_ptq.plan import plan_text
from lightning_ptq.summary import write_json


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


def build_network(model: nn.Module | str, weights: str | None) -> nn.Module:
    """The trained network, in eval mode; arguments and errors as those of `build_module`."""
    network = model if isinstance(model, nn.Module) else build_model(model, weights)
    if weights is not None and (Path(weights).exists() or not _is_torchvision(model)):
        load_weights(network, weights)
    # Networks are built in training mode; from here on nobody could have meant that.
    return network.eval()


def build_model(name: str, weights: str | None = None) -> nn.Module:
    """The torchvision model `name`, with torchvision's `weights` if they are no file, or what `name` imports to."""
    if _is_torchvision(name):
        import torchvision

        named = weights if weights is not None and not Path(weights).exists() else None
        try:
            # Detectors and segmentation networks would download their backbone's weights.
            takes = signature(torchvision.models.get_model_builder(name)).parameters
            own = {"weights_backbone": None} if named is None and "weights_backbone" in takes else {}
            return torchvision.models.get_model(name, weights=named, **own)  # type: ignore[no-any-return]
        except (ValueError, KeyError) as error:
            raise PTQError(
                f"model={name!r} with weights={weights!r}: {error}. Name a model and weights of torchvision, "
                "a weights file that exists, or the import path of a function that returns a model."
            ) from None
        except OSError as error:
            raise PTQError(
                f"weights={weights!r} of {name!r} can't be downloaded: {error}. Give a weights file that exists."
            ) from error
    module, _, attribute = name.rpartition(".")
    try:
        build = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise PTQError(f"model={name!r} can't be imported: {error}. Give the path of a function or class.") from None
    try:
        network = build()
    except TypeError as error:
        raise PTQError(
            f"model={name!r} can't be called without arguments: {error}. Give class_path and init_args, or the path "
            "of a function that needs none."
        ) from error
    if not isinstance(network, nn.Module):
        raise PTQError(f"model={name!r} returned {type(network).__name__}, not a torch.nn.Module.")
    return network


def load_weights(model: nn.Module, path: str) -> None:
    """Load a state dict, bare or below "state_dict" or "model", strictly and without running code from the file."""
    if not Path(path).is_file():
        raise PTQError(
            f"weights={path!r} is no file, seen from {str(Path.cwd())!r}. Give a state dict saved with torch.save."
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise PTQError(f"weights={path!r} can't be read: {error}. Save a plain state dict with torch.save.") from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        first = "; ".join(line.strip() for line in str(error).splitlines()[1:4]) or str(error)
        raise PTQError(
            f"weights={path!r} do not fit {type(model).__name__}: {first}. Give the file that this model was saved to."
        ) from None


def _is_torchvision(model: nn.Module | str) -> bool:
    return isinstance(model, str) and "." not in model


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
        shape, samples = model.input_shape(datamodule.image_shape), datamodule.calibration_samples
        part = None if model.surroundings is None else model.surroundings.part
        print(plan_text(model.chains, model.quant, shape, samples, network=model.network_steps > 0, part=part))
        if self.untrained is None:
            print(f"\n{_eight_bits_text(model, datamodule, shape, self.strategy.root_device)}")
        else:
            print(f"\nnot tried with 8 bits: {self.untrained}")

    def sensitivity(self, model: L.LightningModule, datamodule: CalibrationDataModule | None = None) -> None:
        """Print what each tensor costs at 2, 3, 4 and 8 bits, and the best mixtures.

        Both go to `trainer.default_root_dir` too, in place of what lies there.
        """
        assert isinstance(model, PTQModule)
        if datamodule is None:
            raise PTQError("sensitivity needs calibration images. Give the data section of the config.")
        folder, device = Path(self.default_root_dir), self.strategy.root_device
        datamodule.prepare_data()
        datamodule.setup("fit")
        images = model.checked(datamodule.calibration_images())[:RANGE_IMAGES]
        learned = model.method.rounding != "nearest"
        found, front = pareto_front(model.to(device).chains, images, model.quant, device, learned)
        print(front_text(found, front, model.quant.budget))
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "sensitivity.json", front_data(found, front))
        written = [folder / "sensitivity.json"]
        if find_spec("matplotlib"):
            written.append(folder / "sensitivity.png")
            plot_front(front, model.quant.budget, written[-1])
        print(f"\nwritten: {', '.join(map(str, written))}")

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
        datamodule.prepare_data()
        datamodule.setup("fit")
        images = datamodule.calibration_images()
        export = export_pt2 if kind == ".pt2" else export_onnx
        report = export(model, output, images, overwrite=overwrite)
        print(report.text())
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
        datamodule.prepare_data()
        datamodule.setup("fit")
        found = compare(a, b, datamodule.val_dataloader() or chunks(datamodule.calibration_images()))
        datamodule.teardown("fit")
        print(found.text())
        short = found.shortfalls(least_agreement, least_sqnr_db)
        if short:
            print(f"NOT the same network: {'; '.join(short)}.")
            sys.exit(1)


class SaveRunConfig(SaveConfigCallback):
    """Writes config.yaml, but never into a folder that holds another run."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing yet: before `on_fit_start`, Lightning does not tell whether a checkpoint is continued."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the folder first: this callback runs before every other."""
        check_run_folder(trainer)
        # What only some subcommands take: with it, `plan` and others would refuse the run's config.
        for key in ("ckpt_path", "weights_only"):
            self.config.pop(key, None)
        folder = run_folder(trainer)
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(
                folder / self.config_filename,
                lambda to: self.parser.save(self.config, to, skip_none=False, overwrite=True, multifile=self.multifile),
            )


_OPTIONS = "[--config FILE] [--OPTION VALUE ...]"
_USAGE = {"compare": f"{_OPTIONS} FIRST SECOND"}
# Words that Lightning takes in place of a checkpoint's path.
_FOUND_BY_LIGHTNING = ("best", "hpc", "registry")


def newest_checkpoint(folder: Path, command: str | None) -> str | None:
    """The `last.ckpt` below `folder` that was written last; None if there is none yet and `command` can do without.

    Raises:
        PTQError: there is none.
    """
    found = max(folder.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime, default=None)
    if found is None and command != "fit":
        raise PTQError(f"ckpt_path='last': no last.ckpt is below {str(folder)!r}. Run fit first.")
    rank_zero_info(
        f"no last.ckpt below {str(folder)!r}: beginning" if found is None else f"going on from {str(found)!r}"
    )
    return None if found is None else str(found)


def _eight_bits_text(
    model: PTQModule, datamodule: CalibrationDataModule, shape: tuple[int, ...], device: torch.device
) -> str:
    try:
        datamodule.setup("fit")  # nothing is downloaded for a plan
        # As one of so many processes: that reads about as many images as are looked at.
        few = datamodule.calibration_images(0, max(1, datamodule.calibration_samples // images_to_try(shape)))
        return eight_bits(model.to(device).chains, model.checked(few).to(device), model.quant, device).text()
    except Exception as error:  # whatever a user's data set raises: a plan does without images
        return f"not tried with 8 bits: {error}"


class CommandParser(LightningArgumentParser):
    """What a subcommand can't do without is given by position: `compare A B`."""

    def add_method_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        """As Lightning calls it, which names the arguments only."""
        added: list[str] = super().add_method_arguments(*args, **kwargs, as_positional=True)
        return added


class PTQCLI(LightningCLI):
    """LightningCLI with the subcommands `plan`, `sensitivity`, `export` and `compare`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Subcommands and the arguments that the command line provides itself."""
        return LightningCLI.subcommands() | {
            name: {"model", "datamodule"} for name in ("plan", "sensitivity", "export", "compare")
        }

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would take settings from the checkpoint, and what they name is imported and called."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The model is told what images it will see: `torch.export` needs to know."""
        parser.link_arguments("data", "model.image_shape", _image_shape, apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        """`plan` downloads no weights and does without those that are no file. The others' checkpoint has to exist.

        All but `compare` need a model.
        """
        if self.config[self.subcommand].model.model is None and self.subcommand != "compare":
            raise PTQError(
                "model.model is missing. Name a torchvision model, or the import path of a function that returns one."
            )
        config = self.config[self.subcommand]
        if config.get("ckpt_path") == "last":
            config.ckpt_path = newest_checkpoint(Path(config.trainer.default_root_dir or "."), self.subcommand)
        path = config.get("ckpt_path")
        if path and "://" not in path and path.split(":")[0] not in _FOUND_BY_LIGHTNING and not Path(path).is_file():
            raise PTQError(
                f"ckpt_path={path!r} is no file, seen from {str(Path.cwd())!r}. A run leaves RUN/checkpoints/last.ckpt."
            )
        if path and Path(path).is_file():
            read_checkpoint(path)  # a damaged one is refused before anything is built
        if config.get("weights_only", False) is None:
            config.weights_only = True  # Lightning would run code from a checkpoint that is read from a URL
        self._untrained: str | None = None
        if self.subcommand == "plan":
            model = self.config.plan.model
            if model.weights is not None and not Path(model.weights).is_file():
                self._untrained = f"weights={model.weights!r} is no file, and plan downloads none"
                model.weights = None
            elif model.weights is None and _is_torchvision(model.model):
                self._untrained = f"no weights are given for {model.model!r}"

    def before_compare(self) -> None:
        """Some artifacts are run by the model's own code."""
        assert isinstance(self.trainer, Trainer)
        told = self.config.compare.model
        if told.model is not None:
            model = told.model if isinstance(told.model, str) else instantiate_class((), told.model.as_dict())
            self.trainer.network = build_network(model, told.weights)

    def before_plan(self) -> None:
        """Without its weights the network is another one: `plan` then says so instead of trying it."""
        assert isinstance(self.trainer, Trainer)
        self.trainer.untrained = self._untrained


def _image_shape(data: CalibrationDataModule | None) -> tuple[int, ...] | None:
    """Shape of the images where it can be told now: not before they are downloaded, or without calibration images."""
    try:
        return None if data is None else data.image_shape
    except Exception:  # whatever a user's datamodule raises; whoever needs the images says what is wrong with them
        return None


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a message of Lightning tells a user of the command line something."""
    text = record.getMessage()
    # Advertising, and this module's own bar and checkpoint callback, which replace Lightning's on purpose.
    return not text.startswith("💡 Tip:") and "`LightningModule.configure_callbacks` will override" not in text


def main(args: ArgsType = None) -> None:
    """Entry point of `lightning-ptq` and `python -m lightning_ptq`; `args` stand in for the command line in tests."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_news)
    # It keeps the last checkpoint only, and every command has a folder of its own: nothing is lost.
    warnings.filterwarnings("ignore", "The dirpath has changed from")
    # Without tensorboard, which is no dependency, Lightning logs to CSV files; that needs no paragraph.
    warnings.filterwarnings("ignore", "Starting from v1.9.0, `tensorboardX` has been removed")
    # Lightning 2.6 calls what newer torch deprecates; only Lightning can change that.
    warnings.filterwarnings("ignore", r".isinstance\(treespec, LeafSpec\).", FutureWarning)
    # A script's search path does not hold the folder it is called in, where a user's own model is looked for.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    if "LOCAL_RANK" not in os.environ:
        os.environ[LAUNCHER] = str(os.getpid())
    try:
        PTQCLI(
            build_module,
            CalibrationDataModule,
            subclass_mode_data=True,
            trainer_class=Trainer,
            # As many epochs as there are units; None would make Lightning announce 1000.
            trainer_defaults={"max_epochs": -1, "callbacks": [PredictionFile()]},
            save_config_callback=SaveRunConfig,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_class=CommandParser,
            parser_kwargs={"prog": "lightning-ptq", "description": "Post-training quantization of vision networks."}
            # Listed in front of an error, all options would hide it; --help explains each of them.
            | {name: {"usage": f"lightning-ptq {name} {_USAGE.get(name, _OPTIONS)}"} for name in PTQCLI.subcommands()},
            args=args,
        )
    except (ValueError, OSError, RuntimeError) as error:
        told = _told(error)
        if told is None:
            raise
        if args is not None:
            raise told from None
        print(f"lightning-ptq: error: {told}", file=sys.stderr)
        sys.exit(2)
    finally:
        if os.environ.get(LAUNCHER) == str(os.getpid()):
            del os.environ[LAUNCHER]


def _told(error: Exception) -> PTQError | None:
    """What can be said of an error in one sentence, if anything."""
    # jsonargparse wraps what a datamodule refuses: `data` is optional, so a union for it.
    for candidate in (error, error.__cause__):
        if isinstance(candidate, PTQError):
            return candidate
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # a logger's file, say
        return PTQError(f"the disk is full: {error}. Make room; a fit then goes on with --ckpt_path last.")
    return PTQError(str(error)) if lost_process(error) else None
