"""One fit, one epoch for each unit: what changes, what does not, what is left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_ptq import CalibrationDataModule, PTQError, PTQModule, Term, UnitBatch
from lightning_ptq.cache import Order
from lightning_ptq.checks import check_device
from lightning_ptq.quantizers import act_quantizers, weight_quantizers
from tests.helpers import (
    assert_equal_states,
    quantization_state,
    tiny_data,
    tiny_images,
    tiny_module,
    tiny_net,
    trainer,
)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, L.Trainer, Path]:
    folder = tmp_path_factory.mktemp("run")
    module, fit = tiny_module(steps_per_unit=60), trainer(folder)
    fit.fit(module, datamodule=tiny_data())
    return module, fit, folder


def test_every_unit_is_calibrated_once_and_in_order(fitted) -> None:
    module, fit, _ = fitted
    assert tuple(report.name for report in module.reports) == (*module.student.names, "whole-network")
    assert fit.current_epoch == len(module.student) + 1 == 5
    assert fit.global_step == 4 * 60 + 60


def test_calibration_lowers_the_error_of_units(fitted) -> None:
    module, _, _ = fitted
    better = [r.mse_after < r.mse_before for r in module.reports]
    assert sum(better) >= 3
    # The last report is the network's, which its predictions judge.
    assert all(r.mse_after <= r.mse_before for r in module.reports[:-1] if r.accepted)


def test_only_quantization_parameters_change(fitted) -> None:
    module, _, _ = fitted
    fresh = tiny_module()
    for key, value in fresh.state_dict().items():
        learned = key.endswith(("alpha", "scale", "zero_point", "ready", "ratio_sums", "log_gain", "bias_shift"))
        assert learned or torch.equal(module.state_dict()[key], value), key
    x = tiny_images(4)
    torch.testing.assert_close(module.teacher(x), tiny_net()(x), rtol=1e-5, atol=1e-5)


def test_summary_json_has_every_field_and_real_values(fitted) -> None:
    module, _, folder = fitted
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) >= {
        "model", "method", "contrastive", "weight_bits", "act_bits", "edges", "placement", "granularity", "seed",
        "calibration_samples", "images_available", "steps_per_unit", "teacher_top1", "nearest_top1", "student_top1",
        "teacher_agreement", "wall_seconds", "peak_rss_bytes", "peak_device_bytes", "units",
    }  # fmt: skip
    assert (summary["model"], summary["method"], summary["seed"], summary["calibration_samples"]) == (
        "TinyNet", "qdrop", 3, 40,
    )  # fmt: skip
    assert summary["teacher_top1"] == 100.0, "the labels are the teacher's"
    validation, _ = (torch.cat(t) for t in zip(*tiny_data().val_dataloader(), strict=True))
    with torch.no_grad():
        agreement = 100.0 * float((module(validation).argmax(1) == tiny_net()(validation).argmax(1)).float().mean())
    assert summary["teacher_agreement"] == pytest.approx(agreement, abs=1e-3)
    assert summary["student_top1"] == pytest.approx(agreement, abs=1e-3)
    assert set(summary["wall_seconds"]) == {"ranges", "calibration", "validation", "total"}
    assert 0 < summary["wall_seconds"]["ranges"] < summary["wall_seconds"]["total"]
    assert summary["peak_rss_bytes"] > 2**20
    for unit in summary["units"]:
        assert set(unit) == {
            "name", "mse_before", "mse_after", "sqnr_db", "mi_lower_bound_nats", "mi_gaussian_nats", "alignment",
            "uniformity", "flipped_fraction", "accepted", "seconds", "settled_after",
        }  # fmt: skip
        assert unit["seconds"] > 0


def test_reported_errors_are_those_of_the_finished_units(tmp_path: Path) -> None:
    module = tiny_module(steps_per_unit=60, network_steps=0)
    trainer(tmp_path).fit(module, datamodule=tiny_data())
    x = y = tiny_images(40)
    with torch.no_grad():
        units = zip(module.reports, module.student.units, module.teacher.units, module.session.importance, strict=True)
        for report, student, teacher, weight in units:
            x, y = student(x), teacher(y)
            error = float((x - y).square().transpose(1, -1).matmul(weight).mean())
            assert error == pytest.approx(report.mse_after, rel=1e-3)


@pytest.mark.parametrize("fit", [False, True])
def test_the_student_is_the_same_with_and_without_gradients(tmp_path: Path, fit: bool) -> None:
    module = tiny_module(granularity="net", steps_per_unit=20)
    run = trainer(tmp_path)
    run.fit(module, datamodule=tiny_data())
    if not fit:
        loaded = tiny_module(granularity="net", steps_per_unit=20)
        loaded.load_state_dict(module.state_dict())
        module = loaded
    x = tiny_images(4)
    with torch.no_grad():
        expected = module(x)
    assert torch.equal(module(x), expected)
    assert not any(p.requires_grad for p in module.student.parameters())


def test_nearest_learns_nothing(tmp_path: Path) -> None:
    module = tiny_module(method="nearest")
    trainer(tmp_path).fit(module, datamodule=tiny_data())
    assert module.steps_per_unit == 1
    for q in act_quantizers(module.student):
        assert torch.equal(q.log_scale, q.initial_log_scale)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["student_top1"] == summary["nearest_top1"]
    assert all(unit["flipped_fraction"] == 0 for unit in summary["units"])


@pytest.mark.parametrize("method", ["adaround", "brecq", "qdrop", "pdquant", "flexround"])
@pytest.mark.parametrize("contrastive", [False, True])
def test_every_method_runs_and_moves_what_it_learns(tmp_path: Path, method: str, contrastive: bool) -> None:
    module = tiny_module(method=method, contrastive=contrastive, steps_per_unit=10, rounding_lr=0.1, scale_lr=0.01)
    trainer(tmp_path).fit(module, datamodule=tiny_data())
    scales = [not torch.equal(q.log_scale, q.initial_log_scale) for q in act_quantizers(module.student)]
    assert any(scales) == (method != "adaround")
    assert any(report.flipped_fraction > 0 for report in module.reports)
    balanced = [name for name, term in module.objective.terms.items() if term.rho is not None]
    assert balanced == ["prediction"] * (method == "pdquant") + ["contrastive"] * contrastive
    assert (module.objective.ratio_sums[:, 1 + (method != "flexround") :] > 0).all()


@pytest.mark.parametrize("granularity", ["layer", "block", "stage", "net"])
def test_granularity_sets_the_number_of_epochs(tmp_path: Path, granularity: str) -> None:
    module = tiny_module(granularity=granularity, steps_per_unit=2)
    fit = trainer(tmp_path, enable_checkpointing=False)
    fit.fit(module, datamodule=tiny_data())
    assert fit.current_epoch == len(module.student) + (len(module.student) > 1)


def test_a_second_fit_of_the_same_module_starts_anew(tmp_path: Path) -> None:
    module, fresh = tiny_module(), tiny_module()
    trainer(tmp_path / "first").fit(module, datamodule=tiny_data(count=24))
    trainer(tmp_path / "second").fit(module, datamodule=tiny_data())
    trainer(tmp_path / "fresh").fit(fresh, datamodule=tiny_data())
    assert_equal_states(quantization_state(module), quantization_state(fresh))


def test_harm_is_rolled_back_and_reported(tmp_path: Path) -> None:
    module = tiny_module(rounding_lr=1e3, scale_lr=30.0, steps_per_unit=10, network_steps=0)
    trainer(tmp_path).fit(module, datamodule=tiny_data())
    rolled_back = [report for report in module.reports if not report.accepted]
    assert rolled_back
    for report in rolled_back:
        unit = module.student.units[module.student.names.index(report.name)]
        assert all(torch.equal(q.log_scale, q.initial_log_scale) for q in act_quantizers(unit))
        assert report.flipped_fraction == 0
    assert all(p.isfinite().all() for p in module.student.parameters())


def test_a_user_term_joins_the_objective(tmp_path: Path) -> None:
    class Count(Term):
        calls = 0

        def forward(self, batch: UnitBatch) -> torch.Tensor:
            Count.calls += 1
            assert batch.tail(batch.student_out).shape == batch.teacher_features.shape
            return 0.0 * batch.student_out.sum()

    module = tiny_module(terms={"count": Count()})
    trainer(tmp_path).fit(module, datamodule=tiny_data())
    assert Count.calls == 4 * 6


def test_minibatches_hold_different_images_and_follow_the_seed() -> None:
    def sample_index(total: int, size: int, step: int, *seed: int) -> torch.Tensor:
        here, there = Order(total, size, *seed).rows(step)
        assert torch.equal(here, there)
        return here

    first = [sample_index(40, 8, step, 0, 1, 2).tolist() for step in range(5)]
    assert sorted(row for batch in first for row in batch) == list(range(40)), "one pass shows every image once"
    assert first == [sample_index(40, 8, step, 0, 1, 2).tolist() for step in range(5)]
    others = [sample_index(40, 8, 5, 0, 1, 2), *(sample_index(40, 8, 0, *s) for s in ((1, 1, 2), (0, 2, 2), (0, 1, 3)))]
    assert first[0] not in [other.tolist() for other in others]
    assert len(set(sample_index(40, 32, 7, 0, 0, 0).tolist())) == 32


def test_terms_are_logged_by_unit_to_the_users_logger(tmp_path: Path) -> None:
    module = tiny_module()
    logger = CSVLogger(tmp_path)
    # Longer than an epoch: its last step is logged all the same.
    trainer(tmp_path, logger=logger, log_every_n_steps=50).fit(module, datamodule=tiny_data())
    logger.save()
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    for name in module.student.names:
        assert {f"units/{name}/reconstruction", f"units/{name}/rounding", f"units/{name}/mse_after"} <= set(header)
    assert {"units/whole-network/prediction", "units/whole-network/mse_after"} <= set(header)


def test_fast_dev_run_touches_one_unit_and_writes_nothing(tmp_path: Path) -> None:
    module = tiny_module()
    trainer(tmp_path, fast_dev_run=True).fit(module, datamodule=tiny_data())
    assert len(module.reports) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_last_steps_of_a_unit_drop_nothing(tmp_path: Path) -> None:
    seen: dict[int, list[bool]] = {}

    class Watch(L.Callback):
        def on_train_batch_end(self, fit: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            unit = module.student.units[min(fit.current_epoch, 3)]
            masks = [q.drop for q in act_quantizers(unit)]
            dropping = any(m is not None and m.keep(torch.ones(4)) is not None for m in masks)
            seen.setdefault(fit.current_epoch, []).append(dropping)
            if fit.current_epoch < 4:
                mixed = module._unit_input(batch)
                assert torch.equal(mixed, batch.student_in) == (fit.current_epoch == 0 or batch_idx >= 8)

    trainer(tmp_path, callbacks=[Watch()]).fit(tiny_module(steps_per_unit=10), datamodule=tiny_data())
    assert all(seen[unit] == [True] * 8 + [False] * 2 for unit in range(4))
    assert not any(seen[4])


def test_networks_stay_in_eval_mode() -> None:
    module = tiny_module().train()
    assert module.training
    assert not any(m.training for m in [*module.teacher.modules(), *module.student.modules()])


def test_predict_validate_and_test_use_the_calibrated_student(fitted, tmp_path: Path) -> None:
    module, _, _ = fitted
    data = tiny_data()
    (metrics,) = trainer(tmp_path).validate(module, datamodule=data, verbose=False)
    assert trainer(tmp_path).test(module, datamodule=data, verbose=False)[0] == metrics
    outputs = torch.cat(trainer(tmp_path).predict(module, dataloaders=data.val_dataloader()))
    with torch.no_grad():
        torch.testing.assert_close(outputs, torch.cat([module(x) for x, _ in data.val_dataloader()]))


@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_mixed_precision_keeps_quantizers_in_float32(tmp_path: Path, precision: str) -> None:
    module = tiny_module(contrastive=True)
    trainer(tmp_path, precision=precision).fit(module, datamodule=tiny_data())
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert all(p.isfinite().all() for p in quantization_state(module).values())


def test_the_network_is_measured_in_float32_at_any_precision(fitted, tmp_path: Path) -> None:
    module, _, _ = fitted
    data = tiny_data()
    plain, mixed = (
        trainer(tmp_path, precision=precision).validate(module, datamodule=data, verbose=False)[0]
        for precision in ("32-true", "bf16-mixed")
    )
    assert plain == mixed
    outputs = torch.cat(trainer(tmp_path, precision="bf16-mixed").predict(module, dataloaders=data.val_dataloader()))
    assert outputs.dtype == torch.float32


def test_at_bf16_an_8_bit_quantizer_still_hits_every_integer() -> None:
    q = act_quantizers(tiny_module().student)[0]
    q.set_range(torch.tensor(1.0), torch.tensor(0.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = q(torch.arange(256.0))
    assert torch.equal(values, torch.arange(256.0))


def test_a_trainer_validates_afterwards_with_loaders_that_the_fit_had_not(tmp_path: Path) -> None:
    module, run = tiny_module(), trainer(tmp_path)
    run.fit(module, datamodule=CalibrationDataModule.from_loaders(tiny_images().split(16), calibration_samples=40))
    (rates,) = run.validate(module, dataloaders=DataLoader(tiny_images(8), batch_size=4), verbose=False)
    assert rates["student_agreement"] > 0


def test_a_checkpoint_becomes_a_module_again(fitted) -> None:
    module, _, folder = fitted
    last = folder / "checkpoints" / "last.ckpt"
    again = PTQModule.load_from_checkpoint(last, model=tiny_net())
    assert (again.quant, again.method_name, again.network_steps) == (module.quant, "qdrop", module.network_steps)
    x = tiny_images(4)
    with torch.no_grad():
        assert torch.equal(again(x), module(x))


def test_validation_needs_no_labels(tmp_path: Path) -> None:
    unlabelled = DataLoader(tiny_images(8), batch_size=4)
    data = CalibrationDataModule.from_loaders(tiny_images().split(16), unlabelled, calibration_samples=40)
    module = tiny_module()
    trainer(tmp_path).fit(module, datamodule=data)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["student_top1"] is None
    assert summary["teacher_agreement"] is not None


def test_no_validation_at_all_still_finishes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = tiny_module()
    data = CalibrationDataModule.from_loaders(tiny_images().split(16), calibration_samples=40)
    trainer(tmp_path).fit(module, datamodule=data)
    assert len(module.reports) == 5
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["teacher_agreement"] is None
    assert f"on those of calibration {summary['calibration_agreement']:.2f} % agreement" in capsys.readouterr().out


def test_one_step_for_what_learns_nothing_is_no_warning(tmp_path: Path) -> None:
    module = tiny_module(method="nearest")
    trainer(tmp_path, log_every_n_steps=50).fit(module, datamodule=tiny_data())  # warnings are errors
    assert len(module.reports) == 4


def test_weight_quantizers_hold_hard_rounding_in_the_end(fitted) -> None:
    module, _, _ = fitted
    for q in weight_quantizers(module.student):
        assert q.alpha is not None
        integers = q.integers(torch.zeros_like(q.alpha))
        assert torch.equal(integers, integers.round())


def test_a_student_without_ranges_is_not_passed_off_as_quantized(tmp_path: Path) -> None:
    for command in ("validate", "test", "predict"):
        with pytest.raises(PTQError, match="no ranges yet: run fit first, or give a fit's checkpoint"):
            getattr(trainer(tmp_path), command)(tiny_module(), datamodule=tiny_data())
    module = tiny_module()
    for _ in range(2):  # before a fit, and behind one that was refused
        with pytest.raises(PTQError, match="no ranges yet: run fit first, or give a fit's checkpoint"):
            module(tiny_images(2))
        with pytest.raises(PTQError, match="needs that many different images"):
            trainer(tmp_path).fit(module, datamodule=tiny_data(4))


def test_a_refused_fit_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    module = tiny_module()
    trainer(tmp_path).fit(module, datamodule=tiny_data())
    state, reports = quantization_state(module), list(module.reports)
    with pytest.raises(PTQError, match="already holds a run"):
        trainer(tmp_path).fit(module, datamodule=tiny_data())
    assert_equal_states(quantization_state(module), state)
    assert module.reports == reports


def test_an_interrupted_fit_leaves_no_unit_selected(tmp_path: Path) -> None:
    class Interrupt(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
            if trainer.global_step == 8:
                raise RuntimeError("stop")

    module = tiny_module()
    with pytest.raises(RuntimeError, match="stop"):
        trainer(tmp_path, callbacks=[Interrupt()]).fit(module, datamodule=tiny_data())
    assert not any(p.requires_grad for p in module.student.parameters())
    assert module.session.cache is None


def test_nearest_with_contrastive_learns_nothing_either(tmp_path: Path) -> None:
    module = tiny_module(method="nearest", contrastive=True)
    trainer(tmp_path, log_every_n_steps=0).fit(module, datamodule=tiny_data())
    assert all(report.flipped_fraction == 0 for report in module.reports)


def test_a_device_without_float64_is_refused() -> None:
    with pytest.raises(PTQError, match="accelerator='mps'"):
        check_device(torch.device("mps"))


def test_held_out_images_are_never_drawn_and_the_gap_is_reported(tmp_path: Path) -> None:
    module, drawn = tiny_module(steps_per_unit=8, held_out=0.5), set[int]()

    class Rows(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
            drawn.update(batch.rows.tolist())

    trainer(tmp_path, callbacks=[Rows()]).fit(module, datamodule=tiny_data(40, more=30))
    assert drawn <= set(range(40))
    assert len(drawn) > 20
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["calibration_samples"], summary["judging_samples"]) == (40, 20)
    gap = summary["calibration_agreement"] - summary["teacher_agreement"]
    assert summary["overfit_gap"] == pytest.approx(gap)


def test_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(PTQError, match=r"held_out=1\.5 is no share below 1"):
        tiny_module(held_out=1.5)
