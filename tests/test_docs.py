"""The documentation's code runs, its shell lines parse, its paths exist, and no option is missing."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from jsonargparse import capture_parser
from torch import nn

import lightning_ptq as ptq
from lightning_ptq.cli import main
from lightning_ptq.layers import REGISTRY, QuantConv2d, quantized_layers
from tests.helpers import tiny_data, tiny_images, tiny_net, trainer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What stands for something of the reader's own.
PLACEHOLDERS = {
    "RUN/config.yaml": "configs/quickstart.yaml",
    "my.yaml": "configs/quickstart.yaml",
    "my_package.net.build": "lightning_ptq.models.digits_net",
}


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(), re.DOTALL)


def shell_lines() -> Iterator[Any]:
    """Every call of lightning-ptq in a code block, without what starts it on several processes."""
    for page in PAGES:
        text = re.sub(r"\\\n\s+", "", page.read_text())
        for line in re.findall(r"^ {4,}(?!\|)(.*(?:lightning-ptq|-m lightning_ptq) \w.*)$", text, re.MULTILINE):
            words = shlex.split(line, comments=True)
            start = next(i for i, word in enumerate(words) if word in ("lightning-ptq", "lightning_ptq"))
            if "&&" not in words:
                yield pytest.param(words[start + 1 :], id=f"{page.stem}: {' '.join(words[start + 1 : start + 5])}")


@pytest.fixture(scope="module")
def parser() -> Any:
    return capture_parser(main, [])


@pytest.mark.parametrize("words", [*shell_lines()])
def test_shell_lines_parse(parser: Any, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if words[0].startswith("-") or "--help" in words:
        with pytest.raises(SystemExit) as exit_:
            parser.parse_args(words)
        assert exit_.value.code == 0
        return
    assert parser.parse_args([PLACEHOLDERS.get(word, word) for word in words]).subcommand == words[0]


def test_there_are_shell_lines_of_all_kinds() -> None:
    commands = {line.values[0][0] for line in shell_lines()}
    assert {"fit", "plan", "export", "compare", "sensitivity"} <= commands
    assert sum(1 for _ in shell_lines()) > 24


@pytest.mark.filterwarnings("ignore:.*tensorboard.*:UserWarning")
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_loss_term_of_one_s_own_is_learned_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    term, use = blocks("how-to/loss-term.md")
    names: dict[str, Any] = {"ptq": ptq, "torch": torch, "L": L, "model": tiny_net(), "data": tiny_data()}
    exec(term, names)
    exec(use.replace("steps_per_unit=500", "steps_per_unit=10, batch_size=8"), names)
    module = names["module"]
    assert "means" in module.objective.terms
    assert len(module.reports) == 5
    assert (module.objective.ratio_sums[:, list(module.objective.terms).index("means")] > 0).all(), "balanced"


def test_a_layer_type_of_one_s_own_is_quantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, twin, use = blocks("how-to/layer-type.md")
    monkeypatch.setattr("lightning_ptq.layers.REGISTRY", REGISTRY)
    names: dict[str, Any] = {"nn": nn, "torch": torch, "QuantConv2d": QuantConv2d, "REGISTRY": REGISTRY, "ptq": ptq}
    exec(layer, names)
    mirror = names["MirrorConv2d"](3, 6, 3)
    network = nn.Sequential()
    network.add_module("mirror", mirror)
    network.add_module("head", nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)))
    names["network"] = network.eval()
    try:
        exec(twin, names)
        exec(use, names)
    finally:
        REGISTRY.pop(names["MirrorConv2d"], None)
    module, images = names["module"], tiny_images(8)
    kinds = {type(quantized).__name__ for _, quantized in quantized_layers(module.student)}
    assert kinds == {"QuantMirrorConv2d", "QuantLinear"}
    with torch.no_grad():
        torch.testing.assert_close(module.student(images), network(images))  # without ranges nothing is rounded
        flipped = torch.nn.functional.conv2d(images, mirror.weight.flip(-1), mirror.bias)
        expected = (torch.nn.functional.conv2d(images, mirror.weight, mirror.bias) + flipped) / 2
        torch.testing.assert_close(mirror(images), expected)
    fitting = trainer(tmp_path)
    fitting.fit(module, datamodule=tiny_data())
    with torch.no_grad():
        assert not torch.equal(module(images), network(images))


def test_bits_by_hand_are_those_of_the_layers() -> None:
    (code,) = blocks("how-to/bits.md")
    names: dict[str, Any] = {"ptq": ptq, "model": tiny_net()}
    exec(code, names)
    bits = {name: layer.weight_quantizer.bits for name, layer in quantized_layers(names["module"].student)}
    assert {b for name, b in bits.items() if "blocks_1" in name or "blocks.1" in name} == {8}
    assert {b for name, b in bits.items() if "blocks_0" in name or "blocks.0" in name} == {2}


def test_a_term_of_a_config_is_made(parser: Any, tmp_path: Path) -> None:
    (config,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "how-to" / "loss-term.md").read_text(), re.DOTALL)
    path = "lightning_ptq.losses.reconstruction.Reconstruction"
    (tmp_path / "config.yaml").write_text(config.replace("my_package.terms.ChannelMeans", path))
    told = parser.parse_args(
        ["fit", f"--config={tmp_path / 'config.yaml'}", "--data=lightning_ptq.DigitsData"]
    ).fit.model.terms
    assert told["means"].class_path == path


def hook() -> Any:
    """The script that makes the page of options; it needs MkDocs."""
    pytest.importorskip("mkdocs")
    spec = spec_from_file_location("options_page", ROOT / "docs" / "hooks" / "options.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["options_page"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_of_options_has_every_one_with_its_default(parser: Any) -> None:
    rows = dict(re.findall(r"^\| `(\S+)` \| (.*?) \|", hook().page(), re.MULTILINE))
    told = parser._subcommands_action.choices["fit"]
    for action in told._actions:
        name = action.option_strings[0] if action.option_strings else ""
        if name.startswith("--model.") and not name.endswith(".help") and action.default != "==SUPPRESS==":
            default = "null" if action.default is None else str(action.default)
            assert default.lower() == rows[name].strip("`").lower(), name
    assert rows["--data.root"] == "`required`"
    assert rows["--data.skip_bad_images"] == "`false`"
    assert not re.search(r"\| *\|$", hook().page(), re.MULTILINE), "an option without a meaning"


def test_the_navigation_names_pages_that_are_there() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    named = set(re.findall(r": ([\w/-]+\.md)$", text, re.MULTILINE))
    there = {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]}
    assert named - {"options.md"} == there


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_path_and_link_leads_somewhere(page: Path) -> None:
    text = page.read_text()
    for path in set(re.findall(r"(?:configs|tests|benchmarks|notebooks|docs)/[\w./-]*\w", text)):
        assert any((folder / path).exists() or (folder / f"{path}.py").exists() for folder in (ROOT, page.parent)), path
    for link in re.findall(r"\]\((?!http)([^)#\s]+)", text):
        generated = link.endswith("options.md")
        assert generated or (page.parent / link).exists(), link


def test_the_drawing_is_sound_xml_and_needs_nothing_from_elsewhere() -> None:
    from xml.etree import ElementTree

    text = (ROOT / "docs" / "img" / "chain.svg").read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"]


def test_ci_builds_the_site() -> None:
    assert "mkdocs build --strict" in (ROOT / ".ci" / "run").read_text()
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text().replace("!!", ""))["theme"]["font"] is False
