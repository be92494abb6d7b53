"""What a user gives around a network: wrappers, weights that are computed, hooks; and what can't be taken apart."""

from types import MethodType

import lightning as L
import pytest
import torch
from torch import fx, nn
from torch.export import Dim
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from lightning_ptq import PTQModule
from lightning_ptq.config import QuantConfig
from lightning_ptq.errors import PTQError
from lightning_ptq.graph import build_chain
from lightning_ptq.graph.given import plain
from tests.helpers import Block, TinyNet, tiny_images, tiny_net

LAYERS = ["stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "fc"]


class Wrapping(nn.Module):
    """A network around one that something wrapped."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return self.inside(2 * x)


def with_old_norms():
    net = tiny_net().train()
    weight_norm(net.stem)
    spectral_norm(net.blocks[0].conv1)
    prune.l1_unstructured(net.blocks[0].conv2, "weight", 0.5)
    net(tiny_images(4))  # as after training, weights have a history that can't be copied
    return net.eval()


def with_parametrizations():
    net = tiny_net()
    parametrizations.weight_norm(net.stem)
    parametrizations.spectral_norm(net.blocks[1].conv2)
    parametrizations.orthogonal(net.fc)
    return net.eval()


def exported(net=None, batch=Dim.DYNAMIC):
    program = torch.export.export(net or tiny_net(), (tiny_images(4),), dynamic_shapes=({0: batch},))
    return program.module()


GIVEN = {
    "torch.compile": lambda: torch.compile(tiny_net()),
    "compiled twice": lambda: torch.compile(nn.DataParallel(torch.compile(tiny_net()))),
    "DataParallel": lambda: nn.DataParallel(tiny_net()).eval(),
    "compiled inside": lambda: Wrapping(torch.compile(tiny_net())).eval(),
    "old norms and pruning": with_old_norms,
    "parametrizations": with_parametrizations,
    "torch.export": exported,
}


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_the_network_inside_is_quantized_whole_and_what_was_given_stays_as_it_was(name):
    model, x = GIVEN[name](), tiny_images()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    reference = torch._dynamo.disable(model)  # eager: what a compiler makes of it is not at stake
    expected = reference(x).detach()
    pair = build_chain(model, QuantConfig(), "block", image_shape=(3, 8, 8))
    assert [layer.name.removeprefix("inside.") for layer in pair.layers] == LAYERS
    torch.testing.assert_close(pair.teacher(x), expected)
    torch.testing.assert_close(reference(x).detach(), expected, rtol=0, atol=0)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("build", [with_old_norms, with_parametrizations])
def test_what_was_fixed_comes_back_from_its_state(build):
    network = plain(build())
    again = plain(build())
    with torch.no_grad():
        for weight in again.parameters():
            weight.zero_()
    again.load_state_dict(dict(network.state_dict()))  # as a checkpoint has it, without metadata
    assert torch.equal(again(tiny_images(4)), network(tiny_images(4)))


def test_a_plain_network_is_not_copied():
    net = tiny_net()
    assert plain(net) is net


def test_a_module_calibrates_what_was_compiled():
    module = PTQModule(torch.compile(tiny_net()), method="nearest")
    assert module.model_name == "TinyNet"


def test_hooks_that_a_graph_would_not_have_are_left_out_and_told():
    seen = []
    net = tiny_net()
    net.stem.register_forward_hook(lambda module, args, out: seen.append(out))
    net.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    with pytest.warns(UserWarning, match="forward hooks of TinyNet, stem are left out"):
        pair = build_chain(net, QuantConfig(), "block")
    x = tiny_images()
    torch.testing.assert_close(pair.teacher(x), tiny_net()(x))
    pair.student(x)
    assert not seen
    assert net.stem._forward_hooks


def test_hooks_of_what_is_traced_through_take_part():
    net = tiny_net()
    net.blocks[0].register_forward_hook(lambda module, args, out: 2 * out)
    x = tiny_images()
    torch.testing.assert_close(build_chain(net, QuantConfig(), "block").teacher(x), net(x))


def halved(net, x):
    """A forward for a TinyNet."""
    return TinyNet.forward(net, x) / 2


def test_a_method_that_was_put_in_the_place_of_forward_is_what_is_quantized():
    net = tiny_net()
    net.forward = MethodType(halved, net)
    x = tiny_images()
    pair = build_chain(net, QuantConfig(), "block")
    torch.testing.assert_close(pair.teacher(x), tiny_net()(x) / 2)
    assert [layer.name for layer in pair.layers] == LAYERS
    assert type(net) is TinyNet
    assert plain(net) is net


def test_a_forward_of_a_block_takes_part():
    net = tiny_net()
    net.blocks[0].forward = MethodType(lambda block, x: 2 * Block.forward(block, x), net.blocks[0])
    x = tiny_images()
    torch.testing.assert_close(build_chain(net, QuantConfig(), "block").teacher(x), net(x))


def test_a_forward_that_would_be_lost_is_refused():
    def change(module):
        before = module.forward
        module.forward = lambda x: 2 * before(x)

    net = tiny_net()
    change(net)
    with pytest.raises(PTQError, match=r"TinyNet has a forward that was set on it from outside.*Write it into a class"):
        plain(net)
    net = fx.symbolic_trace(tiny_net()).eval()
    net.forward = MethodType(halved, net)  # which its copies are without
    with pytest.raises(PTQError, match=r"has a forward that was set on it from outside"):
        plain(net)
    net, layers = tiny_net(), tiny_net()
    net.forward = MethodType(lambda net, x: layers(x), net)
    with pytest.raises(PTQError, match="TinyNet has a forward that was set on it from outside"):
        plain(net)
    net = tiny_net()
    change(net.blocks[0])
    with pytest.raises(PTQError, match=r"module 'blocks\.0' \(Block\) has a forward"):
        plain(net)
    net = tiny_net()
    net.fc.forward = MethodType(nn.Linear.forward, net.fc)
    with pytest.raises(PTQError, match=r"module 'fc' \(Linear\) has a forward"):
        plain(net)
    net = tiny_net()
    change(net.fc)
    with pytest.raises(PTQError, match=r"module 'fc' \(Linear\) has a forward"):
        plain(net)


def test_a_wrapper_with_two_names_is_taken_off_both():
    model = Wrapping(nn.DataParallel(tiny_net())).eval()
    model.again = model.inside
    network = plain(model)
    assert isinstance(network.again, TinyNet)
    assert network.again is network.inside


def test_fixed_weights_lie_as_others_do():
    net = tiny_net()
    parametrizations.weight_norm(net.fc)
    parametrize.register_parametrization(net.stem, "weight", Turned())
    network = plain(net.eval())
    assert all(parameter.is_contiguous() for parameter in network.parameters())


class Turned(nn.Module):
    """Gives a weight in another layout."""

    def forward(self, weight):
        return weight.to(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_torchscript_is_refused_also_inside():
    scripted = torch.jit.trace(tiny_net(), tiny_images(2))
    with pytest.raises(PTQError, match=r"the model is TorchScript.*Give the Python model"):
        plain(scripted)
    with pytest.raises(PTQError, match="module 'inside' is TorchScript"):
        plain(Wrapping(scripted).eval())


def test_what_has_no_forward_is_refused_with_what_is_in_it():
    class Training(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.criterion = tiny_net(), nn.CrossEntropyLoss()

    with pytest.raises(PTQError, match=r"Training has no forward\. Give the network in it: it holds net, criterion"):
        plain(Training().eval())


def test_a_program_exported_in_training_mode_is_refused():
    net = TinyNet().train()
    with pytest.raises(PTQError, match=r"computes 'batch_norm' as in training.*model\.eval"):
        plain(exported(net))
    program = torch.export.export(net, (tiny_images(4),)).run_decompositions()
    with pytest.raises(PTQError, match=r"batch_norm_legit_functional' as in training"):
        plain(program.module())


def test_a_wrappers_own_flag_says_nothing_but_that_of_the_network_in_it():
    model = Wrapping(nn.DataParallel(Block(3).eval()))
    for module in (model, model.inside):
        module.training = module is model.inside
    assert isinstance(plain(model).inside, Block)
    model.inside.module.train()
    with pytest.raises(PTQError, match=r"'inside.module' \(Block\) is in training mode"):
        plain(model)


def test_a_dict_of_inputs_is_refused_with_the_way_out():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_net()

        def forward(self, batch):
            return self.net(batch["image"])

    with pytest.raises(PTQError, match="takes a dict, of which it reads 'image'"):
        build_chain(Net().eval(), QuantConfig(), "block")
