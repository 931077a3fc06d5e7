"""The target layer in families of timm: its layout is the one that the network's code says, and maps follow what moves.

The networks have random weights. What stands at zero before training is drawn at random, and batch norms are given the
statistics of their inputs, so that every branch counts.
"""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from dq_lightning.core.errors import PatchError
from dq_lightning.patches.activation_maps import ActivationMaps, TargetChoice
from dq_lightning.patches.saliency import ClassifierScorer
from dq_lightning.patches.target_layer import TargetLayer, activation_and_gradient, find_target_layer, make_probes

CLASSES = 7
SHALLOW = {"depth": 3}
# name, side of the images, layout, tokens before those of the patches, rows of the map, options
FAST = [
    ("efficientvit_b0", 160, "NCHW", 0, 5, {"as_made": True}),
    ("efficientvit_m0", 224, "NCHW", 0, 4, {}),
    ("vit_tiny_patch16_224", 64, "tokens", 1, 4, SHALLOW | {"img_size": 64}),
    ("deit_tiny_distilled_patch16_224", 64, "tokens", 2, 4, SHALLOW | {"img_size": 64}),
    (
        *("swin_tiny_patch4_window7_224", 64, "NHWC", 0, 4),
        {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 1, 2), "num_heads": (1, 2, 4)},
    ),
    ("pvt_v2_b0", 160, "tokens", 0, 5, {}),
    ("convnext_atto", 160, "NCHW", 0, 5, {}),
]
SLOW = [
    ("gernet_s", 160, "NCHW", 0, 5, {}),
    ("regnetz_b16", 160, "NCHW", 0, 5, {}),
    ("beit_base_patch16_224", 224, "tokens", 1, 14, SHALLOW),
    ("beitv2_base_patch16_224", 224, "tokens", 1, 14, SHALLOW),
    ("botnet26t_256", 256, "NCHW", 0, None, {}),
    ("caformer_s18", 160, "tokens", 0, 5, {}),
    ("cait_xxs24_224", 224, "tokens", 1, 14, SHALLOW),
    ("coat_tiny", 224, "tokens", 1, 7, {}),
    ("coatnet_pico_rw_224", 224, "NCHW", 0, 7, {}),
    ("convit_tiny", 224, "tokens", 1, 14, {}),
    ("convmixer_768_32", 161, "NCHW", 0, 23, {}),
    ("crossvit_9_240", 240, "tokens", 1, None, {}),
    ("cs3darknet_s", 160, "NCHW", 0, 5, {}),
    ("davit_tiny", 224, "tokens", 0, 7, {}),
    ("deit3_small_patch16_224", 224, "tokens", 1, 14, SHALLOW),
    ("densenet121", 160, "NCHW", 0, 5, {}),
    ("dla34", 160, "NCHW", 0, 5, {}),
    ("dm_nfnet_f0", 160, "NCHW", 0, 5, {}),
    ("dpn68", 160, "NCHW", 0, 5, {}),
    ("edgenext_xx_small", 160, "NCHW", 0, 5, {}),
    ("efficientformer_l1", 224, "tokens", 0, 7, {}),
    ("efficientformerv2_s0", 224, "NCHW", 0, 7, {}),
    ("efficientnet_b0", 160, "NCHW", 0, 5, {}),
    ("eva02_tiny_patch14_224", 224, "tokens", 1, 16, SHALLOW),
    ("fastvit_t8", 256, "NCHW", 0, 8, {}),
    ("focalnet_tiny_srf", 160, "NCHW", 0, 5, {}),
    ("gcvit_xxtiny", 224, "NHWC", 0, 7, {}),
    ("ghostnet_100", 160, "NCHW", 0, 5, {}),
    ("gmlp_ti16_224", 224, "tokens", 0, 14, {}),
    ("hgnetv2_b0", 160, "NCHW", 0, 5, {}),
    ("hiera_tiny_224", 224, "tokens", 0, 7, {}),
    ("hrnet_w18_small", 160, "NCHW", 0, 5, {}),
    ("inception_next_atto", 224, "NCHW", 0, 7, {}),
    ("inception_v3", 203, "NCHW", 0, None, {}),
    ("legacy_xception", 160, "NCHW", 0, 5, {}),
    ("levit_128s", 224, "tokens", 0, None, {}),
    ("mambaout_femto", 160, "NHWC", 0, 5, {}),
    ("maxvit_rmlp_pico_rw_256", 256, "NHWC", 0, 8, {}),
    ("mixer_s32_224", 224, "tokens", 0, 7, {}),
    ("mobilenetv3_small_050", 160, "NCHW", 0, 5, {}),
    ("mobilevit_xxs", 128, "NCHW", 0, 4, {}),
    ("mobilevitv2_050", 160, "NCHW", 0, 6, {}),
    ("mvitv2_tiny", 224, "tokens", 0, 7, {}),
    ("nest_tiny", 224, "NHWC", 0, 14, {}),
    ("nextvit_small", 160, "NCHW", 0, 5, {}),
    ("nf_regnet_b0", 160, "NCHW", 0, 5, {}),
    ("pit_ti_224", 224, "tokens", 1, 7, {}),
    ("poolformer_s12", 160, "NCHW", 0, 5, {}),
    ("regnetx_002", 160, "NCHW", 0, 5, {}),
    ("repvgg_a0", 160, "NCHW", 0, 5, {}),
    ("res2net50_26w_4s", 160, "NCHW", 0, 5, {}),
    ("resmlp_12_224", 224, "tokens", 0, 14, {}),
    ("resnest14d", 160, "NCHW", 0, 5, {}),
    ("resnet18", 160, "NCHW", 0, 5, {}),
    ("resnetv2_50", 160, "NCHW", 0, 5, {}),
    ("rexnet_100", 160, "NCHW", 0, 5, {}),
    ("samvit_base_patch16_224", 224, "NHWC", 0, 14, SHALLOW),
    ("sequencer2d_s", 224, "NHWC", 0, 16, {}),
    ("shvit_s1", 224, "NCHW", 0, 4, {}),
    ("starnet_s1", 160, "NCHW", 0, 5, {}),
    ("swiftformer_xs", 224, "NCHW", 0, 7, {}),
    ("swin_tiny_patch4_window7_224", 224, "NHWC", 0, 7, {}),
    ("swinv2_cr_tiny_224", 224, "NHWC", 0, 7, {}),
    ("swinv2_tiny_window8_256", 256, "NHWC", 0, None, {}),
    ("tiny_vit_5m_224", 224, "NCHW", 0, 7, {}),
    ("tnt_s_patch16_224", 224, "tokens", 1, 14, SHALLOW),
    ("twins_svt_small", 224, "tokens", 0, 7, {}),
    ("vgg11", 160, "NCHW", 0, 5, {}),
    ("visformer_tiny", 224, "NCHW", 0, 7, {}),
    ("vit_relpos_small_patch16_224", 224, "tokens", 0, 14, SHALLOW),
    ("vit_small_patch16_dinov3", 256, "tokens", 5, 16, SHALLOW),
    ("volo_d1_224", 224, "tokens", 1, 14, {}),
    ("xception41", 160, "NCHW", 0, 5, {}),
    ("xcit_nano_12_p16_224", 224, "tokens", 1, 14, {}),
]
FAMILIES = [
    *(pytest.param(*row, id=row[0]) for row in FAST),
    *(pytest.param(*row, id=f"{row[0]}-{row[1]}", marks=pytest.mark.slow) for row in SLOW),
]


