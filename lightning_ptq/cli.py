"""The command line: `lightning-ptq fit|validate|test|predict|plan|sensitivity|export|compare|report`."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback, instantiate_class
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torchvision.models import list_models

from lightning_ptq.building import build_network
from lightning_ptq.callbacks import PredictionFile
from lightning_ptq.checkpoint import read_checkpoint
from lightning_ptq.checks import check_run_folder, run_folder
from lightning_ptq.commands import Trainer, build_module, report, report_parser
from lightning_ptq.datamodule import CalibrationDataModule
from lightning_ptq.errors import PTQError
from lightning_ptq.failures import TOLD, exit_code, explained
from lightning_ptq.files import write_whole
from lightning_ptq.help import PROGRAM, USAGE
from lightning_ptq.interruptions import LAUNCHER
from lightning_ptq.parser import NOT_EVERYWHERE, CommandParser


class SaveRunConfig(SaveConfigCallback):
    """Writes config.yaml, but never into a folder that holds another run."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing yet: before `on_fit_start`, Lightning does not tell whether a checkpoint is continued."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the folder first: this callback runs before every other."""
        check_run_folder(trainer)
        for key in NOT_EVERYWHERE:
            self.config.pop(key, None)
        folder = run_folder(trainer)
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(
                folder / self.config_filename,
                lambda to: self.parser.save(self.config, to, skip_none=False, overwrite=True, multifile=self.multifile),
            )


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


class PTQCLI(LightningCLI):
    """LightningCLI with the subcommands `plan`, `sensitivity`, `export` and `compare`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Subcommands and the arguments that the command line provides itself."""
        return LightningCLI.subcommands() | {
            name: {"model", "datamodule"} for name in ("plan", "sensitivity", "export", "compare")
        }

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """`report` is listed with the others, though `main` runs it without a Trainer."""
        super()._add_subcommands(parser, **kwargs)
        told = report_parser()
        assert parser._subcommands_action is not None
        parser._subcommands_action.add_subcommand("report", told, help=told.description)

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
        model, plans = config.model, self.subcommand == "plan"
        if plans and model.weights is not None and not Path(model.weights).is_file():
            self._untrained = f"weights={model.weights!r} is no file, and plan downloads none"
            model.weights = None
        elif model.weights is None and model.model in list_models():
            self._untrained = f"no weights are given for {model.model!r}"
            if not plans:
                rank_zero_warn(f"{self._untrained}, so it has random ones. Give a file, or DEFAULT (model.weights).")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Lightning's refusals in one sentence with a way out."""
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError) as error:
            if isinstance(error, PTQError):
                raise
            accelerator = self.config[self.subcommand].trainer.accelerator
            no_gpu = accelerator in ("gpu", "cuda") and not torch.cuda.is_available()
            way_out = (
                "This machine has no GPU that torch can use. Take --trainer.accelerator cpu."
                if no_gpu
                else f"{PROGRAM} {self.subcommand} --help trainer lists what there is."
            )
            raise PTQError(f"trainer.accelerator={accelerator!r}: {str(error).rstrip('.! ')}. {way_out}") from error

    def before_compare(self) -> None:
        """Some artifacts are run by the model's own code."""
        assert isinstance(self.trainer, Trainer)
        told = self.config.compare.model
        if told.model is not None:
            seed = self.config.compare.seed_everything
            if seed is not None and seed is not False:  # a network without weights is then the one that a fit had
                L.seed_everything(None if seed is True else seed, workers=True, verbose=False)
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


def warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as errors look; where it comes from says nothing to a user of the command line, but with --debug."""
    text = " ".join(str(message).split())
    return f"{PROGRAM}: warning: {text}{f' ({filename}:{lineno})' if '--debug' in sys.argv else ''}\n"


def leave_processes() -> None:
    """End what runs between processes: its threads, met by Python's end, abort it, and the launcher kills the rest."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main(args: ArgsType = None) -> None:
    """Entry point of `lightning-ptq` and `python -m lightning_ptq`; `args` stand in for the command line in tests."""
    before, warnings.formatwarning = warnings.formatwarning, warning_line
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
    given = sys.argv[1:] if args is None else args
    words = [word for word in given if word != "--debug"] if isinstance(given, list) else []
    try:
        if words[:1] == ["report"]:
            report(words[1:])
            return
        PTQCLI(
            build_module,
            CalibrationDataModule,
            subclass_mode_data=True,
            trainer_class=Trainer,
            # As many epochs as there are units; None would make Lightning announce 1000. Its table of the model counts
            # both networks, and what is trainable in the first unit.
            trainer_defaults={"max_epochs": -1, "callbacks": [PredictionFile()], "enable_model_summary": False},
            save_config_callback=SaveRunConfig,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_class=CommandParser,
            parser_kwargs={"prog": PROGRAM, "description": "Post-training quantization of vision networks."}
            | {name: {"usage": USAGE[name]} for name in PTQCLI.subcommands()},
            args=args,
        )
        sys.stdout.flush()  # here, where it can be said that nobody reads
        if args is None:
            leave_processes()
    except BaseException as error:
        if args is None:
            code = exit_code(error)
            if code in TOLD:
                leave_processes()
            sys.exit(code)
        told = explained(error)
        if told is None:
            raise
        raise told from None
    finally:
        warnings.formatwarning = before
        if os.environ.get(LAUNCHER) == str(os.getpid()):
            del os.environ[LAUNCHER]
