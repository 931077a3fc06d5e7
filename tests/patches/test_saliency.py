"""Saliency maps against pytorch-grad-cam, the network's state, targets, and the scores of patches."""

import copy

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from dq_lightning.core.config import PatchConfig
from dq_lightning.core.errors import ConfigError, PatchError
from dq_lightning.patches.activation_maps import METHODS, ActivationMaps, TargetChoice
from dq_lightning.patches.package_maps import PACKAGE_METHODS, PackageMaps
from dq_lightning.patches.saliency import make_scorer
from dq_lightning.patches.target_layer import find_target_layer
from tests.reference import patch_twin

CLASSES = 7
PACKAGE_CLASSES = {
    "gradcam": "GradCAM",
    "gradcam++": "GradCAMPlusPlus",
    "xgradcam": "XGradCAM",
    "hirescam": "HiResCAM",
    "layercam": "LayerCAM",
    "gradcamelementwise": "GradCAMElementWise",
}


def resnet():
    """A ResNet of one block a stage."""
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)


def vision_transformer():
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=CLASSES)


def transformer_with_registers():
    network = timm.create_model("vit_small_patch16_dinov3", img_size=64, depth=2, num_classes=CLASSES)
    # before training the branches count 1e-5 and the logits are faint; the package's constant 1e-7 would show in its maps
    for block in network.blocks:
        nn.init.ones_(block.gamma_1)
        nn.init.ones_(block.gamma_2)
    nn.init.normal_(network.head.weight)
    return network


def torchvision_transformer():
    network = torchvision.models.VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=CLASSES)
    nn.init.normal_(network.heads.head.weight)
    return network


def swin():
    return torchvision.models.SwinTransformer([4, 4], 24, [1, 1], [2, 4], [4, 4], num_classes=CLASSES)


NETWORKS = {
    # network: name of the layer, its layout
    resnet: ("layer4", "NCHW"),
    vision_transformer: ("blocks.2.norm1", "tokens"),
    transformer_with_registers: ("blocks.1.norm1", "tokens"),
    torchvision_transformer: ("encoder.layers.encoder_layer_1.ln_1", "tokens"),
    swin: ("features.3.0.norm1", "NHWC"),
}


@pytest.fixture(scope="module", params=NETWORKS, ids=lambda make: make.__name__)
def network(request):
    torch.manual_seed(0)
    made = request.param()
    made.expected_layer = NETWORKS[request.param]
    return made.eval()


@pytest.fixture(scope="module")
def double(network):
    """The network in double precision."""
    return copy.deepcopy(network).double()