def network_of(name, side, options, seed):
    torch.manual_seed(seed)
    # linear attention whose inputs were normalised mixes all places: this family is taken as it is made
    as_made = options.get("as_made", False)
    options = {key: value for key, value in options.items() if key != "as_made"}
    network = timm.create_model(name, pretrained=False, num_classes=CLASSES, **options).eval()
    if as_made:
        return network
    norms = [child for child in network.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]
    for child in network.modules():
        for key, value in child.named_parameters(recurse=False):
            if (
                value.ndim <= 1
                and key.startswith(("weight", "gamma", "scale"))
                and float(value.detach().abs().max()) < 0.01
            ):
                nn.init.ones_(value)
            if isinstance(child, nn.Linear) and key == "weight" and not bool(value.any()):
                nn.init.normal_(value)
            if key == "attention_biases":
                nn.init.normal_(value, std=3)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        network(torch.randn(4, 3, side, side))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return network.eval()


def agreement_with_receptive_fields(network, layer, side):
    """Cosine between where places of the map are and where the pixels lie that they depend on, each from their centre."""
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1)).requires_grad_()
    seen = []
    handle = network.get_submodule(layer.name).register_forward_hook(lambda *args: seen.append(args[2].clone()))
    try:
        network(images)
    finally:
        handle.remove()
    features = layer.to_map(seen[-1])
    weights = torch.randn(features.shape[1], generator=torch.Generator().manual_seed(2))
    line = torch.linspace(0, 1, side)
    places, centroids = [], []
    for row in (0, layer.rows - 1):
        for column in (0, layer.columns - 1):
            score = (features[0, :, row, column] * weights).sum()
            (gradient,) = torch.autograd.grad(score, images, retain_graph=True)
            energy = gradient[0].square().sum(0).double()
            energy = energy / energy.sum().clamp(min=1e-300)
            centroids.append(torch.stack([(energy.sum(1) * line).sum(), (energy.sum(0) * line).sum()]))
            places.append(torch.tensor([float(row), float(column)]))
    ours, theirs = torch.stack(places).double(), torch.stack(centroids)
    ours, theirs = ours - ours.mean(0), theirs - theirs.mean(0)
    return float((ours * theirs).sum() / (ours.norm() * theirs.norm()).clamp(min=1e-300))


