"""Convolutional networks with attention on maps (LeViT, both EfficientViTs) give what is written out here."""

import copy
from collections.abc import Container

import pytest
import torch
from timm.models.efficientvit_mit import EfficientVit
from timm.models.efficientvit_msra import EfficientVitMsra
from timm.models.levit import Levit
from torch import Tensor, nn

from isw_plugin import InstanceWisePruner
from tests.conftest import Net, Touch, made, untouched

Map = tuple[Tensor, Tensor]  # what readers see, what all others see


class Hybrid(Net):
    """A model of timm's as ``net``, whose forward ``run`` writes out. ``gated``: of the maps there, those that are."""

    net: nn.Module
    gated: Container[str] = ()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def touching(self, touch: Touch) -> None:
        self.named: set[str] = set()

        def touched(name: str, x: Tensor) -> Map:
            self.named.add(f"net.{name}")
            return touch(f"net.{name}", x) if f"net.{name}" in self.gated else (x, x)

        self.touch = touched


class LeViT(Hybrid):
    image = (3, 64, 64)

    def __init__(self) -> None:
        super().__init__()
        self.net = Levit(64, embed_dim=(16, 24), key_dim=4, depth=(2, 2), num_heads=(2, 2), num_classes=5)

    def run(self, x: Tensor, touch: Touch) -> Tensor:
        self.touching(touch)
        net, stem = self.net, self.net.stem
        for conv, act in ((stem.conv1, stem.act1), (stem.conv2, stem.act2), (stem.conv3, stem.act3)):
            x, _ = self.touch(f"stem.{_name(stem, conv)}.linear", act(conv(x)))
        seen = tuple(part.flatten(2).transpose(1, 2) for part in self.touch("stem.conv4.linear", stem.conv4(x)))
        for index, stage in enumerate(net.stages):
            if index:
                down, name = stage.downsample, f"stages.{index}.downsample"
                seen = self.touch(f"{name}.attn_downsample.proj.ln.linear", down.attn_downsample(seen[0]))
                seen = self.mlp(f"{name}.mlp", down.mlp, seen)
            for number, block in enumerate(stage.blocks):
                name = f"stages.{index}.blocks.{number}"
                seen = self.touch(f"{name}.attn.proj.ln.linear", seen[1] + block.attn(seen[0]))
                seen = self.mlp(f"{name}.mlp", block.mlp, seen)
        x, _ = self.touch("head.bn", net.head.bn(seen[1].mean(1)))
        return net.head.linear(x)

    def mlp(self, name: str, mlp: nn.Module, seen: Map) -> Map:
        hidden, _ = self.touch(f"{name}.ln1.linear", mlp.act(mlp.ln1(seen[0])))
        return self.touch(f"{name}.ln2.linear", seen[1] + mlp.ln2(hidden))


class LiteAttention(Hybrid):
    """EfficientViT of MIT: queries, keys and values of several sizes, linear attention."""

    image = (3, 64, 64)

    def __init__(self) -> None:
        super().__init__()
        widths = {"widths": (8, 8, 16, 16, 24), "head_widths": (32, 40)}
        self.net = EfficientVit(depths=(1, 1, 1, 1, 1), head_dim=8, num_classes=5, **widths)

    def run(self, x: Tensor, touch: Touch) -> Tensor:
        self.touching(touch)
        stem, head = self.net.stem, self.net.head
        seen = self.residual("stem.res0", stem.res0, self.touch("stem.in_conv.conv", stem.in_conv(x)))
        for index, stage in enumerate(self.net.stages):
            for number, block in enumerate(stage.blocks):
                name = f"stages.{index}.blocks.{number}"
                if hasattr(block, "context_module"):
                    x = seen[1] + self.attention(f"{name}.context_module.main", block.context_module.main, seen[0])
                    seen = self.touch(f"{name}.context_module.main.proj.conv", x)
                    seen = self.residual(f"{name}.local_module", block.local_module, seen)
                else:
                    seen = self.residual(name, block, seen)
        x, _ = self.touch("head.in_conv.conv", head.in_conv(seen[0]))
        linear, norm, act, _, last = head.classifier
        x, _ = self.touch("head.classifier.0", act(norm(linear(x.mean((2, 3))))))
        return last(x)

    def residual(self, name: str, block: nn.Module, seen: Map) -> Map:
        *parts, (last, conv) = block.main.named_children()
        x = seen[0]
        for part, layer in parts:
            x, _ = self.touch(f"{name}.main.{part}.conv", layer(x))
        shortcut = 0 if block.shortcut is None else seen[1]
        return self.touch(f"{name}.main.{last}.conv", conv(x) + shortcut)

    def attention(self, name: str, main: nn.Module, x: Tensor) -> Tensor:
        read, other = self.touch(f"{name}.qkv.conv", main.qkv(x))
        larger, _ = self.touch(f"{name}.aggreg.0.0", main.aggreg[0][0](read))
        larger = main.aggreg[0][1](larger)
        heads = torch.cat([other, larger], 1).unflatten(1, (-1, 3 * main.dim)).flatten(3)
        q, k, v = (part.transpose(2, 3) for part in heads.split(main.dim, 2))
        weights = q.relu() @ k.relu().transpose(2, 3)
        out = (weights @ v) / (weights.sum(3, keepdim=True) + main.eps)
        return main.proj(out.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:]))