@pytest.fixture(scope="module", autouse=True)
def known_layer():
    """The layer of a network for images of a size, which is looked for once; calling `find_target_layer` itself looks."""
    known = {}

    def remembered(network, images, name=None):
        key = (id(network), images.shape[1:], images.dtype, name)
        if key not in known:
            # the network is kept, so that its number is not given to another one
            known[key] = (network, find_target_layer(network, images, name))
        return known[key][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dq_lightning.patches.target_layer.find_target_layer", remembered)
        yield remembered


def small_photos(pixels):
    """The middles of photos [B, 3, 224, 224], as the real classifier takes them."""
    return pixels[..., 48:176, 48:176].float() / 127.5 - 1


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def by_package(network, method, images, classes, layer):
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    reshape = None if layer.layout == "NCHW" else layer.to_map
    tool = getattr(pytorch_grad_cam, method)(network, [network.get_submodule(layer.name)], reshape_transform=reshape)
    maps = tool(images.clone(), [ClassifierOutputTarget(int(c)) for c in classes])
    tool.activations_and_grads.release()
    network.zero_grad()
    return maps


def test_the_target_layer_is_found(network, images):
    layer = find_target_layer(network, images)
    assert (layer.name, layer.layout) == network.expected_layer
    if layer.layout == "tokens":
        assert (layer.rows, layer.columns) == (4, 4)


@pytest.mark.parametrize("method", ["gradcam", "gradcam++", "hirescam", "layercam", "gradcamelementwise"])
def test_maps_agree_with_the_package(double, images, method, known_layer):
    # double, because Grad-CAM++ divides by sums that nearly cancel in a network with random weights
    images, labels = images.double(), torch.tensor([2, 0, 5])
    ours = ActivationMaps(double, method, TargetChoice("label", CLASSES))(images, labels)
    package = by_package(double, PACKAGE_CLASSES[method], images, labels, known_layer(double, images))
    np.testing.assert_allclose(ours.numpy(), package, atol=1e-5)


@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
@pytest.mark.parametrize("make", [resnet, vision_transformer])
def test_maps_agree_with_the_package_in_single_precision(make, images, method, known_layer):
    torch.manual_seed(0)
    network = make().eval()
    labels = torch.tensor([2, 0, 5])
    ours = ActivationMaps(network, method, TargetChoice("label", CLASSES))(images, labels)
    package = by_package(network, PACKAGE_CLASSES[method], images, labels, known_layer(network, images))
    np.testing.assert_allclose(ours.numpy(), package, atol=1e-5)


def test_faint_gradients_give_the_same_map(images):
    network = resnet().eval()
    maps = ActivationMaps(network)
    wanted = maps(images)
    with torch.no_grad():
        network.fc.weight.mul_(1e-20)
        network.fc.bias.mul_(1e-20)
    torch.testing.assert_close(maps(images), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_maps_of_a_real_classifier_agree_with_the_package(photos, photo_classifier, known_layer, method):
    pixels, classes = small_photos(photos[0][:2]), photos[1][:2]
    ours = ActivationMaps(photo_classifier, method, TargetChoice("label", 1000))(pixels, classes)
    layer = known_layer(photo_classifier, pixels)
    package = by_package(photo_classifier, PACKAGE_CLASSES[method], pixels, classes, layer)
    np.testing.assert_allclose(ours.numpy(), package, atol=1e-5)
    assert float(ours.amax((1, 2)).min()) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_is_left_as_it_was(images, fails):
    network = resnet()
    network.layer2.eval()
    network.conv1.weight.requires_grad_(False)
    network.fc.weight.grad = torch.ones_like(network.fc.weight)
    modes = [module.training for module in network.modules()]
    flags = [parameter.requires_grad for parameter in network.parameters()]
    state = {key: value.clone() for key, value in network.state_dict().items()}
    random_state = torch.get_rng_state()
    maps = ActivationMaps(network, "gradcam", TargetChoice("label", CLASSES))
    if fails:
        with pytest.raises(PatchError):
            maps(images, torch.tensor([0, 1, CLASSES]))
    else:
        maps(images, torch.tensor([0, 1, 2]))
    assert [module.training for module in network.modules()] == modes
    assert [parameter.requires_grad for parameter in network.parameters()] == flags
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert torch.equal(network.fc.weight.grad, torch.ones_like(network.fc.weight))
    assert network.layer4[0].conv1.weight.grad is None
    assert not any(module._forward_hooks or module._backward_hooks for module in network.modules())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_it_works_under_no_grad_and_inference_mode_and_on_frozen_networks(images):
    network = resnet().eval().requires_grad_(False)
    maps = ActivationMaps(network)
    wanted = maps(images)
    with torch.no_grad():
        assert torch.equal(maps(images), wanted)
    with torch.inference_mode():
        assert torch.equal(maps(images.clone()), wanted)


def test_a_network_that_goes_on_in_place_does_not_change_the_activation(images):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8))
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)]
    in_place = nn.Sequential(body, nn.ReLU(inplace=True), *tail).eval()
    beside = nn.Sequential(body, nn.ReLU(), *tail).eval()
    maps = [ActivationMaps(network, "gradcam", target_layer="0")(images) for network in (in_place, beside)]
    assert torch.equal(*maps)


def test_a_layer_behind_class_token_pooling_is_refused_with_advice(images):
    network = vision_transformer()
    with pytest.raises(PatchError, match="class-token pooling"):
        ActivationMaps(network, target_layer="norm")(images)
    with pytest.raises(PatchError, match="gives no tensor"):
        ActivationMaps(network, target_layer="no.such.layer")(images)


def test_images_too_small_for_a_map_say_so():
    with pytest.raises(PatchError, match="larger images"):
        find_target_layer(nn.Sequential(nn.Conv2d(3, 4, 4), nn.Flatten(), nn.Linear(4, 3)), torch.zeros(1, 3, 4, 4))