def following(network, layer, side, *, weighted=True):
    """Correlation between where a map changes, with or without weights of the gradient, and where a square is that moves."""
    probes, places = make_probes(torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3)))
    activation, gradient = activation_and_gradient(
        network, layer, probes, lambda logits: torch.zeros(len(logits), dtype=torch.int64)
    )
    if weighted:
        maps = (activation * gradient).sum(1)
        change = (maps[1:] - maps[:1]).abs()
    else:
        change = (activation[1:] - activation[:1]).norm(dim=1)
    covered = F.adaptive_avg_pool2d(places, change.shape[1:])[:, 0]
    change, covered = change - change.mean(0), covered - covered.mean(0)
    return float((change * covered).sum() / (change.norm() * covered.norm()).clamp(min=1e-30))


@pytest.mark.parametrize(("name", "side", "layout", "prefix", "rows", "options"), FAMILIES)
def test_the_layout_of_a_family_is_known_and_its_maps_follow_what_moves(
    name, side, layout, prefix, rows, options, record_property
):
    agreements, moved, followed = [], [], []
    for seed in range(2):
        network = network_of(name, side, options, seed)
        layer = find_target_layer(network, torch.randn(2, 3, side, side))
        assert (layer.layout, layer.prefix) == (layout, prefix), layer
        assert rows in (None, layer.rows), layer
        assert layer.rows == layer.columns, layer
        agreements.append(agreement_with_receptive_fields(network, layer, side))
        moved.append(following(network, layer, side, weighted=False))
        followed.append(following(network, layer, side))
    # for the report of `--junitxml`
    record_property("layer", layer.name)
    record_property("agreement", [round(value, 2) for value in agreements])
    record_property("following", [round(value, 2) for value in followed])
    record_property("moved", [round(value, 2) for value in moved])
    # where attention of random weights mixes all places, the pixels that a place depends on lie everywhere
    assert max(sum(agreements) / 2 - 0.2, sum(moved) / 2) > 0.3, (layer, agreements, moved)
    maps = ActivationMaps(network, targets=TargetChoice("argmax"))(torch.randn(2, 3, side, side))
    assert maps.shape == (2, side, side)
    assert bool(maps.isfinite().all())