class CascadedAttention(Hybrid):
    """EfficientViT of MSRA: heads read parts of a map; of windows in the first stage, of the map in the second."""

    image = (3, 128, 128)

    def __init__(self) -> None:
        super().__init__()
        sizes = {"embed_dim": (16, 24), "key_dim": (4, 4), "depth": (1, 1), "num_heads": (2, 2)}
        down = (("", 1), ("subsample", 2))
        self.net = EfficientVitMsra(128, num_classes=5, window_size=(4, 4), kernels=(3, 3), down_ops=down, **sizes)

    def run(self, x: Tensor, touch: Touch) -> Tensor:
        self.touching(touch)
        stem, (first, second) = self.net.patch_embed, self.net.stages
        for conv, act in ((stem.conv1, stem.relu1), (stem.conv2, stem.relu2), (stem.conv3, stem.relu3)):
            x, _ = self.touch(f"patch_embed.{_name(stem, conv)}.conv", act(conv(x)))
        seen = self.touch("patch_embed.conv4.conv", stem.conv4(x))
        seen = self.block("stages.0.blocks.0", first.blocks[0], seen, whole=False)
        down, name = second.downsample, "stages.1.downsample"
        seen = self.pair(f"{name}.res1", *down.res1, seen)
        seen = self.pair(f"{name}.res2", *down.res2, self.merged(f"{name}.patchmerge", down.patchmerge, seen[0]))
        seen = self.block("stages.1.blocks.0", second.blocks[0], seen, whole=True)
        x, _ = self.touch("head.bn", self.net.head.bn(seen[1].mean((2, 3))))
        return self.net.head.linear(x)

    def pair(
        self, name: str, filters: nn.Module, mlp: nn.Module, seen: Map, names: tuple[str, str] = ("0", "1")
    ) -> Map:
        """A depthwise filter and an MLP, each beside a shortcut."""
        seen = self.touch(f"{name}.{names[0]}.m.conv", seen[1] + filters.m(seen[0]))
        hidden, _ = self.touch(f"{name}.{names[1]}.m.pw1.conv", mlp.m.act(mlp.m.pw1(seen[0])))
        return self.touch(f"{name}.{names[1]}.m.pw2.conv", seen[1] + mlp.m.pw2(hidden))

    def merged(self, name: str, merge: nn.Module, x: Tensor) -> Map:
        x, _ = self.touch(f"{name}.conv1.conv", merge.act(merge.conv1(x)))
        x = merge.act(merge.conv2(x))
        read, other = self.touch(f"{name}.conv2.conv", x)
        squeezed, _ = self.touch(f"{name}.se.fc1", merge.se.act(merge.se.fc1(other.mean((2, 3), keepdim=True))))
        return self.touch(f"{name}.conv3.conv", merge.conv3(read * merge.se.gate(merge.se.fc2(squeezed))))

    def block(self, name: str, block: nn.Module, seen: Map, whole: bool) -> Map:
        """``whole``: attention is over the whole map, and the map that its heads share is a site."""
        before = self.pair(name, block.dw0, block.ffn0, seen, ("dw0", "ffn0"))
        attention = block.mixer.m
        mixed = self.cascade(f"{name}.mixer.m.attn", attention.attn, before) if whole else attention(before[1])
        seen = self.touch(f"{name}.mixer.m.attn.proj.1.conv", before[1] + mixed)
        return self.pair(name, block.dw1, block.ffn1, seen, ("dw1", "ffn1"))

    def cascade(self, name: str, attn: nn.Module, seen: Map) -> Tensor:
        """The first head reads its part of the map; the others add theirs to what the head before gave."""
        parts = [seen[0].chunk(2, 1)[0], seen[1].chunk(2, 1)[1]]
        given, out = torch.zeros(()), []
        for head, part in enumerate(parts):
            q, k, v = attn.qkvs[head](given + part).split([attn.key_dim, attn.key_dim, attn.val_dim], 1)
            q, _ = self.touch(f"{name}.qkvs.{head}.conv", q)
            q, k, v = (x.flatten(2) for x in (attn.dws[head](q), k, v))
            weights = (
                q.transpose(1, 2) @ k * attn.scale + attn.attention_biases[head, attn.attention_bias_idxs]
            ).softmax(2)
            given = (v @ weights.transpose(1, 2)).unflatten(2, part.shape[2:])
            out.append(given)
        return attn.proj(torch.cat(out, 1))


def _name(parent: nn.Module, child: nn.Module) -> str:
    return next(name for name, module in parent.named_children() if module is child)


@pytest.mark.parametrize("kind", [LeViT, LiteAttention, CascadedAttention])
@pytest.mark.parametrize("scope", ["all", "consumers"])
def test_networks_with_attention_on_maps_give_what_is_written_out(kind: type[Hybrid], scope: str) -> None:
    net = made(kind)
    by_hand, images = copy.deepcopy(net), net.images(3)
    pruner = InstanceWisePruner(net, images[:1], alpha=0.0, beta=0.9, scope=scope)
    by_hand.gated = {site.name for site in pruner.sites}
    with torch.no_grad():
        expected = by_hand.gated_by_hand(images, 0.0, 0.9, scope)
        with pruner.gating():
            given = net(images)
        torch.testing.assert_close(by_hand.run(images, untouched), net(images))
    assert by_hand.gated <= by_hand.named <= by_hand.gated | pruner._found.left_out.keys()
    assert all(not keep.all() for keep in pruner.keep.values())
    torch.testing.assert_close(given, expected)