def test_tokens_of_images_that_are_not_square():
    network = timm.create_model("vit_tiny_patch16_224", img_size=(32, 96), depth=2, num_classes=CLASSES)
    layer = find_target_layer(network, torch.randn(1, 3, 32, 96))
    assert (layer.prefix, layer.rows, layer.columns) == (1, 2, 6)
    assert ActivationMaps(network)(torch.randn(2, 3, 32, 96)).shape == (2, 32, 96)


def test_the_map_is_on_the_patches_that_decide():
    # a network whose logit 0 is the brightness of what it sees: the bright patch must score highest
    network = nn.Sequential(nn.Conv2d(3, 2, 4, stride=4, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        network[0].weight[0], network[0].weight[1] = 1, -1
    images = torch.zeros(2, 3, 20, 28)
    images[0, :, 4:8, 20:24] = 1
    images[1, :, 16:20, 0:4] = 1
    scorer = make_scorer(PatchConfig(saliency="hirescam"), network, num_classes=2)
    scores = scorer.scores(images, torch.zeros(2, dtype=torch.int64), torch.arange(2), 4)
    assert scores.shape == (2, 35)
    assert scores.argmax(1).tolist() == [1 * 7 + 5, 4 * 7 + 0]


def test_targets():
    logits = torch.tensor([[0.0, 1, 2], [5, 0, 0], [0, 1, 0]])
    labels = torch.tensor([1, 2, -1])
    assert TargetChoice("auto", 3).choose(logits, labels).tolist() == [1, 2, 1]
    assert TargetChoice("auto", 10).choose(logits, labels).tolist() == [2, 0, 1]
    assert TargetChoice("auto", 3).choose(logits, None).tolist() == [2, 0, 1]
    assert TargetChoice("argmax", 3).choose(logits, labels).tolist() == [2, 0, 1]
    assert TargetChoice("label", 10, [2, 1, 0]).choose(logits, labels.clamp(min=0)).tolist() == [1, 0, 2]
    for choice, given in ((TargetChoice("label", 10), labels), (TargetChoice("label", 3), None)):
        with pytest.raises(PatchError, match="class_map"):
            choice.choose(logits, given)
    with pytest.raises(PatchError, match="outside 0"):
        TargetChoice("label", 3).choose(logits, labels)
    with pytest.raises(PatchError, match="class_map must name outputs of the classifier, 0"):
        TargetChoice("auto", 3, [0, 1, 3]).choose(logits, labels)


@pytest.mark.parametrize("method", sorted(set(PACKAGE_METHODS) - {"ablationcam", "scorecam"}))
def test_methods_of_the_package(images, method):
    torch.manual_seed(0)
    network = resnet()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    maps = PackageMaps(network, method, TargetChoice("argmax"))(images[:2], size=(32, 48))
    assert maps.shape == (2, 32, 48)
    assert maps.dtype == torch.float32
    assert 0 <= float(maps.min()) <= float(maps.max()) <= 1
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("method", ["ablationcam", "scorecam"])
@pytest.mark.parametrize("tokens", [False, True])
def test_slow_methods_of_the_package(images, method, tokens):
    torch.manual_seed(0)
    small = nn.Sequential(
        nn.Conv2d(3, 6, 8, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)
    )
    network = torchvision.models.VisionTransformer(64, 16, 2, 2, 8, 16, num_classes=CLASSES) if tokens else small
    if tokens:
        nn.init.normal_(network.heads.head.weight)
    maps = PackageMaps(network, method)(images[:2])
    assert maps.shape == (2, 64, 64)
    assert torch.isfinite(maps).all()


def test_random_scores_depend_on_seed_and_position_alone():
    images = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    scorer = make_scorer(PatchConfig(saliency="random", seed=7))
    together = scorer.scores(images, None, torch.tensor([5, 9, 70_000]), 4)
    alone = scorer.scores(images[:1], None, torch.tensor([9]), 4)
    assert torch.equal(together[1], alone[0])
    other = make_scorer(PatchConfig(saliency="random", seed=8)).scores(images, None, torch.tensor([5, 9, 70_000]), 4)
    assert len(torch.unique(torch.cat([together, other]))) == 6 * 16


def test_variance_scores_are_those_of_numpy():
    images = torch.randint(0, 256, (2, 3, 13, 10), dtype=torch.uint8)
    images[0, :, :4, :4] = 77
    scores = make_scorer(PatchConfig(saliency="variance")).scores(images, None, torch.arange(2), 4)
    expected = [[p.var((1, 2)).sum() for p in patch_twin.cut(image.numpy().astype(float), 4)] for image in images]
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-5)
    assert scores[0, 0] == 0


def test_uint8_images_of_another_size_are_prepared_for_the_classifier(photos, photo_classifier):
    images, labels = photos[0][:2], photos[1][:2]
    config = PatchConfig(saliency="gradcam++", target="label")
    half = (0.5, 0.5, 0.5)
    arguments = {"mean": half, "std": half, "num_classes": 1000}
    whole = make_scorer(config, photo_classifier, **arguments).scores(images, labels, torch.arange(2), 16)
    ready = make_scorer(config, photo_classifier, num_classes=1000)
    torch.testing.assert_close(ready.scores(images.float() / 127.5 - 1, labels, torch.arange(2), 16), whole)
    # twice as large in one direction: the same picture for the classifier, the same map on twice as many patches
    wide = images.repeat_interleave(2, 3)
    again = make_scorer(config, photo_classifier, input_size=(224, 224), **arguments)
    scores = again.scores(wide, labels, torch.arange(2), 16)
    assert scores.shape == (2, 14 * 28)
    narrow = scores.view(2, 14, 14, 2).mean(3).flatten(1)
    # the way back to 224 px blurs a little
    assert float(torch.corrcoef(torch.stack([narrow.flatten(), whole.flatten()]))[0, 1]) > 0.95
    with pytest.raises(PatchError, match="mean="):
        ready.scores(images, labels, torch.arange(2), 16)


def test_scores_do_not_depend_on_the_batch(photos, photo_classifier):
    images, labels = photos[0][:4], photos[1][:4]
    half = (0.5, 0.5, 0.5)
    scorer = make_scorer(PatchConfig(), photo_classifier, mean=half, std=half, num_classes=1000)
    whole = scorer.scores(images, labels, torch.arange(4), 16)
    parts = [scorer.scores(images[i : i + 2], labels[i : i + 2], torch.arange(2), 16) for i in (0, 2)]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=0)