def test_the_measure_tells_a_wrong_layout_from_the_right_one():
    network = network_of("vit_tiny_patch16_224", 64, SHALLOW | {"img_size": 64}, 0)
    right = find_target_layer(network, torch.randn(2, 3, 64, 64))
    wrong = TargetLayer(right.name, "tokens", 3, 3, prefix=8)
    assert agreement_with_receptive_fields(network, right, 64) > 0.9
    assert abs(agreement_with_receptive_fields(network, wrong, 64)) < 0.7
    square = network_of("swin_tiny_patch4_window7_224", 64, FAST[4][5], 0)
    layer = find_target_layer(square, torch.randn(2, 3, 64, 64))
    assert following(square, layer, 64) > 0.3


class Scattered(nn.Module):
    """Puts the places of its map in another order: nothing is where it was in the image."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, stride=8)
        self.scatter = nn.Identity()
        self.head = nn.Linear(8, CLASSES)
        self.register_buffer("order", torch.randperm(64, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        if tuple(x.shape[2:]) != (64, 64):
            raise ValueError("images of 64 x 64 pixels are needed")
        return self.head(self.scatter(self.patches(x).flatten(2).transpose(1, 2)[:, self.order]).mean(1))


class OnlyScattered(nn.Module):
    """The same as one layer, in which nothing else can be looked at."""

    def __init__(self):
        super().__init__()
        self.inner = Scattered()
        self.patches, self.order, self.head = self.inner.patches, self.inner.order, self.inner.head
        del self.inner
        self.scatter = nn.Identity()

    def forward(self, x):
        x = F.conv2d(x, self.patches.weight, self.patches.bias, stride=8) if x.shape[2] == 64 else x[:, :, :1, :0]
        return self.head(self.scatter(x.flatten(2).transpose(1, 2)[:, self.order]).mean(1))


def test_what_cannot_be_proved_is_an_error_that_says_what_to_pass():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    # the layer before it is a map, and is taken
    assert find_target_layer(Scattered(), images).name == "patches"
    with pytest.raises(PatchError, match="target_layer='scatter' of Scattered is not a feature map of images"):
        find_target_layer(Scattered(), images, "scatter")
    with pytest.raises(PatchError, match=r"was found to be a feature map .* PatchConfig\(target_layer=NAME\)"):
        find_target_layer(OnlyScattered(), images)


def test_a_head_of_zeros_is_told():
    network = timm.create_model("resnet10t", num_classes=CLASSES)
    nn.init.zeros_(network.fc.weight)
    with pytest.raises(PatchError, match="do not depend on the image"):
        find_target_layer(network, torch.randn(1, 3, 64, 64))


def test_images_of_other_sizes_keep_the_layer(monkeypatch):
    network = network_of("resnet10t", 64, {}, 0)
    maps = ActivationMaps(network)
    assert maps(torch.randn(1, 3, 64, 96)).shape == (1, 64, 96)
    first = maps._layers.of(torch.randn(1, 3, 64, 96))
    monkeypatch.setattr("dq_lightning.patches.target_layer.find_target_layer", None)
    other = maps._layers.of(torch.randn(1, 3, 96, 64))
    assert (other.name, other.rows, other.columns) == (first.name, 3, 2)


def test_a_classifier_that_fails_is_told_when_it_is_tried():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    scorer = ClassifierScorer(ActivationMaps(network), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(PatchError, match=r"fails when its saliency is tried .*first layer.*target_layer"):
        scorer.check(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), None)