def test_what_the_classifier_looks_at_carries_its_decision(photos, photo_classifier):
    """Deleting the 30 % of the patches that Grad-CAM ranks highest hurts more than deleting the lowest."""
    from dq_lightning.core.grid import pixel_mask
    from dq_lightning.core.records import Grid
    from dq_lightning.patches.choose import choose_kept, mask_of

    pixels, labels = photos[0].float() / 127.5 - 1, photos[1]
    scores = make_scorer(PatchConfig(), photo_classifier, num_classes=1000).scores(pixels, labels, torch.arange(16), 16)

    def confidence(kept):
        stays = pixel_mask(mask_of(kept, 196), Grid(224, 224, 16))
        with torch.no_grad():
            return photo_classifier(pixels * stays).softmax(1).gather(1, labels[:, None]).mean()

    assert confidence(choose_kept(scores, 137)) > confidence(choose_kept(-scores, 137)) + 0.1


def test_a_method_without_its_classifier_and_bad_settings_are_refused():
    with pytest.raises(PatchError, match="needs a classifier"):
        make_scorer(PatchConfig())
    with pytest.raises(ConfigError, match="saliency"):
        PatchConfig(saliency="gradcamm")
    for values in ({"drop_ratio": 1.0}, {"patch_size": 0}, {"quality": 0}, {"class_map": ()}, {"least_ratio": 2}):
        with pytest.raises(ConfigError, match=next(iter(values))):
            PatchConfig(**values)
    config = PatchConfig(drop_ratio=0.2, class_map=(3, 1), spread=True)
    assert PatchConfig.from_json(config.to_json()) == config


def test_the_patch_settings_name_every_method_that_there_is():
    from typing import get_args

    from dq_lightning.core.config import Saliency

    assert {*METHODS, *PACKAGE_METHODS, "random", "variance"} == set(get_args(Saliency))
